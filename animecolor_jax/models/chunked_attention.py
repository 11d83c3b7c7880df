"""Softmax attention in plain XLA, whose memory is linear in tokens, forward and backward.

No more than QUERY_CHUNK rows of scores exist at a time; the backward pass computes them again from the
logarithms of their sums, as FlashAttention-2 (arXiv:2307.08691) does.

Inside, queries are [G, c, C, H] and keys [G, K, H]: G heads of all clips, c equal chunks of C queries.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from animecolor_jax.platforms import platform

QUERY_CHUNK = 1024
SAVED = "attention"  # name of what `layers.remat` can keep


@jax.custom_vjp
def chunked_attention(q, k, v):
    """[B, S, N, H], [B, K, N, H] twice -> [B, S, N, H]; see `attention.attention`."""
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    # queries are scaled, not scores, of which there are more: on a CPU 12 % of the backward pass
    chunks, keys, values = _chunks(q * q.shape[-1] ** -0.5), _heads(k), _heads(v)

    def one_chunk(q, k, v):  # [..., C, H], [..., K, H]
        scores = _product("...ch,...kh->...ck", q, k)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = _product("...ck,...kh->...ch", weights.astype(v.dtype), v) / total
        return out.astype(v.dtype), (largest + jnp.log(total))[..., 0]

    if _one_head_at_a_time():
        one_head = lambda qkv: jax.lax.map(lambda q: one_chunk(q, *qkv[1:]), qkv[0])  # noqa: E731
        out, logsum = jax.lax.map(one_head, (chunks, keys, values))
    else:
        out, logsum = jax.lax.map(lambda q: one_chunk(q, keys, values), chunks.swapaxes(0, 1))
        out, logsum = out.swapaxes(0, 1), logsum.swapaxes(0, 1)
    out = checkpoint_name(_unchunk(out, q.shape), SAVED)
    return out, (q, k, v, out, checkpoint_name(logsum, SAVED))


def _backward(residuals, out_bar):
    q, k, v, out, logsum = residuals
    scale = q.shape[-1] ** -0.5
    keys, values = _heads(k), _heads(v)
    delta = _chunks((out_bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True))
    rows = (_chunks(q * scale), _chunks(out_bar), logsum, delta[..., 0])

    def one_chunk(bars, rows, k, v):
        q, out_bar, logsum, delta = rows  # [..., C, H] twice, [..., C] twice
        # keys are the rows, [..., K, C]: of the three products below only one has to turn its large operand
        weights = jnp.exp(_product("...kh,...ch->...kc", k, q) - logsum[..., None, :])
        weights_bar = _product("...kh,...ch->...kc", v, out_bar)
        scores_bar = (weights * (weights_bar - delta[..., None, :])).astype(k.dtype)
        k_bar = bars[0] + _product("...kc,...ch->...kh", scores_bar, q)
        v_bar = bars[1] + _product("...kc,...ch->...kh", weights.astype(v.dtype), out_bar)
        return (k_bar, v_bar), (_product("...kc,...kh->...ch", scores_bar, k) * scale).astype(q.dtype)

    def all_chunks(rows, k, v):
        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        return jax.lax.scan(lambda bars, rows: one_chunk(bars, rows, k, v), zeros, rows)

    if _one_head_at_a_time():
        (k_bar, v_bar), q_bar = jax.lax.map(lambda xs: all_chunks(*xs), (rows, keys, values))
    else:
        (k_bar, v_bar), q_bar = all_chunks(tuple(x.swapaxes(0, 1) for x in rows), keys, values)
        q_bar = q_bar.swapaxes(0, 1)
    k_bar, v_bar = (_unheads(bar.astype(x.dtype), x.shape) for bar, x in ((k_bar, k), (v_bar, v)))
    return _unchunk(q_bar, q.shape), k_bar, v_bar


chunked_attention.defvjp(_forward, _backward)


def _one_head_at_a_time():
    """On a CPU its scores then stay in the cache (measured 4x on 2,048 tokens)."""
    return platform() == "cpu"


def _product(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _heads(x):  # [B, K, N, H] -> [G, K, H]
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _unheads(x, shape):  # [G, K, H] -> [B, K, N, H]
    batch, length, heads, size = shape
    return x.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


def _chunks(x):  # [B, S, N, H] -> [G, c, C, H]; rows beyond S are zero, and change nothing
    length = x.shape[1]
    count = -(-length // QUERY_CHUNK)
    chunk = min(-(-length // (8 * count)) * 8, length)  # no longer than need be: padding is computed as well
    x = _heads(jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0))))
    return x.reshape(len(x), count, chunk, x.shape[-1])


def _unchunk(x, shape):  # [G, c, C, H] -> [B, S, N, H]
    batch, length, heads, size = shape
    x = x.reshape(batch, heads, -1, size)[:, :, :length]
    return x.transpose(0, 2, 1, 3)
