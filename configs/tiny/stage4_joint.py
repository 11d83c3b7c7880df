"""stage4_joint of the preset `tiny`, on drawn clips of 64x96 and 9 frames, on a CPU.

    python tools/train.py --config configs/tiny/stage4_joint.py --data dataset/ --out runs/stage4_joint \\
        --init runs/stage3_lcg hce=runs/stage2_hce

What it should come to is in the README ("Train").
"""

from animecolor_jax.train.stages import JOINT, tiny_run

CONFIG = tiny_run(JOINT, steps=600)
