"""stage3_lcg of the preset `tiny`, on drawn clips of 64x96 and 9 frames, on a CPU.

    python tools/train.py --config configs/tiny/stage3_lcg.py --data dataset/ --out runs/stage3_lcg \\
        --init runs/stage1_sketch

What it should come to is in the README ("Train").
"""

from animecolor_jax.train.stages import LCG, tiny_run

CONFIG = tiny_run(LCG, steps=400)
