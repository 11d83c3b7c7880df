"""Rules for denoiser and LCG, and their config.json (diffusers' CogVideoXTransformer3DModel)."""

from animecolor_jax.config import TransformerConfig
from animecolor_jax.convert.rules import Rule
from animecolor_jax.errors import InputError


def pair(torch, ours, kernel="linear"):
    return [Rule(f"{torch}.weight", f"{ours}/kernel", kernel), Rule(f"{torch}.bias", f"{ours}/bias")]


def norm(torch, ours):
    return [Rule(f"{torch}.weight", f"{ours}/scale"), Rule(f"{torch}.bias", f"{ours}/bias")]


_BLOCK = "transformer_blocks.{layer}"

RULES = [
    *pair("patch_embed.proj", "patch_embed", "conv"),
    *pair("patch_embed.text_proj", "text_embed"),
    *pair("time_embedding.linear_1", "time_embed/up"),
    *pair("time_embedding.linear_2", "time_embed/out"),
    *pair(f"{_BLOCK}.norm1.linear", "blocks/norm1/linear"),
    *norm(f"{_BLOCK}.norm1.norm", "blocks/norm1/norm"),
    *norm(f"{_BLOCK}.attn1.norm_q", "blocks/attn/q_norm"),
    *norm(f"{_BLOCK}.attn1.norm_k", "blocks/attn/k_norm"),
    *pair(f"{_BLOCK}.attn1.to_q", "blocks/attn/q"),
    *pair(f"{_BLOCK}.attn1.to_k", "blocks/attn/k"),
    *pair(f"{_BLOCK}.attn1.to_v", "blocks/attn/v"),
    *pair(f"{_BLOCK}.attn1.to_out.0", "blocks/attn/out"),
    *pair(f"{_BLOCK}.norm2.linear", "blocks/norm2/linear"),
    *norm(f"{_BLOCK}.norm2.norm", "blocks/norm2/norm"),
    *pair(f"{_BLOCK}.ff.net.0.proj", "blocks/ff/up"),
    *pair(f"{_BLOCK}.ff.net.2", "blocks/ff/down"),
    *norm("norm_final", "norm_final"),
    *pair("norm_out.linear", "modulation_out"),
    *norm("norm_out.norm", "norm_out"),
    *pair("proj_out", "out"),
]

# our field: (key of config.json, the class's default)
FIELDS = {
    "num_layers": ("num_layers", 30),
    "num_heads": ("num_attention_heads", 30),
    "head_dim": ("attention_head_dim", 64),
    "in_channels": ("in_channels", 16),
    "out_channels": ("out_channels", 16),
    "patch_size": ("patch_size", 2),
    "time_embed_dim": ("time_embed_dim", 512),
    "text_dim": ("text_embed_dim", 4096),
    "text_length": ("max_text_seq_length", 226),
    "sample_height": ("sample_height", 60),
    "sample_width": ("sample_width", 90),
    "sample_frames": ("sample_frames", 49),
    "temporal_compression": ("temporal_compression_ratio", 4),
    "spatial_interpolation_scale": ("spatial_interpolation_scale", 1.875),
    "temporal_interpolation_scale": ("temporal_interpolation_scale", 1.0),
    "rope": ("use_rotary_positional_embeddings", False),
    "attention_bias": ("attention_bias", True),
    "norm_eps": ("norm_eps", 1e-5),
}

# what a config may say beside these fields, and the only values of it that we compute
FIXED = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "use_learned_positional_embeddings": False,
    "patch_size_t": None,
    "patch_bias": True,
    "ofs_embed_dim": None,
}


def config_from_torch(config, shapes, where):
    """The transformer's config from its config.json.

    Args:
        config: the parsed config.json; keys that are not there have the class's defaults.
        shapes: {torch key: shape} of the checkpoint (not needed here, the config says it all).
        where: the file, for errors.

    Raises:
        InputError: a value that this implementation does not compute.
    """
    for key, only in FIXED.items():
        if config.get(key, only) != only:
            raise InputError(
                f"{key} is {config[key]!r}", where=where, expected=f"{key} = {only!r}",
                fix="this variant of CogVideoX is not supported",
            )
    values = {}
    for field, (key, default) in FIELDS.items():
        value = config.get(key, default)
        wanted = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in wanted:
            raise InputError(
                f"{key} is {value!r}", where=where, expected=f"a {type(default).__name__}",
                fix="correct the value in that file",
            )
        values[field] = float(value) if isinstance(default, float) else value
    return TransformerConfig(**values)


def config_to_torch(config):
    """config.json of diffusers' CogVideoXTransformer3DModel."""
    values = {key: getattr(config, field) for field, (key, _) in FIELDS.items()}
    fixed = {key: value for key, value in FIXED.items() if value is not None and key != "patch_bias"}
    return {"_class_name": "CogVideoXTransformer3DModel", "dropout": 0.0, **values, **fixed}
