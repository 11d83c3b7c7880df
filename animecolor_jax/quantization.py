"""Inference with the matrices of the blocks in int8: half of what they take in bfloat16.

A matrix becomes a `qwix.QArray`, its values and a float32 scale for each output channel. That is a pytree, so
it is placed, offloaded, copied and scanned over as an array is. Layers dequantise it when they are called
(`layers.promote`), so that of a stack only one block is ever whole.

Of qwix only the arrays are used: its `quantize_model` quantises, within a scan, copies of the blocks, and
leaves the stacks as they are.
"""

import importlib.util

import jax
import jax.numpy as jnp

from animecolor_jax import sharding
from animecolor_jax.errors import InputError
from animecolor_jax.params import first_match

MODES = (None, "int8")

# Whether a parameter is quantised, by NETWORK/NAME: the kernels [depth, in, out] of stacks. Those outside are
# few, take in or give out what the stacks work on, and embed the timestep in float32 on purpose.
RULES = [
    (r"(denoiser|lcg|text_encoder|image_encoder)/blocks/.*/kernel", True),
    (r"hce/(qformer/layers|cross_attn)/.*/kernel", True),
    (r".*", False),
]


def check_mode(mode):
    """Raises InputError unless `mode` is one of `MODES`, and what it needs is installed."""
    if mode not in MODES:
        raise InputError(
            f"{mode!r}", where="--quantize", expected="int8", fix="leave it out to keep the dtype"
        )
    if mode is not None and importlib.util.find_spec("qwix") is None:
        raise InputError(
            "qwix is not installed", where="--quantize", expected="the Python package qwix",
            fix="pip install qwix",
        )  # fmt: skip


def is_quantized(mode, component, name):
    """Whether a parameter is, with `mode` one of `MODES`."""
    return mode is not None and first_match(RULES, f"{component}/{name}")


def quantize(kernel, name, mesh=None):
    """A kernel [depth, in, out] on the devices -> `qwix.QArray`; `mesh` and `name` as of
    `sharding.parameter_sharding`."""
    placed = None
    if mesh is not None:
        placed = jax.tree.map(
            lambda x: sharding.parameter_sharding(name, x.shape, mesh), jax.eval_shape(_quantize, kernel)
        )
    return jax.jit(_quantize, out_shardings=placed)(kernel)


def describe(component, name, leaf, dtype, mode):
    """What a parameter becomes: `leaf`, a ShapeDtypeStruct, in `dtype` if it is floating, or a `qwix.QArray`
    of two."""
    if is_quantized(mode, component, name):
        return jax.eval_shape(_quantize, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def _quantize(kernel):
    import qwix  # not above: it is an extra

    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
