"""A fixture's weights, through the real converter."""

import math
import zlib

import jax.numpy as jnp
import numpy as np

from animecolor_jax import params
from animecolor_jax.convert import rules
from animecolor_jax.convert.plan import make_plans
from animecolor_jax.networks import creator
from animecolor_jax.safetensors_io import Spec


def group(tensors, prefix):
    """{rest of name: tensor} of the tensors whose names start with `prefix`."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def load_networks(component, config, state_dict, *, dtype="float32", where="fixture", **overrides):
    """Converts a state dict and builds its networks.

    Args:
        component: as in `make_plans`. config: the values of its config.json.
        state_dict: {torch key: array}.
        dtype: parameters and computation. overrides: fields of the config, such as `attention`.

    Returns:
        {component: module}: one, or denoiser and hce.

    Raises:
        InputError: keys are missing, unexpected or misshapen.
    """
    networks = {}
    specs = {key: Spec(value.shape, value.dtype) for key, value in state_dict.items()}
    for plan in make_plans(component, config, specs, where):
        rules.require_match(plan.problems, where=where)
        read = lambda key: state_dict[rules.stored_key(plan.rules, key, state_dict)]  # noqa: E731, B023
        leaves = {name: jnp.asarray(source.load(read)) for name, source in plan.leaves.items()}
        fields = {name: value for name, value in overrides.items() if hasattr(plan.config, name)}
        network = plan.config.__class__(**{**plan.config.__dict__, **fields, "dtype": dtype})
        networks[plan.component] = params.build(
            creator(plan.component, network), leaves, what=where, dtype=dtype
        )
    return networks


def procedural(name, shape, scale=1.0, offset=0.0):
    """Reproducible pseudo-random float32 array that depends on its name and shape only.

    A counter is hashed (SplitMix64) into uniform numbers of mean `offset` and standard deviation `scale`.
    """
    counter = np.arange(math.prod(shape), dtype=np.uint64)
    x = counter + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = (x >> np.uint64(40)).astype(np.float64) / 2.0**24 - 0.5
    return (offset + scale * math.sqrt(12.0) * uniform).astype(np.float32).reshape(shape)


def procedural_weight(name, shape):
    """The weight called `name` in fixtures that store none: scales keep activations near one."""
    if name.endswith(".latents"):
        return procedural(name, shape, 0.7)
    if len(shape) == 1:
        return (
            procedural(name, shape, 0.25, 1.0) if name.endswith(".weight") else procedural(name, shape, 0.15)
        )
    fan_in = shape[0] if name.endswith(".proj_out") else shape[1]
    return procedural(name, shape, fan_in**-0.5)
