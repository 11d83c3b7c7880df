"""stage2_hce of the preset `tiny`, on drawn clips of 64x96 and 9 frames, on a CPU.

    python tools/train.py --config configs/tiny/stage2_hce.py --data dataset/ --out runs/stage2_hce \\
        --init runs/stage1_sketch

What it should come to is in the README ("Train").
"""

from animecolor_jax.train.stages import HCE, tiny_run

CONFIG = tiny_run(HCE, steps=1000)
