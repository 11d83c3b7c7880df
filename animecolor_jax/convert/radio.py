"""Rules for RADIO, and its config.json (`RADIOModel` of the NVlabs/RADIO repository)."""

import math
import re

from animecolor_jax.config import RadioConfig
from animecolor_jax.convert.rules import Rule
from animecolor_jax.convert.transformer import norm, pair
from animecolor_jax.errors import InputError

_CONDITIONER, _PATCHES = "radio_model.input_conditioner", "radio_model.model.patch_generator"
_BLOCK = "radio_model.model.blocks.{layer}"

RULES = [
    Rule(f"{_CONDITIONER}.norm_mean", "input_conditioner/mean", "stat"),
    Rule(f"{_CONDITIONER}.norm_std", "input_conditioner/std", "stat"),
    Rule("radio_model.summary_idxs", "summary_indices", "int"),
    Rule(f"{_PATCHES}.embedder.weight", "patch_embed/kernel", "linear"),
    Rule(f"{_PATCHES}.pos_embed", "position_table", "batch1"),
    Rule(f"{_PATCHES}.cls_token.token", "prefix_tokens"),
    *norm(f"{_BLOCK}.norm1", "blocks/norm1"),
    *pair(f"{_BLOCK}.attn.qkv", "blocks/attn/qkv"),
    *pair(f"{_BLOCK}.attn.proj", "blocks/attn/out"),
    *norm(f"{_BLOCK}.norm2", "blocks/norm2"),
    *pair(f"{_BLOCK}.mlp.fc1", "blocks/mlp/up"),
    *norm(f"{_BLOCK}.mlp.norm", "blocks/mlp/norm"),
    *pair(f"{_BLOCK}.mlp.fc2", "blocks/mlp/down"),
]

# heads of timm's models, of which the names begin like this; giant as the RADIO repository redefines it
NUM_HEADS = {"vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 24}


def config_from_torch(config, shapes, where):
    """RADIO's config: sizes from the shapes, what they do not show from config.json.

    The number of heads is `num_heads`, else it follows from the name of the timm model in `timm_model`,
    `model` or `args.model`. `align_corners` and `norm_eps` are keys of our own exports.

    Args:
        config: the parsed config.json.
        shapes: {torch key: shape} of the checkpoint.
        where: the file, for errors.

    Raises:
        InputError: a tensor from which a size is read is missing or misshapen, or the heads are unknown.
    """

    def shape(key, rank):
        if len(shapes.get(key, ())) != rank:
            raise InputError(
                f"{key} is {tuple(shapes[key])}" if key in shapes else f"{key} is missing",
                where=where, expected=f"a checkpoint of RADIO, where it has {rank} axes",
                fix="check that no shard of the checkpoint is missing",
            )
        return shapes[key]

    def side(key, rank, axis, channels=1):
        """Edge of a square whose area, times `channels`, is that axis."""
        length = shape(key, rank)[axis]
        edge = math.isqrt(length // channels)
        if channels * edge**2 != length:
            raise InputError(
                f"{key} is {tuple(shapes[key])}", where=where,
                expected=f"{channels} times a square number on axis {axis}",
                fix="only square patches and position tables are supported",
            )
        return edge

    patches, first_mlp = f"{_PATCHES}.embedder.weight", f"{_BLOCK.format(layer=0)}.mlp"
    embed_dim = shape(patches, 2)[0]
    num_heads = _num_heads(config, where)
    if embed_dim % num_heads:
        raise InputError(
            f"{embed_dim} channels do not divide by {num_heads} heads", where=where,
            expected="num_heads that divides the width", fix="set num_heads in that file",
        )
    blocks = {match[1] for key in shapes if (match := re.match(r"radio_model\.model\.blocks\.(\d+)\.", key))}
    return RadioConfig(
        embed_dim=embed_dim,
        depth=len(blocks),
        num_heads=num_heads,
        patch_size=side(patches, 2, axis=1, channels=3),
        mlp_ratio=shape(f"{first_mlp}.fc1.weight", 2)[0] / embed_dim,
        table_size=side(f"{_PATCHES}.pos_embed", 3, axis=1),
        num_prefix_tokens=shape(f"{_PATCHES}.cls_token.token", 2)[0],
        num_summary_tokens=shape("radio_model.summary_idxs", 1)[0],
        mlp_norm=f"{first_mlp}.norm.weight" in shapes,
        align_corners=_typed(config, "align_corners", RadioConfig.align_corners, where),
        norm_eps=_typed(config, "norm_eps", RadioConfig.norm_eps, where),
    )


def _num_heads(config, where):
    if "num_heads" in config:
        return _typed(config, "num_heads", 1, where)
    args = config.get("args") or {}
    names = [config.get("timm_model"), config.get("model"), args.get("model")]
    names = [name for name in names if isinstance(name, str)]
    for name in names:
        for prefix, num_heads in NUM_HEADS.items():
            if name.startswith(prefix):
                return num_heads
    raise InputError(
        f"the number of attention heads is unknown (timm models: {names})", where=where,
        expected=f"num_heads, or the name of a timm model that begins with one of {sorted(NUM_HEADS)}",
        fix='add "num_heads" to that file',
    )


def _typed(config, key, default, where):
    value = config.get(key, default)
    if type(value) is not type(default) or (not isinstance(value, bool) and value <= 0):
        raise InputError(
            f"{key} is {value!r}", where=where, expected=f"a positive {type(default).__name__}",
            fix="correct the value in that file",
        )
    return value


def config_to_torch(config):
    """A config.json for `config_from_torch`, to be read beside the exported shapes.

    No public class builds this module tree from it: `RADIOModel` wants the training arguments of its
    checkpoint, and transformers' own `RadioModel` has other keys and only align_corners=False.
    """
    return {
        "architectures": ["RADIOModel"],
        "num_heads": config.num_heads,
        "align_corners": config.align_corners,
        "norm_eps": config.norm_eps,
    }
