"""Architecture of every network, as frozen dataclasses, and the presets.

Sizes are given in the network's own units: `sample_height` of the transformer is in latents, that of
the VAE in pixels. `dtype` is the compute dtype; parameters have the dtype of the file they came from.
"""

import dataclasses
import math
from dataclasses import dataclass

from animecolor_jax.errors import InputError

FORMAT_VERSION = 1


def runtime(default):
    """A field that says how a network is run, not what it is: it is not stored with the weights."""
    return dataclasses.field(default=default, metadata={"stored": False})


@dataclass(frozen=True)
class TransformerConfig:
    """The 3D diffusion transformer: denoiser and LCG alike. Source: CogVideoX (arXiv:2408.06072)."""

    num_layers: int = 30
    num_heads: int = 30
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    time_embed_dim: int = 512
    text_dim: int = 4096
    text_length: int = 226
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    temporal_compression: int = 4
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    rope: bool = False
    attention_bias: bool = True
    norm_eps: float = 1e-5
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = runtime("none")  # what the backward pass computes again, see models.layers.remat
    lora_rank: int = runtime(0)  # of low-rank adapters in the attention; 0 for none
    lora_alpha: float = runtime(0.0)  # adapters are scaled by alpha / rank; 0 for alpha = rank

    @property
    def dim(self):
        """Model width D."""
        return self.num_heads * self.head_dim

    @property
    def max_latent_frames(self):
        """Latent frames of the position table; RoPE has no limit."""
        return (self.sample_frames - 1) // self.temporal_compression + 1


@dataclass(frozen=True)
class HCEConfig:
    """High-level Color Extractor: MLPs, Q-Former and cross-attentions (AnimeColor eq. 1-3)."""

    model_dim: int = 1920  # width of the denoiser that the cross-attentions feed
    num_cross: int = 15  # cross-attentions: one after every `interval`-th block
    interval: int = 2
    scale: float = 1.0
    dim: int = 1024
    depth: int = 3
    num_heads: int = 12
    head_dim: int = 64
    ff_mult: int = 4
    num_tokens: int = 32
    feature_dim: int = 1280
    summary_dim: int = 2560
    output_dim: int = 2048
    cross_num_heads: int = 16
    cross_head_dim: int = 128
    dtype: str = "float32"


@dataclass(frozen=True)
class VAEConfig:
    """Causal 3D VAE. Chunk lengths belong to the model: GroupNorm sees one chunk at a time."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    encode_chunk: int = 4  # frames; diffusers' class has 8
    decode_chunk: int = 2  # latent frames
    dtype: str = "float32"

    @property
    def spatial_compression(self):
        """Pixels per latent along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    norm_eps: float = 1e-6
    dtype: str = "float32"


@dataclass(frozen=True)
class RadioConfig:
    """RADIO vision transformer with a cropped position embedding (CPE)."""

    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    patch_size: int = 16
    mlp_ratio: float = 4.0
    table_size: int = 128  # the position table is table_size x table_size patches
    num_prefix_tokens: int = 16  # class tokens and registers
    num_summary_tokens: int = 2  # class tokens that make the summary
    mlp_norm: bool = False
    align_corners: bool = True  # resize of the position table: True as in nvidia/RADIO, False since June 2025
    norm_eps: float = 1e-6
    dtype: str = "float32"


