"""T5 v1.1 encoder: the text encoder of CogVideoX.

Source: T5 (arXiv:1910.10683); transformers models/t5/modeling_t5.py. Letters: B batch, L tokens, D model
width, N heads, H head size.

Matrix products are in the compute dtype (`nnx.Linear` casts its input); everything between them, the residual
stream included, is float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from animecolor_jax.models.layers import linear, promote, stack


def relative_position_buckets(length, num_buckets, max_distance):
    """Bucket of every (query, key) pair; half of the buckets are for keys after the query.

    Of each half, the first half holds one distance per bucket; the others grow logarithmically up to
    `max_distance`, and the last one takes everything beyond.

    Returns:
        [L, L] int32 NumPy array, a constant under `jit`. In NumPy because a device's own logarithm may put a
        distance on a bucket's edge on the other side; float32 because the reference's is.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(length)
    far = distance[exact:].astype(np.float32)
    fraction = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    logarithmic = exact + (fraction * np.float32(half - exact)).astype(np.int32)
    bucket = np.concatenate([distance[:exact], np.minimum(logarithmic, half - 1)])
    offset = distance[None, :] - distance[:, None]  # key - query
    return (bucket[np.abs(offset)] + np.where(offset > 0, half, 0)).astype(np.int32)


class Embedding(nnx.Module):
    """Table [count, dim], float32 rows out. They are cast after the look-up: the table may be large."""

    def __init__(self, count, dim, *, std, rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (count, dim)))

    def __call__(self, indices):
        return jnp.take(self.embedding[...], indices, axis=0).astype(jnp.float32)


class Attention(nnx.Module):
    """Self-attention with a position bias and without the usual division by sqrt(H)."""

    def __init__(self, config, *, rngs):
        self.config = config
        inner = config.num_heads * config.d_kv
        # T5 scales the initial query kernel instead of the scores
        self.q = nnx.Linear(
            config.d_model, inner, use_bias=False, dtype=jnp.dtype(config.dtype),
            kernel_init=nnx.initializers.normal((config.d_model * config.d_kv) ** -0.5),
            promote_dtype=promote, rngs=rngs,
        )
        self.k = linear(config.d_model, inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.v = linear(config.d_model, inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.out = linear(inner, config.d_model, bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, x, position_bias, mask):
        q, k, v = (
            rearrange(project(x), "b l (n h) -> b l n h", n=self.config.num_heads)
            for project in (self.q, self.k, self.v)
        )
        if mask is not None:
            mask = mask.astype(bool)[:, None, None, :]  # [B, 1, 1, L], over the keys
        out = jax.nn.dot_product_attention(
            q, k, v, bias=position_bias, mask=mask, scale=1.0, implementation="xla"
        )
        return self.out(rearrange(out, "b l n h -> b l (n h)"))


class FeedForward(nnx.Module):
    """Gated GELU (tanh) feed-forward network."""

    def __init__(self, config, *, rngs):
        self.gate = linear(config.d_model, config.d_ff, bias=False, dtype=config.dtype, rngs=rngs)
        self.up = linear(config.d_model, config.d_ff, bias=False, dtype=config.dtype, rngs=rngs)
        self.down = linear(config.d_ff, config.d_model, bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.gate(x).astype(jnp.float32), approximate=True) * self.up(x))


def _rms_norm(config, *, rngs):
    return nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config, *, rngs):
        self.attn_norm = _rms_norm(config, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ff_norm = _rms_norm(config, rngs=rngs)
        self.ff = FeedForward(config, rngs=rngs)

    def __call__(self, x, position_bias, mask=None):
        """x [B, L, D] float32, position_bias [1, N, L, L], mask [B, L] -> [B, L, D] float32."""
        x = x + self.attn(self.attn_norm(x), position_bias, mask)
        return x + self.ff(self.ff_norm(x))


class T5Encoder(nnx.Module):
    """Token ids -> text embeddings."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.token_embed = Embedding(config.vocab_size, config.d_model, std=1.0, rngs=rngs)
        self.relative_bias = Embedding(
            config.relative_attention_num_buckets, config.num_heads, std=config.d_model**-0.5, rngs=rngs
        )
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.final_norm = _rms_norm(config, rngs=rngs)

    def embed(self, ids):
        """ids [B, L] -> [B, L, D] float32; an id outside the vocabulary gives NaN."""
        return self.token_embed(ids)

    def position_bias(self, length):
        """What every block adds to its attention scores, [1, N, L, L] float32."""
        buckets = relative_position_buckets(
            length, self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        )
        return rearrange(self.relative_bias(buckets), "q k n -> 1 n q k")

    def __call__(self, ids, mask=None):
        """Encodes token ids.

        Args:
            ids: [B, L] int32.
            mask: [B, L], zero or False where a token is not attended to. Without it padding takes part, which
                is how CogVideoX was trained and is called.

        Returns:
            [B, L, D] in the compute dtype.
        """
        position_bias = self.position_bias(ids.shape[1])
        x, _ = jax.lax.scan(
            lambda x, block: (block(x, position_bias, mask), None), self.embed(ids), self.blocks
        )
        return self.final_norm(x).astype(self.config.dtype)
