"""The small model for one 80 GB GPU: 96x160 pixels, 17 frames, with the Concat baseline.

    python tools/train_mini.py --config configs/mini.py --out runs/mini --minutes 9

Planned for 25 minutes in slices of at most 9, the scores included. It has not been run yet: nothing of this
size was trained so far, and its scores are unknown.
"""

from dataclasses import replace

from animecolor_jax.mini.recipe import (
    AutoencoderConfig,
    ClipsConfig,
    EncodersConfig,
    MiniConfig,
    StagesConfig,
)

CONFIG = MiniConfig(
    preset="mini",
    clips=ClipsConfig(frames=17, train=6000, test=200),
    autoencoder=AutoencoderConfig(steps=6000, batch_size=8, crop=(64, 96), image_batch_size=32),
    encoders=EncodersConfig(steps=1500, batch_size=256),
    stages=replace(StagesConfig(), steps=(5000, 1500, 2500, 4000), batch_size=32, dtype="bfloat16"),
)
