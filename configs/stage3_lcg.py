"""Stage 3 of 4: the Low-level Color Guider (eq. 7).

    python tools/train.py --config configs/stage3_lcg.py --data dataset/ --init runs/stage1_sketch \\
        --out runs/stage3_lcg

The denoiser of stage 1 is frozen. HCE takes no part, as the paper trains the two separately (section 4.3.1);
with `--stage.conditions text sketch hce lcg` and `--init runs/stage1_sketch hce=runs/stage2_hce` it would.
The LCG starts as a copy of that denoiser, without the input channels of the sketch. The paper: 30K
iterations, batch 16, AdamW, 8 A100.
"""

from animecolor_jax.train.config import TrainConfig
from animecolor_jax.train.stages import LCG

CONFIG = TrainConfig(stage=LCG, steps=30_000)
