"""The small model for two CPU cores: 64x96 pixels, 9 frames, without the Concat baseline.

    python tools/train_mini.py --config configs/mini_cpu.py --out runs/mini_cpu

100 minutes from an empty folder on two cores of an AMD EPYC: clips and VAE 23, encoders 5, encoding 2,
stages 13 + 4 + 11 + 38, scores 4. To expect, PSNR of 32 held-out clips in dB: (1) 12.2, (2) 12.4, (3) 14.2,
(4) 14.2, full 18.5, with 95 % intervals of about 0.5 on either side; the VAE alone 20.4. Its weights are
bundled.
"""

from animecolor_jax.mini.recipe import MiniConfig, StagesConfig

CONFIG = MiniConfig(preset="mini-cpu", stages=StagesConfig(concat=False))
