"""Rules for HCE, whose tensors and settings live inside the denoiser's checkpoint."""

import re

from animecolor_jax.config import HCEConfig
from animecolor_jax.convert.rules import Rule
from animecolor_jax.convert.transformer import norm, pair
from animecolor_jax.errors import InputError

_QFORMER, _LAYER = "local_facial_extractor", "local_facial_extractor.layers.{layer}"
_CROSS = "perceiver_cross_attention.{layer}"


def _matrix(torch, ours):
    return Rule(f"{torch}.weight", f"{ours}/kernel", "linear")


RULES = [
    Rule(f"{_QFORMER}.latents", "qformer/latents", "batch1"),
    Rule(f"{_QFORMER}.proj_out", "qformer/proj_out"),
    *pair(f"{_QFORMER}.id_embedding_mapping.0", "qformer/summary_mlp/up"),
    *norm(f"{_QFORMER}.id_embedding_mapping.1", "qformer/summary_mlp/norm"),
    *pair(f"{_QFORMER}.id_embedding_mapping.3", "qformer/summary_mlp/out"),
    *pair(f"{_QFORMER}.id_mapping.0", "qformer/spatial_mlp/up"),
    *norm(f"{_QFORMER}.id_mapping.1", "qformer/spatial_mlp/norm1"),
    *pair(f"{_QFORMER}.id_mapping.3", "qformer/spatial_mlp/mid"),
    *norm(f"{_QFORMER}.id_mapping.4", "qformer/spatial_mlp/norm2"),
    *pair(f"{_QFORMER}.id_mapping.6", "qformer/spatial_mlp/out"),
    *norm(f"{_LAYER}.0.norm1", "qformer/layers/attn/norm1"),
    *norm(f"{_LAYER}.0.norm2", "qformer/layers/attn/norm2"),
    _matrix(f"{_LAYER}.0.to_q", "qformer/layers/attn/q"),
    _matrix(f"{_LAYER}.0.to_kv", "qformer/layers/attn/kv"),
    _matrix(f"{_LAYER}.0.to_out", "qformer/layers/attn/out"),
    *norm(f"{_LAYER}.1.0", "qformer/layers/ff/norm"),
    _matrix(f"{_LAYER}.1.1", "qformer/layers/ff/up"),
    _matrix(f"{_LAYER}.1.3", "qformer/layers/ff/down"),
    *norm(f"{_CROSS}.norm1", "cross_attn/norm1"),
    *norm(f"{_CROSS}.norm2", "cross_attn/norm2"),
    _matrix(f"{_CROSS}.to_q", "cross_attn/q"),
    _matrix(f"{_CROSS}.to_kv", "cross_attn/kv"),
    _matrix(f"{_CROSS}.to_out", "cross_attn/out"),
]


def belongs(torch_key):
    """Whether a key of the denoiser's checkpoint is one of HCE's."""
    return torch_key.startswith((f"{_QFORMER}.", "perceiver_cross_attention."))


def config_from_torch(config, shapes, where):
    """HCE's config: widths from the shapes, the rest from the denoiser's config.json.

    Head counts cannot be read from shapes. The reference hard-codes 16 heads for the cross-attentions and
    takes `LFE_heads` for the Q-Former, default 12; `hce` may give other widths under the names of the
    fixtures (`dim_head`, `cross_heads`).

    Args:
        shapes: {torch key: shape}, HCE's keys among them.

    Raises:
        InputError: a key from which a size is read is missing, or sizes contradict each other.
    """

    def shape(key, axis):
        if key not in shapes:
            raise InputError(
                f"{key} is missing", where=where, expected="all of HCE's tensors or none",
                fix="check that no shard of the checkpoint is missing",
            )
        return shapes[key][axis]

    sizes = config.get("hce", {})
    interval, num_layers = config.get("cross_attn_interval", 2), config.get("num_layers", 30)
    if type(interval) is not int or interval < 1 or num_layers % interval:
        raise InputError(
            f"cross_attn_interval is {interval!r} with {num_layers} layers", where=where,
            expected="an integer that divides num_layers", fix="correct the value in that file",
        )
    heads, cross_heads = config.get("LFE_heads", 12), sizes.get("cross_heads", 16)
    inner = shape(f"{_QFORMER}.layers.0.0.to_q.weight", 0)
    cross_inner = shape("perceiver_cross_attention.0.to_q.weight", 0)
    if inner % heads or cross_inner % cross_heads:
        raise InputError(
            f"{inner} and {cross_inner} channels do not divide by {heads} and {cross_heads} heads",
            where=where, expected="LFE_heads that divides the Q-Former's width",
            fix="set LFE_heads in that file",
        )
    dim = shape(f"{_QFORMER}.latents", 2)
    layers = re.compile(rf"{_QFORMER}\.layers\.(\d+)\.0\.to_q\.weight")
    return HCEConfig(
        model_dim=shape("perceiver_cross_attention.0.to_q.weight", 1),
        num_cross=num_layers // interval,
        interval=interval,
        scale=float(config.get("qformer_scale", 1.0)),
        dim=dim,
        depth=sum(layers.fullmatch(key) is not None for key in shapes),
        num_heads=heads,
        head_dim=inner // heads,
        ff_mult=shape(f"{_QFORMER}.layers.0.1.1.weight", 0) // dim,
        num_tokens=shape(f"{_QFORMER}.latents", 1),
        feature_dim=shape(f"{_QFORMER}.id_mapping.0.weight", 1),
        summary_dim=shape(f"{_QFORMER}.id_embedding_mapping.0.weight", 1),
        output_dim=shape(f"{_QFORMER}.proj_out", 1),
        cross_num_heads=cross_heads,
        cross_head_dim=cross_inner // cross_heads,
    )


def config_to_torch(config):
    """What HCE adds to the denoiser's config.json; `hce` holds the sizes that the reference hard-codes."""
    return {
        "is_train_qformer": True,
        "LFE_num_tokens": config.num_tokens,
        "LFE_output_dim": 768,  # accepted and ignored by the reference
        "LFE_heads": config.num_heads,
        "cross_attn_interval": config.interval,
        "qformer_scale": config.scale,
        "hce": {
            "dim": config.dim,
            "depth": config.depth,
            "ff_mult": config.ff_mult,
            "feature_dim": config.feature_dim,
            "summary_dim": config.summary_dim,
            "output_dim": config.output_dim,
            "dim_head": config.head_dim,
            "cross_dim_head": config.cross_head_dim,
            "cross_heads": config.cross_num_heads,
        },
    }
