"""Softmax attention behind one function; every backend computes the same thing.

Shapes: queries [B, S, N, H], keys and values [B, K, N, H], result [B, S, N, H].
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from animecolor_jax.models.chunked_attention import SAVED, chunked_attention
from animecolor_jax.platforms import platform

BACKENDS = ("auto", "chunked", "cudnn", "splash", "xla")
SPLASH_BLOCK = 512


def attention(q, k, v, backend="auto"):
    """softmax(q k^T / sqrt(H)) v, with the softmax in float32.

    Args:
        q: [B, S, N, H]; k, v: [B, K, N, H], all of one dtype.
        backend: one of `BACKENDS`; "auto" takes cudnn on NVIDIA in half precision, splash on TPU, else
        chunked.

    Raises:
        ValueError: unknown backend, or one that the device or dtype does not have.
    """
    return joint_attention([q], [k], [v], backend)[0]


def joint_attention(q, k, v, backend="auto"):
    """`attention` from several sequences to several, as if they were joined.

    Args:
        q: list of [B, S_i, N, H]; k, v: lists of [B, K_i, N, H].

    Returns:
        list of [B, S_i, N, H].
    """
    if backend == "auto":
        backend = _choose(q[0].dtype)
    if backend not in _ATTEND:
        raise ValueError(f"unknown attention backend {backend!r}, expected one of {BACKENDS}")
    return over_mesh(_ATTEND[backend], q, k, v)


def _choose(dtype):
    device = platform()
    if device == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return "splash"
    if device == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "chunked"


def over_mesh(attend, q, k, v):
    """`attend(q, k, v)` of joined sequences, shared out over the mesh in use (`jax.set_mesh`): XLA cannot
    partition a kernel.

    Every device holds its share of the batch (`data`, `fsdp`), of the heads (`tensor`) and of every sequence
    (`context`), and gathers the keys and values of the others. Batch and heads are shared out only where they
    divide; sequences, each for itself, are padded to what does.

    Args:
        attend: function of q, k, v of one device, [B, S, N, H] each.
        q, k, v: lists as of `joint_attention`.
    """
    lengths, key_lengths = ([x.shape[1] for x in xs] for xs in (q, k))

    def on_one_device(q, k, v):
        out = attend(*(jnp.concatenate(xs, axis=1) for xs in (q, k, v)))
        return jnp.split(out, np.cumsum([x.shape[1] for x in q])[:-1], axis=1)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return on_one_device(q, k, v)

    def dividing(size, *axes):
        return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % mesh.shape["context"]), (0, 0), (0, 0)))

    def gathered(xs):
        if mesh.shape["context"] == 1:
            return xs
        whole = [jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in xs]
        return [x[:, :length] for x, length in zip(whole, key_lengths, strict=True)]

    batch, heads = q[0].shape[0], q[0].shape[2]
    batch_axes = dividing(batch, "data", "fsdp") or dividing(batch, "data")
    attend_to_all = jax.shard_map(
        lambda q, k, v: on_one_device(q, gathered(k), gathered(v)),
        in_specs=P(batch_axes, "context", dividing(heads, "tensor")),
        out_specs=P(batch_axes, "context", dividing(heads, "tensor")),
        check_vma=False,
    )
    out = attend_to_all(*jax.tree.map(padded, (q, k, v)))
    return [x[:, :length] for x, length in zip(out, lengths, strict=True)]


def splash(q, k, v, *, interpret=False):
    """TPU flash attention (Pallas).

    Args:
        interpret: run the kernel's Python on any device (tests).
    """
    return over_mesh(partial(_splash_on_one_device, interpret=interpret), [q], [k], [v])[0]


def _splash_on_one_device(q, k, v, *, interpret):
    """Lengths are padded to the block; padded keys lie in another segment."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, keys, heads, size = q.shape[1], k.shape[1], q.shape[2], q.shape[3]

    def prepare(x, block):  # [B, L, N, H] -> [B, N, L', H]
        padding = -x.shape[1] % block
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    block = SPLASH_BLOCK if max(length, keys) > SPLASH_BLOCK else 128
    q, k, v = prepare(q * size**-0.5, block), prepare(k, block), prepare(v, block)
    segments = kernel.SegmentIds(
        q=(jnp.arange(q.shape[2]) >= length).astype(jnp.int32),
        kv=(jnp.arange(k.shape[2]) >= keys).astype(jnp.int32),
    )
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    attend = kernel.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        residual_checkpoint_name=SAVED,
    )  # fmt: skip
    # products of bfloat16 are exact in float32 anyway, and Mosaic refuses a higher precision for them
    precision = None if q.dtype == jnp.bfloat16 else jax.config.jax_default_matmul_precision
    with jax.default_matmul_precision(precision):
        out = jax.vmap(lambda q, k, v: attend(q, k, v, segment_ids=segments))(q, k, v)
    return out[:, :, :length].transpose(0, 2, 1, 3)


def _dot_product(implementation):
    def attend(q, k, v):
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v, implementation=implementation), SAVED)

    return attend


def _even(implementation):
    """`_dot_product` with lengths padded to even ones: cuDNN has no gradient of odd ones."""

    def attend(q, k, v):
        length, keys = q.shape[1], k.shape[1]
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(len(k), keys, jnp.int32) if keys % 2 else None
        out = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation=implementation
        )
        return checkpoint_name(out[:, :length], SAVED)

    return attend


_ATTEND = {
    "chunked": chunked_attention,
    "cudnn": _even("cudnn"),
    "splash": partial(_splash_on_one_device, interpret=False),
    "xla": _dot_product("xla"),
}
