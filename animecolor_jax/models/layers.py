"""Small pieces that several networks share."""

import jax
import jax.numpy as jnp
from flax import nnx


class Buffer(nnx.Variable):
    """An array that belongs to a checkpoint but is never trained (RADIO's input statistics)."""


def stack(create, depth, *, rngs):
    """`depth` modules as one: every parameter gains a leading [depth] axis."""
    return jax.vmap(lambda key: create(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def unstack(stacked, index):
    """Module number `index` of a stack (or of any pytree with leading axes)."""
    return jax.tree.map(lambda x: x[index], stacked)


def linear(in_dim, out_dim, *, dtype, rngs, bias=True):
    """Linear layer computing in `dtype`."""
    return nnx.Linear(in_dim, out_dim, use_bias=bias, dtype=jnp.dtype(dtype), rngs=rngs)


def layer_norm(dim, *, eps, dtype, rngs):
    """LayerNorm with torch's numerics: two-pass variance in float32, result in `dtype`."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


def silu(x):
    """SiLU, computed in float32: in bfloat16 every intermediate would be rounded."""
    return nnx.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x, *, approximate):
    """GELU, exact or by tanh, computed in float32."""
    return nnx.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)
