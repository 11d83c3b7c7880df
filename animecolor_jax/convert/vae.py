"""Rules for the VAE, and its config.json (AutoencoderKLCogVideoX of diffusers and of AnimeColor)."""

import dataclasses

from animecolor_jax.config import VAEConfig, config_from_dict
from animecolor_jax.convert.transformer import norm, pair
from animecolor_jax.errors import InputError


def _conv(torch, ours):
    return pair(torch, ours, "conv")


def _spatial_norm(torch, ours):
    return [
        *norm(f"{torch}.norm_layer", f"{ours}/norm"),
        *_conv(f"{torch}.conv_y.conv", f"{ours}/conv_y"),
        *_conv(f"{torch}.conv_b.conv", f"{ours}/conv_b"),
    ]


def _resnets(torch, ours, norm):
    torch, ours = f"{torch}.resnets.{{j}}", f"{ours}/resnet_{{j}}"
    return [
        *norm(f"{torch}.norm1", f"{ours}/norm1"),
        *_conv(f"{torch}.conv1.conv", f"{ours}/conv1"),
        *norm(f"{torch}.norm2", f"{ours}/norm2"),
        *_conv(f"{torch}.conv2.conv", f"{ours}/conv2"),
        *_conv(f"{torch}.conv_shortcut", f"{ours}/conv_shortcut"),
    ]


RULES = [
    *_conv("encoder.conv_in.conv", "encoder/conv_in"),
    *_resnets("encoder.down_blocks.{i}", "encoder/down_{i}", norm),
    *_conv("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder/down_{i}/downsample"),
    *_resnets("encoder.mid_block", "encoder/mid", norm),
    *norm("encoder.norm_out", "encoder/norm_out"),
    *_conv("encoder.conv_out.conv", "encoder/conv_out"),
    *_conv("decoder.conv_in.conv", "decoder/conv_in"),
    *_resnets("decoder.mid_block", "decoder/mid", _spatial_norm),
    *_resnets("decoder.up_blocks.{i}", "decoder/up_{i}", _spatial_norm),
    *_conv("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder/up_{i}/upsample"),
    *_spatial_norm("decoder.norm_out", "decoder/norm_out"),
    *_conv("decoder.conv_out.conv", "decoder/conv_out"),
]

# our field: key of config.json. The class's defaults are ours. Chunk lengths are no part of it: the encoder's
# is AnimeColor's 4 frames also where diffusers wrote the file, whose own class would take 8.
FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "block_out_channels": "block_out_channels",
    "latent_channels": "latent_channels",
    "layers_per_block": "layers_per_block",
    "norm_eps": "norm_eps",
    "norm_num_groups": "norm_num_groups",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "scaling_factor": "scaling_factor",
    "temporal_compression": "temporal_compression_ratio",
}

# what a config may say beside these fields, and the only values of it that we compute
FIXED = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "pad_mode": "first",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "invert_scale_latents": False,
}
BLOCK_TYPES = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}


def config_from_torch(config, shapes, where):
    """The VAE's config from its config.json.

    Args:
        config: the parsed config.json; keys that are not there have the class's defaults.
        shapes: {torch key: shape} of the checkpoint (not needed here, the config says it all).
        where: the file, for errors.

    Raises:
        InputError: a value of the wrong type, or one that this implementation does not compute.
    """

    def require(condition, key, expected):
        if not condition:
            raise InputError(
                f"{key} is {config.get(key, 'not given')!r}", where=where, expected=expected,
                fix="this variant of the CogVideoX VAE is not supported",
            )

    for key, only in FIXED.items():
        require(config.get(key, only) == only, key, f"{key} = {only!r}")

    values = {field: config[key] for field, key in FIELDS.items() if key in config}
    ratio = values.pop("temporal_compression", 4)  # diffusers declares it a float
    result = config_from_dict(VAEConfig, dataclasses.asdict(VAEConfig()) | values, where)
    for field, value in values.items():
        numbers = value if field == "block_out_channels" else [value]
        require(all(number > 0 for number in numbers), FIELDS[field], "positive numbers")

    widths, groups = result.block_out_channels, result.norm_num_groups
    divisible = len(widths) > 1 and all(width % groups == 0 for width in widths)
    require(divisible, "block_out_channels", f"two or more multiples of norm_num_groups = {groups}")
    for key, kind in BLOCK_TYPES.items():
        kinds = [kind] * len(widths)
        require(list(config.get(key, kinds)) == kinds, key, f"{kinds}, one for each of block_out_channels")
    powers = [2**level for level in range(len(widths))]  # no resampling follows the last level
    require(ratio in powers, "temporal_compression_ratio", f"one of {powers}")
    return dataclasses.replace(result, temporal_compression=int(ratio))


def config_to_torch(config):
    """config.json of diffusers' AutoencoderKLCogVideoX."""
    values = {key: getattr(config, field) for field, key in FIELDS.items()}
    fixed = {key: value for key, value in FIXED.items() if key != "pad_mode"}  # a constant of the class
    blocks = {key: [kind] * len(config.block_out_channels) for key, kind in BLOCK_TYPES.items()}
    return {**fixed, **values, "block_out_channels": list(config.block_out_channels), **blocks}
