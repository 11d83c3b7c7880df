"""What a training run is: one frozen dataclass, written out in a file of `configs/`.

Everything said about parameters is said in rules over their names, `COMPONENT/NAME` such as
`denoiser/blocks/attn/q/kernel`: pairs (regex, value), the first full match wins, and a name without a match
is an error. Source of the numbers: AnimeColor (arXiv:2507.20158) section 4.1; what the paper leaves out
follows the training scripts of CogVideoX-Fun (aigc-apps/VideoX-Fun).
"""

from dataclasses import dataclass, field

from animecolor_jax.errors import InputError
from animecolor_jax.models.attention import BACKENDS
from data_pipeline.dataset import DataConfig

CONDITIONS = ("text", "sketch", "hce", "lcg")
REMAT = ("none", "products", "branches", "attention", "block")  # the first keeps most
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "came")
DTYPES = ("float32", "bfloat16")


def require(holds, value, where, expected, fix=""):
    """Raises InputError unless `holds`."""
    if not holds:
        raise InputError(f"{value!r}", where=where, expected=expected, fix=fix)


@dataclass(frozen=True)
class StageConfig:
    """One of the method's training stages."""

    name: str
    """What the stage is called in logs and in the provenance of the weights it makes."""
    trained: tuple[tuple[str, bool], ...]
    """Rules over parameter names: which are trained. The others are frozen, and cost neither gradients nor
    optimiser state."""
    conditions: tuple[str, ...]
    """What the denoiser is shown besides the noisy clip: some of text, sketch, hce, lcg."""
    start: tuple[tuple[str, str], ...] = ((".*", "init"),)
    """Rules over the names of networks (denoiser, lcg, hce): where their weights come from. "init": from
    --init; "denoiser": a copy of the denoiser, without the sketch's input channels (lcg only)."""

    def __post_init__(self):
        require(
            set(self.conditions) <= set(CONDITIONS) and {"text", "sketch"} <= set(self.conditions),
            self.conditions,
            "stage.conditions",
            "text and sketch, which the denoiser always reads, and hce or lcg or both",
        )

    @property
    def networks(self):
        """Names of the networks that the stage runs, frozen or trained."""
        return ("denoiser", *(name for name in ("lcg", "hce") if name in self.conditions))


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: str = "adamw"
    """adamw, or came, which keeps a factored second moment and so less memory."""
    learning_rate: float = 2e-5
    schedule: str = "constant"
    """After the warm-up: constant, or cosine, which falls to `final_fraction` at the last step."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Of cosine: what is left of the learning rate at the end."""
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    """Of came: decay of the confidence."""
    eps: float = 1e-10
    """Of adamw."""
    came_eps: tuple[float, float] = (1e-30, 1e-16)
    """Of came: added to squared gradients, and to squared residuals."""
    came_clip: float = 1.0
    """Of came: root mean square that no parameter's update exceeds."""
    weight_decay: float = 3e-2
    decayed: tuple[tuple[str, bool], ...] = ((r".*/(kernel|proj_out|lora_[ab])", True), (r".*", False))
    """Rules over parameter names: which of the trained ones have weight decay."""
    clip_norm: float = 0.05
    """Gradients are scaled down to this global norm of all that is trained; 0 turns it off."""
    accumulate: int = 1
    """Parts into which a batch is divided, one after the other; the update is that of the whole batch."""
    ema: float = 0.0
    """Decay of a moving average of the trained parameters, which is then what is validated and exported;
    0 turns it off."""

    def __post_init__(self):
        require(self.name in OPTIMIZERS, self.name, "optimizer.name", f"one of {', '.join(OPTIMIZERS)}")
        require(
            self.schedule in SCHEDULES, self.schedule, "optimizer.schedule", f"one of {', '.join(SCHEDULES)}"
        )
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "eps", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), value, f"optimizer.{name}", "0 or more")
        for name in ("beta1", "beta2", "beta3", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, value, f"optimizer.{name}", "0 or more, less than 1")
        # Where a gradient is 0, as in an HCE that starts without effect, the update would be 0 / 0.
        require(self.eps > 0, self.eps, "optimizer.eps", "more than 0")
        require(min(self.came_eps) > 0, self.came_eps, "optimizer.came_eps", "two numbers above 0")
        require(self.came_clip > 0, self.came_clip, "optimizer.came_clip", "more than 0")
        require(self.accumulate >= 1, self.accumulate, "optimizer.accumulate", "1 or more")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the denoiser's attention (arXiv:2106.09685), trained in place of what the stage
    says."""

    rank: int = 0
    """0 turns them off."""
    alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0 means alpha = rank."""

    def __post_init__(self):
        require(self.rank >= 0, self.rank, "lora.rank", "0 (off) or more")
        require(0 <= self.alpha < float("inf"), self.alpha, "lora.alpha", "0 (the rank) or more")


