"""The small model for two CPU cores: 64x96 pixels, 9 frames, without the Concat baseline.

    python tools/train_mini.py --config configs/mini_cpu.py --out runs/mini_cpu
"""

from animecolor_jax.mini.recipe import MiniConfig, StagesConfig

CONFIG = MiniConfig(preset="mini-cpu", stages=StagesConfig(concat=False))
