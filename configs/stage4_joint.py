"""Stage 4 of 4: the denoiser learns to use HCE and LCG together, both frozen (eq. 8).

    python tools/train.py --config configs/stage4_joint.py --data dataset/ --out runs/stage4_joint \\
        --init runs/stage3_lcg hce=runs/stage2_hce

The denoiser of stages 1 and 3, the LCG of stage 3, the HCE of stage 2 with its cross-attentions. The paper:
50K iterations, batch 16, AdamW, 8 A100. `--stage.trained "(denoiser|hce)/.*" True ".*" False` would train HCE
as well.
"""

from animecolor_jax.train.config import TrainConfig
from animecolor_jax.train.stages import JOINT

CONFIG = TrainConfig(stage=JOINT, steps=50_000)