@dataclass(frozen=True)
class ComputeConfig:
    """Devices and precision. Trained parameters and their moments are always float32."""

    dtype: str = "bfloat16"
    """Of the networks' arithmetic; norms, softmax and the loss are float32."""
    frozen_dtype: str = "bfloat16"
    """In which frozen parameters, and VAE, text and image encoder, are kept."""
    remat: str = "block"
    """What the backward pass computes again: none; products (all but what attention and linear layers give);
    branches (all but attention's results, and what attention and feed-forward add to the tokens); attention
    (all but attention's results); block (everything within a block, for the least memory)."""
    attention: str = "auto"
    """Backend of `models.attention`."""
    mesh: str = ""
    """Devices, such as fsdp=8 or data=2,fsdp=4,context=2; empty: fsdp over all."""
    memory_gib: float = 0.0
    """Memory of a device that a step may take by estimate; 0 asks the device."""

    def __post_init__(self):
        for name in ("dtype", "frozen_dtype"):
            value = getattr(self, name)
            require(value in DTYPES, value, f"compute.{name}", f"one of {', '.join(DTYPES)}")
        require(
            self.attention in BACKENDS, self.attention, "compute.attention", f"one of {', '.join(BACKENDS)}"
        )
        require(self.remat in REMAT, self.remat, "compute.remat", f"one of {', '.join(REMAT)}")
        require(self.memory_gib >= 0, self.memory_gib, "compute.memory_gib", "0 (ask the device) or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to resume from."""

    every: int = 500
    """Steps between checkpoints; one is also made at the end and when the run is told to stop."""
    keep: int = 3
    """Newest checkpoints that stay."""
    keep_every: int = 10_000
    """Checkpoints at multiples of this stay for ever; 0 keeps none."""

    def __post_init__(self):
        require(self.every >= 1, self.every, "checkpoint.every", "1 step or more")
        require(self.keep >= 1, self.keep, "checkpoint.keep", "1 or more")
        require(self.keep_every >= 0, self.keep_every, "checkpoint.keep_every", "0 or more")


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at while training: always the same clips, timesteps and noise."""

    every: int = 500
    """Steps between validation losses; 0 turns them off."""
    clips: int = 16
    """First clips of the split that the loss is taken of."""
    timesteps: int = 4
    """Timesteps of each clip, spread evenly over the schedule."""
    videos_every: int = 2000
    """Steps between validation videos; 0 turns them off."""
    videos: int = 2
    """Clips that are coloured, the first of the split."""
    sampler_steps: int = 25
    guidance: float = 6.0
    split: str = "test"
    seed: int = 0

    def __post_init__(self):
        for name in ("every", "videos_every"):
            require(getattr(self, name) >= 0, getattr(self, name), f"validation.{name}", "0 (off) or more")
        for name in ("clips", "timesteps", "videos", "sampler_steps"):
            require(getattr(self, name) >= 1, getattr(self, name), f"validation.{name}", "1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    stage: StageConfig
    steps: int
    """Updates to make."""
    seed: int = 0
    """Decides timesteps and noise, and fresh parameters; `data.seed` decides the batches."""
    data: DataConfig = field(default_factory=DataConfig)
    precomputed: tuple[str, ...] = ("latents", "text", "image")
    """What is taken from precomputed records, as far as the stage needs it (tools/prepare_data.py
    --precompute); the rest is encoded on the devices, batch by batch. Empty: train from the clips."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log_every: int = 10
    """Steps between lines of the log; the loss of every step is in it."""

    def __post_init__(self):
        require(self.steps >= 1, self.steps, "steps", "1 or more")
        require(self.log_every >= 1, self.log_every, "log_every", "1 or more")
        known = ("latents", "text", "image")
        require(
            set(self.precomputed) <= set(known),
            self.precomputed,
            "precomputed",
            f"some of {', '.join(known)}",
        )
        parts = self.optimizer.accumulate
        require(
            self.data.batch_size % parts == 0,
            self.data.batch_size,
            "data.batch_size",
            f"a multiple of optimizer.accumulate, {parts}",
        )
