"""stage1_sketch of the preset `tiny`, on drawn clips of 64x96 and 9 frames, on a CPU.

    python tools/train.py --config configs/tiny/stage1_sketch.py --data dataset/ --out runs/stage1_sketch \\
        --init weights/

What it should come to is in the README ("Train").
"""

from animecolor_jax.train.stages import SKETCH, tiny_run

CONFIG = tiny_run(SKETCH, steps=600)
