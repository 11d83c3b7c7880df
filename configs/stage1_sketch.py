"""Stage 1 of 4: the denoiser learns to follow line art (paper eq. 5).

    python tools/train.py --config configs/stage1_sketch.py --data dataset/ --init weights/ \\
        --out runs/stage1_sketch

weights/ is what `tools/convert_torch.py --init-from COGVIDEOX_2B` writes. The paper: 50K iterations, batch
16, AdamW, 8 A100. Learning rate and schedule are those of CogVideoX-Fun's training script.
"""

from animecolor_jax.train.config import TrainConfig
from animecolor_jax.train.stages import SKETCH

CONFIG = TrainConfig(stage=SKETCH, steps=50_000)
