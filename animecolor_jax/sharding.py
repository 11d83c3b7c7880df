"""Mesh axes and the one rule table that places every parameter.

Axes: `data` replicates, `fsdp` shards parameters, `context` shards video tokens, `tensor` heads and FFN.
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

# Kernels of stacked blocks are [depth, in, out]; the first full match wins.
RULES = [
    (r"blocks/attn/(q|k|v)/kernel|blocks/ff/up/kernel|cross_attn/q/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/attn/out/kernel|blocks/ff/down/kernel|cross_attn/out/kernel", P(None, "tensor", "fsdp")),
    (r"(blocks|qformer/layers|cross_attn)/.*/kernel", P(None, "fsdp", None)),
    (r".*", P()),
]


def make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=None, whole=False):
    """A mesh over the first data x fsdp x context x tensor devices.

    Args:
        whole: whether it must hold all devices, as it must where several hosts share one.

    Raises:
        InputError: more devices asked for than there are, or with `whole` fewer.
    """
    shape = (data, fsdp, context, tensor)
    devices = jax.devices() if devices is None else devices
    size = data * fsdp * context * tensor
    if min(shape) < 1 or size > len(devices) or (whole and size < len(devices)):
        raise InputError(
            f"{dict(zip(AXES, shape, strict=True))} needs {size} devices, there are {len(devices)}",
            where="--mesh",
            expected=f"positive sizes whose product is {'' if whole else 'at most '}the number of devices",
            fix="use fewer, e.g. --mesh data=1",
        )
    return Mesh(_arrange(shape, devices[:size]), AXES, axis_types=(AxisType.Auto,) * 4)


def num_slices(devices):
    """Number of TPU slices, each a fast network; GPUs call every host one, which does not matter."""
    # devices that are only described have no index where there is one slice
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def _arrange(shape, devices):
    """The devices as an array of that shape, along the network's rings; between slices lies only `data`."""
    slices = num_slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise InputError(
            f"data={shape[0]} on {slices} slices", where="--mesh",
            expected=f"data a multiple of {slices}, so that the other axes lie within a slice",
            fix=f"for example --mesh data={slices},fsdp={len(devices) // slices}",
        )  # fmt: skip
    within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def parse_mesh(text):
    """`"data=2,context=4"` -> {"data": 2, "context": 4}; InputError for anything else."""
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(rf"({'|'.join(AXES)})=([1-9]\d*)", part.strip())
        if match is None or match[1] in sizes:
            raise InputError(
                f"{part!r} in {text!r}",
                where="--mesh",
                expected=f"axis=size, axes {', '.join(AXES)}",
                fix="for example --mesh data=2,context=4",
            )
        sizes[match[1]] = int(match[2])
    return sizes


def check_mesh(mesh, configs):
    """Refuses a mesh whose `tensor` axis does not divide the heads; a feed-forward divides where heads do.

    `fsdp` and `context` need no such check: what does not divide is left whole or padded.

    Args:
        configs: {"denoiser", "lcg" or "hce": config} of the networks that run on the mesh.

    Raises:
        InputError: heads of some network do not divide.
    """
    fields = {"denoiser": "num_heads", "lcg": "num_heads", "hce": "cross_num_heads"}
    heads = {f"{name}.{fields[name]}": getattr(config, fields[name]) for name, config in configs.items()}
    size = mesh.shape["tensor"]
    if wrong := {name: count for name, count in heads.items() if count % size}:
        raise InputError(
            f"tensor={size} does not divide {', '.join(f'{n} = {c}' for n, c in wrong.items())}",
            where="--mesh",
            expected=f"tensor to divide heads and feed-forward: a divisor of {math.gcd(*heads.values())}",
            fix="use fsdp or context instead, which divide anything",
        )


def constrain(x, *axes):
    """Lays an activation out over the mesh in use (`jax.set_mesh`); without one it is left alone.

    Args:
        x: [B, ...], the batch over `data` and `fsdp` where it divides.
        axes: for each further dimension a mesh axis or None; trailing ones may be left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    batch = tuple(BATCH_AXES)
    while batch and len(x) % math.prod(mesh.shape[axis] for axis in batch):
        batch = batch[:-1]
    return jax.lax.with_sharding_constraint(x, P(batch or None, *axes))


def share_rows(video, rows):
    """Lays frames [B, T, H, W, C] out over the mesh in use, their H over `context`, if that divides `rows`;
    else they are left alone.

    Args:
        rows: H, or a divisor of it that must divide as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not shares_tokens() or rows % mesh.shape["context"]:
        return video
    return constrain(video, None, "context")


def shares_tokens():
    """Whether the devices of the mesh in use each hold a share of every clip's tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] > 1


def parameter_sharding(name, shape, mesh):
    """Placement of the parameter `name`; an axis that does not divide its dimension is left out."""
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, P(*axes))


def bytes_on_device(tree):
    """Bytes on each device of arrays or ShapeDtypeStructs, whole where they have no sharding; keys are not
    counted."""

    def shape(leaf):
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(
        math.prod(shape(leaf)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
