"""Stage 2 of 4: the High-level Color Extractor, that is Q-Former, its MLPs and the cross-attentions (eq. 6).

    python tools/train.py --config configs/stage2_hce.py --data dataset/ --init runs/stage1_sketch \\
        --out runs/stage2_hce

The denoiser of stage 1 is frozen. The paper: 25K iterations, batch 16, AdamW, 8 A100.
"""

from animecolor_jax.train.config import TrainConfig
from animecolor_jax.train.stages import HCE

CONFIG = TrainConfig(stage=HCE, steps=25_000)
