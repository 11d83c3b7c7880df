"""Small pieces that several networks share."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from animecolor_jax.models.chunked_attention import SAVED

# names of what `remat` can keep
BRANCH = "branch"  # what a branch adds to the tokens
PRODUCT = "product"  # what a branch's other linear layers give


class Buffer(nnx.Variable):
    """An array that belongs to a checkpoint but is never trained (RADIO's input statistics)."""


def stack(create, depth, *, rngs):
    """`depth` modules as one: every parameter gains a leading [depth] axis."""
    return jax.vmap(lambda key: create(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def unstack(stacked, index):
    """Module number `index` of a stack (or of any pytree with leading axes)."""
    return jax.tree.map(lambda x: x[index], stacked)


class LoraLinear(nnx.Linear):
    """Linear layer with a low-rank adapter beside it: y = W x + b + alpha / rank (x A) B.

    The adapter is a path of its own: added to a kernel in bfloat16 it would be rounded away.
    Source: LoRA (arXiv:2106.09685) section 4.1.
    """

    def __init__(self, in_dim, out_dim, *, rank, alpha, rngs, **kwargs):
        super().__init__(in_dim, out_dim, rngs=rngs, **kwargs)
        self.scale = (alpha or rank) / rank
        self.lora_a = nnx.Param(jax.random.normal(rngs.params(), (in_dim, rank)) * in_dim**-0.5)
        self.lora_b = nnx.Param(jnp.zeros((rank, out_dim)))

    def __call__(self, x):
        down, up = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        return super().__call__(x) + (x @ down) @ up * self.scale


def remat(body, policy):
    """`body` of a scan, of whose values the backward pass keeps what `policy` says and computes the rest
    again.

    Args:
        policy: "none" keeps all; "block" only what came into the body; "attention" also the results of
            attention; "branches" also what attention and feed-forward add to the tokens, without which their
            gates' gradients would need the last product of each once more; "products" also the results of
            their other linear layers, so that of a block no product over tokens is computed again (of HCE's
            cross-attention all are).
    """
    if policy == "none":
        return body
    names = {
        "block": [],
        "attention": [SAVED],
        "branches": [SAVED, BRANCH],
        "products": [SAVED, BRANCH, PRODUCT],
    }[policy]
    saved = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(body, policy=saved, prevent_cse=False)


def promote(arrays, dtype=None):
    """How linear layers cast (input, kernel, bias): as Flax does, but a kernel that `quantization` put into
    int8 is dequantised first."""
    return dtypes.promote_dtype(tuple(map(_dequantized, arrays)), dtype=dtype)


def _dequantized(array):
    if not hasattr(array, "qvalue"):
        return array
    import qwix  # not above: it is an extra

    return qwix.dequantize(array)


def linear(in_dim, out_dim, *, dtype, rngs, bias=True, rank=0, alpha=0.0):
    """Linear layer computing in `dtype`; with a `rank`, one with an adapter."""
    kwargs = {"use_bias": bias, "dtype": jnp.dtype(dtype), "promote_dtype": promote, "rngs": rngs}
    if rank:
        return LoraLinear(in_dim, out_dim, rank=rank, alpha=alpha, **kwargs)
    return nnx.Linear(in_dim, out_dim, **kwargs)


def layer_norm(dim, *, eps, dtype, rngs):
    """LayerNorm with torch's numerics: two-pass variance in float32, result in `dtype`."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


def silu(x):
    """SiLU, computed in float32: in bfloat16 every intermediate would be rounded."""
    return nnx.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x, *, approximate):
    """GELU, exact or by tanh, computed in float32."""
    return nnx.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)
