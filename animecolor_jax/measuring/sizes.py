"""What is measured, at the size that the aims are stated for, and at one that a CPU runs in seconds."""

import dataclasses
from dataclasses import dataclass

from animecolor_jax import benchmarks, benchmarks_train
from animecolor_jax.benchmarks_attention import CLIP_2B
from animecolor_jax.benchmarks_attention import Size as AttentionSize
from animecolor_jax.benchmarks_train import Shape
from animecolor_jax.compiling.programs import Clip
from animecolor_jax.config import AnimeColorConfig, preset
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.networks import random_network


@dataclass(frozen=True)
class Size:
    """One size of everything.

    Attributes:
        steps: of a clip. loop_steps: of a loop that is timed to know one step. repeats: rounds.
        step_cache: threshold of `denoise.steps_to_run`.
        train: {name: Shape}. torch_backend: of torch.compile.
        row_seconds: that a row is expected to take; by default what the row says.
    """

    model: AnimeColorConfig
    clip: Clip
    attention: AttentionSize
    train: dict[str, Shape]
    dtype: str = "bfloat16"
    steps: int = 50
    loop_steps: int = 4
    repeats: int = 3
    step_cache: float = 0.2
    torch_backend: str = "inductor"
    row_seconds: int | None = None

    @property
    def latents(self):
        """(T, H, W) of the clip's latents."""
        return self.clip.latents(self.model.vae)

    @property
    def text(self):
        """What the table calls it."""
        clip = self.clip
        return f"{self.model.preset}, {clip.frames}x{clip.height}x{clip.width}, {self.dtype}"

    def network(self, name, config=None):
        """A network with random weights; config: by default that of the model."""
        config = config or getattr(self.model, name)
        return random_network(name, dataclasses.replace(config, dtype=self.dtype))

    def animecolor(self):
        """Denoiser, LCG and HCE together."""
        return AnimeColor(*map(self.network, ("denoiser", "lcg", "hce")))

    def plain(self):
        """A plain CogVideoX: the denoiser without a sketch, LCG and HCE."""
        return AnimeColor(self.network("denoiser", self.model.lcg))

    def normal(self, seed, *shape):
        """Standard normal array."""
        return benchmarks.normal(seed, *shape).astype(self.dtype)


TINY = preset("tiny")
SIZES = {
    "2b": Size(
        model=preset("animecolor-2b"), clip=Clip(49, 480, 720), attention=CLIP_2B,
        train={name: shape for name, shape in benchmarks_train.SHAPES.items() if name.startswith("2b")},
    ),
    "tiny": Size(
        model=TINY, clip=Clip(9, 96, 160), attention=AttentionSize(64, 2, 8, "bfloat16"),
        train={"tiny": Shape("tiny, 5x32x48", TINY, (2, 4, 6), "bfloat16")},
        steps=4, loop_steps=2, repeats=2, torch_backend="aot_eager", row_seconds=15, step_cache=1e3,
    ),
}  # fmt: skip
