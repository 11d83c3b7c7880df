"""What makes a small model: one frozen dataclass, of which `configs/mini.py` and `mini_cpu.py` are two."""

import dataclasses
from dataclasses import dataclass, field

from animecolor_jax.train.config import OptimizerConfig, require
from data_pipeline.toon import ToonConfig


def _cosine(learning_rate, **changes):
    """AdamW as small networks take it: a high learning rate that falls to next to nothing."""
    common = {"schedule": "cosine", "warmup_steps": 50, "final_fraction": 0.02, "clip_norm": 1.0, "eps": 1e-8}
    return OptimizerConfig(learning_rate=learning_rate, **{**common, "weight_decay": 0.0, **changes})


def _toon(**changes):
    """One or two figures in a constant light: line art cannot tell how the light changes."""
    return ToonConfig(max_characters=2, lighting=0.0, **changes)


@dataclass(frozen=True)
class ClipsConfig:
    """The drawn clips, and from which seeds they are."""

    frames: int = 9
    """4k + 1."""
    fps: float = 24.0
    """Motion is defined in seconds: fewer frames a second are larger steps."""
    train: int = 3000
    validation: int = 32
    test: int = 32
    encoded: int = 1000
    """Of the training clips, how many are encoded for the stages; the VAE and the encoders see all."""
    references: int = 3
    """Frames of a training clip, the first among them, that are encoded as references; a step takes one."""
    toon: ToonConfig = field(default_factory=_toon)
    test_toon: ToonConfig = field(default_factory=lambda: _toon(motion=1.5, late_entry=0.5))
    """Of the held-out clips: larger motion, and more characters that are not in the reference."""
    train_seed: int = 0
    validation_seed: int = 8_000_000
    test_seed: int = 9_000_000
    """Of the first clip, which also decides the palette; the others follow."""

    def __post_init__(self):
        require(self.frames % 4 == 1, self.frames, "clips.frames", "4k + 1")
        require(self.references >= 1, self.references, "clips.references", "1 or more")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Training of the VAE: mean absolute error, and a little KL divergence."""

    steps: int = 2600
    batch_size: int = 2
    crop: tuple[int, int] = (32, 48)
    """Height and width of what is cut out of the clips."""
    sketch_share: float = 0.15
    """Share of clips that are line art, which the same VAE encodes."""
    image_every: int = 4
    """Every so many steps the batch is of single frames, as references are: whole ones."""
    image_batch_size: int = 8
    kl_weight: float = 1e-4
    optimizer: OptimizerConfig = field(default_factory=lambda: _cosine(5e-3))


@dataclass(frozen=True)
class EncodersConfig:
    """Training of image and text encoder, together: a caption is to be told from others by its frame, and
    patches are to say their colours."""

    steps: int = 1500
    batch_size: int = 64
    color_weight: float = 4.0
    """Of the patches' colours, beside the contrastive loss."""
    optimizer: OptimizerConfig = field(default_factory=lambda: _cosine(1e-3, weight_decay=0.01))


@dataclass(frozen=True)
class StagesConfig:
    """The four stages, and the baseline that has reference and sketch on its input channels instead."""

    steps: tuple[int, int, int, int] = (1200, 300, 800, 3000)
    batch_size: int = 4
    text_dropout: float = 0.1
    concat: bool = True
    """Whether the baseline is trained, as many steps as all stages together."""
    dtype: str = "float32"
    """Of the networks' arithmetic."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: _cosine(1e-3, weight_decay=0.01, final_fraction=0.05, ema=0.995)
    )
    timesteps: int = 8
    """Of each validation clip, of which the validation loss is taken."""


@dataclass(frozen=True)
class ScoreConfig:
    """How the rows of the table are coloured."""

    steps: int = 20
    guidance: float = 1.0
    seed: int = 43


@dataclass(frozen=True)
class MiniConfig:
    """The whole recipe."""

    preset: str
    """Architecture, and with it the size of the clips."""
    seed: int = 0
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def as_dict(self):
        """JSON-ready."""
        return dataclasses.asdict(self)
