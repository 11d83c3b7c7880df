"""Mesh axes and the one rule table that places every parameter.

Axes: `data` replicates, `fsdp` shards parameters, `context` shards video tokens, `tensor` heads and FFN.
"""

import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")

# Kernels of stacked blocks are [depth, in, out]; the first full match wins.
RULES = [
    (r"blocks/attn/(q|k|v)/kernel|blocks/ff/up/kernel|cross_attn/q/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/attn/out/kernel|blocks/ff/down/kernel|cross_attn/out/kernel", P(None, "tensor", "fsdp")),
    (r"(blocks|qformer/layers|cross_attn)/.*/kernel", P(None, "fsdp", None)),
    (r".*", P()),
]


def make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=None):
    """A mesh over the first data x fsdp x context x tensor devices.

    Raises:
        InputError: more devices asked for than there are.
    """
    shape = (data, fsdp, context, tensor)
    devices = jax.devices() if devices is None else devices
    size = data * fsdp * context * tensor
    if min(shape) < 1 or size > len(devices):
        raise InputError(
            f"{dict(zip(AXES, shape, strict=True))} needs {size} devices, there are {len(devices)}",
            where="--mesh",
            expected="positive sizes whose product is at most the number of devices",
            fix="use fewer, e.g. --mesh data=1",
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:size])


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


def parameter_sharding(name, shape, mesh):
    """Placement of the parameter `name`; an axis that does not divide its dimension is left out."""
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, P(*axes))
