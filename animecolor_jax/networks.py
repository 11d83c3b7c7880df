"""The six networks by the names they have everywhere: files, flags, configs and parameter names."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax import params, quantization, sharding
from animecolor_jax.models.hce import HCE
from animecolor_jax.models.radio import Radio
from animecolor_jax.models.t5 import T5Encoder
from animecolor_jax.models.transformer import Transformer
from animecolor_jax.models.vae import VAE

NETWORKS = {
    "denoiser": Transformer,
    "lcg": Transformer,
    "hce": HCE,
    "vae": VAE,
    "text_encoder": T5Encoder,
    "image_encoder": Radio,
}

STACKED = r"(blocks|qformer/layers|cross_attn)/.*"


def _normal(std):
    return lambda rng, shape, _: std * rng.standard_normal(shape, np.float32)


def _by_fan_in(rng, shape, stacked):
    fan_in = math.prod(shape[1:-1] if stacked else shape[:-1])
    return rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)


def _filled(value):
    return lambda rng, shape, _: np.full(shape, value, np.float32)


# How parameters start, by name; the first full match wins. Made on the host: compiling the
# initialisers of a VAE
# takes a minute on a small computer, drawing its numbers a moment.
INITIAL = [
    (r"cross_attn/out/kernel|.*/lora_b", _filled(0)),  # a fresh HCE changes nothing until it is trained
    (r".*/scale|input_conditioner/std", _filled(1)),
    (r".*/bias|input_conditioner/mean", _filled(0)),
    (r"summary_indices", lambda rng, shape, _: np.arange(*shape, dtype=np.int32)),
    (r".*embedding|.*latents|prefix_tokens|position_table", _normal(0.02)),
    (r".*/(kernel|proj_out|lora_a)", _by_fan_in),
]


def creator(component, config):
    """Function of nothing that builds the component with that config, for `params.abstract` and
    `params.build`."""
    return lambda: NETWORKS[component](config, rngs=nnx.Rngs(0))


def abstract(component, config):
    """{name: ShapeDtypeStruct} of the component's parameters and buffers."""
    return params.abstract(creator(component, config))[1]


@functools.cache
def described(component, config, dtype=None, mesh=None, quantize=None):
    """{name: ShapeDtypeStruct} of the component's parameters and buffers as they lie on devices; one dict for
    all who ask the same, so leave it as it is.

    Args:
        dtype: of floating ones; default: the config's.
        mesh: on which the one rule table places them; None for one device.
        quantize: one of `quantization.MODES`; what is quantised is a `qwix.QArray` of two.
    """

    def placed(name, array):
        where = None if mesh is None else sharding.parameter_sharding(name, array.shape, mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    dtype = dtype or config.dtype
    return {
        name: jax.tree.map(
            functools.partial(placed, name), quantization.describe(component, name, leaf, dtype, quantize)
        )
        for name, leaf in abstract(component, config).items()
    }


def initial_leaves(component, config, seed, only=".*"):
    """Yields (name, float32 array) of a newly initialised network, one leaf at a time: those whose names
    match the regex `only`."""
    for number, (name, leaf) in enumerate(sorted(abstract(component, config).items())):
        if not re.fullmatch(only, name):
            continue
        draw = next(draw for pattern, draw in INITIAL if re.fullmatch(pattern, name))
        rng = np.random.default_rng([seed, number])
        yield name, draw(rng, leaf.shape, re.fullmatch(STACKED, name) is not None)


def fresh(component, config, seed):
    """A newly initialised network, float32; the same seed gives the same network."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in initial_leaves(component, config, seed)}
    return params.build(creator(component, config), leaves, what=component)


def random_leaf(name, description, key, dtype):
    """A leaf of a network like the description, made on the device in `dtype` but for indices: for measuring.

    Activations keep their scale from block to block. name: within the network.
    """
    shape = description.shape
    if not jnp.issubdtype(description.dtype, jnp.floating):
        return jnp.arange(math.prod(shape), dtype=description.dtype).reshape(shape)
    if re.fullmatch(r"(.*/)?(scale|std|bias|mean)", name):
        return jnp.full(shape, float(name.endswith(("scale", "std"))), dtype)
    if re.fullmatch(STACKED, name):  # layer by layer: random bits take more memory than what is made of them
        layer = jax.ShapeDtypeStruct(shape[1:], description.dtype)
        return jax.lax.map(lambda each: random_leaf("", layer, each, dtype), jax.random.split(key, shape[0]))
    return math.prod(shape[:-1]) ** -0.5 * jax.random.normal(key, shape, dtype)


def random_network(component, config, seed=0):
    """A network of random weights in `config.dtype`, made on the device by one program: for measuring."""
    shapes = abstract(component, config)

    @jax.jit
    def make(key):
        keys = jax.random.split(key, len(shapes))
        named = zip(sorted(shapes.items()), keys, strict=True)
        return {name: random_leaf(name, shape, each, config.dtype) for (name, shape), each in named}

    # this generator compiles several times faster than the default, for hundreds of leaves
    return params.build(creator(component, config), make(jax.random.key(seed, impl="rbg")), what=component)