@dataclass(frozen=True)
class SchedulerConfig:
    """Noise schedule shared by all samplers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = True
    snr_shift_scale: float = 3.0  # only the `-cog` samplers use it


@dataclass(frozen=True)
class AnimeColorConfig:
    """Everything a weights directory holds; a component that is not there is None."""

    preset: str = "custom"
    denoiser: TransformerConfig | None = None
    lcg: TransformerConfig | None = None
    hce: HCEConfig | None = None
    vae: VAEConfig | None = None
    text_encoder: T5Config | None = None
    image_encoder: RadioConfig | None = None
    scheduler: SchedulerConfig | None = None


CONFIG_CLASSES = {
    "denoiser": TransformerConfig,
    "lcg": TransformerConfig,
    "hce": HCEConfig,
    "vae": VAEConfig,
    "text_encoder": T5Config,
    "image_encoder": RadioConfig,
    "scheduler": SchedulerConfig,
}
COMPONENTS = tuple(name for name in CONFIG_CLASSES if name != "scheduler")


def config_to_dict(config):
    """Any of the configs above as a JSON-ready dict, without runtime fields."""
    values = dataclasses.asdict(config)
    return {field.name: values[field.name] for field in _stored(config)}


def _stored(cls):
    return [field for field in dataclasses.fields(cls) if field.metadata.get("stored", True)]


def config_from_dict(cls, values, where):
    """Builds `cls` from a JSON dict.

    Raises:
        InputError: a field is unknown or missing from `values`, or has another type.
    """
    fields = {field.name: field for field in _stored(cls)}
    unknown, missing = sorted(set(values) - set(fields)), sorted(set(fields) - set(values))
    if unknown or missing:
        raise InputError(
            f"fields of {cls.__name__} do not fit: unknown {unknown}, missing {missing}",
            where=where,
            expected=f"exactly {sorted(fields)}",
            fix="convert the checkpoint again with this version (tools/convert_torch.py)",
        )
    built = {}
    for name, field in fields.items():
        value, default = values[name], field.default
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
                raise _wrong_type(where, name, value, "a list of integers")
            value = tuple(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
            raise _wrong_type(where, name, value, f"a finite {type(default).__name__}")
        built[name] = value
    return cls(**built)


def _wrong_type(where, name, value, expected):
    return InputError(
        f"{name} is {value!r}", where=where, expected=expected, fix="correct the value in that file"
    )


def _animecolor(preset, denoiser, **components):
    hce = components.pop("hce", HCEConfig())
    hce = dataclasses.replace(hce, model_dim=denoiser.dim, num_cross=denoiser.num_layers // hce.interval)
    lcg = dataclasses.replace(denoiser, in_channels=denoiser.out_channels)
    return AnimeColorConfig(preset=preset, denoiser=denoiser, lcg=lcg, hce=hce, **components)


def _mini(name, size, frames, vae_widths, norm_num_groups):
    """A small but complete model, trained by tools/train_mini.py for clips of `size` pixels and `frames`."""
    height, width = size
    vae = VAEConfig(
        block_out_channels=vae_widths,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=norm_num_groups,
        sample_height=height,
        sample_width=width,
    )
    denoiser = TransformerConfig(
        num_layers=6,
        num_heads=6,
        head_dim=32,
        in_channels=2 * vae.latent_channels,
        out_channels=vae.latent_channels,
        patch_size=2,
        time_embed_dim=64,
        text_dim=64,
        text_length=64,
        sample_height=height // vae.spatial_compression,
        sample_width=width // vae.spatial_compression,
        sample_frames=frames,
        spatial_interpolation_scale=1.0,
    )
    return _animecolor(
        name,
        denoiser,
        hce=HCEConfig(
            dim=96,
            depth=2,
            num_heads=4,
            head_dim=24,
            num_tokens=16,
            feature_dim=96,
            summary_dim=192,
            output_dim=96,
            cross_num_heads=6,
            cross_head_dim=32,
        ),
        vae=vae,
        text_encoder=T5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        image_encoder=RadioConfig(embed_dim=96, depth=3, num_heads=3, table_size=10, num_prefix_tokens=4),
        scheduler=SchedulerConfig(),
    )


def preset(name):
    """The named architecture, an `AnimeColorConfig` with all six networks.

    Raises:
        InputError: no preset has that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}", where="preset", expected=f"one of {sorted(PRESETS)}")
    return PRESETS[name]


PRESETS = {
    "animecolor-2b": _animecolor(
        "animecolor-2b",
        TransformerConfig(in_channels=32),
        vae=VAEConfig(),
        text_encoder=T5Config(),
        image_encoder=RadioConfig(),
        scheduler=SchedulerConfig(),
    ),
    "animecolor-5b": _animecolor(
        "animecolor-5b",
        TransformerConfig(num_layers=42, num_heads=48, in_channels=32, rope=True),
        vae=VAEConfig(scaling_factor=0.7),
        text_encoder=T5Config(),
        image_encoder=RadioConfig(),
        scheduler=SchedulerConfig(snr_shift_scale=1.0),
    ),
    # 8 heads, so that every mesh axis can divide; everything else as small as the structure allows
    "tiny": _animecolor(
        "tiny",
        TransformerConfig(
            num_layers=4,
            num_heads=8,
            head_dim=8,
            in_channels=8,
            out_channels=4,
            time_embed_dim=32,
            text_dim=32,
            text_length=192,
            sample_height=12,
            sample_width=20,
        ),
        hce=HCEConfig(
            dim=32,
            num_heads=4,
            head_dim=8,
            num_tokens=8,
            feature_dim=32,
            summary_dim=64,
            output_dim=48,
            cross_num_heads=4,
            cross_head_dim=8,
        ),
        vae=VAEConfig(
            block_out_channels=(8, 16, 16, 32),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=96,
            sample_width=160,
        ),
        text_encoder=T5Config(
            vocab_size=384,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
        ),
        image_encoder=RadioConfig(
            embed_dim=32,
            depth=2,
            num_heads=4,
            table_size=8,
            num_prefix_tokens=8,
        ),
        scheduler=SchedulerConfig(),
    ),
    "mini": _mini("mini", (96, 160), 17, (24, 48, 64), norm_num_groups=8),
    "mini-cpu": _mini("mini-cpu", (64, 96), 9, (8, 32, 64), norm_num_groups=4),
}
