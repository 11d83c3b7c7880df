"""Softmax attention behind one function; every backend computes the same thing.

Shapes: queries [B, S, N, H], keys and values [B, K, N, H], result [B, S, N, H].
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

BACKENDS = ("auto", "chunked", "cudnn", "splash", "xla")
QUERY_CHUNK = 1024
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
    if backend == "auto":
        backend = _choose(q.dtype)
    if backend == "chunked":
        return _chunked(q, k, v)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if backend == "splash":
        return splash(q, k, v)
    if backend == "xla":
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    raise ValueError(f"unknown attention backend {backend!r}, expected one of {BACKENDS}")


def _choose(dtype):
    platform = jax.default_backend()
    if platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return "splash"
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "chunked"


def _chunked(q, k, v):
    """Memory linear in tokens: no more than QUERY_CHUNK rows of scores exist at a time.

    On a CPU one head at a time as well: its scores then stay in the cache (measured 4x on 2,048 tokens).
    """
    batch, length, heads, size = q.shape
    scale = size**-0.5
    chunk = min(QUERY_CHUNK, length)
    num_chunks = -(-length // chunk)
    q = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - length), (0, 0), (0, 0)))
    q = q.reshape(batch, num_chunks, chunk, heads, size).transpose(0, 3, 1, 2, 4)  # [B, N, chunks, S, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, N, K, H]

    def one_chunk(q, k, v):  # [..., S, H], [..., K, H]
        scores = jnp.einsum("...sh,...kh->...sk", q, k, preferred_element_type=jnp.float32) * scale
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.einsum("...sk,...kh->...sh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    if jax.default_backend() == "cpu":
        q, k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (q, k, v))
        one_head = lambda qkv: jax.lax.map(lambda q: one_chunk(q, *qkv[1:]), qkv[0])  # noqa: E731
        out = jax.lax.map(one_head, (q, k, v))  # [B N, chunks, S, H]
    else:
        out = jax.lax.map(lambda q: one_chunk(q, k, v), q.transpose(2, 0, 1, 3, 4))  # [chunks, B, N, S, H]
        out = out.transpose(1, 2, 0, 3, 4)
    out = out.reshape(batch, heads, num_chunks * chunk, size)[:, :, :length]
    return out.transpose(0, 2, 1, 3)  # [B, S, N, H]


def splash(q, k, v, *, interpret=False):
    """TPU flash attention (Pallas).

    XLA cannot partition a kernel. Under a mesh (`jax.set_mesh`) every device attends from its share of the
    batch (`data`, `fsdp`), queries (`context`) and heads (`tensor`) to all keys.
    Batch and heads are shared out only where they divide.

    Args:
        interpret: run the kernel's Python on any device (tests).
    """
    attend = partial(_splash_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v)

    def dividing(size, *axes):
        return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    length = q.shape[1]
    batch = dividing(len(q), "data", "fsdp") or dividing(len(q), "data")
    heads = dividing(q.shape[2], "tensor")
    queries, keys = P(batch, "context", heads), P(batch, None, heads)
    q = jnp.pad(q, ((0, 0), (0, -length % mesh.shape["context"]), (0, 0), (0, 0)))
    attend = jax.shard_map(attend, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return attend(q, k, v)[:, :length]


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
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    # products of bfloat16 are exact in float32 anyway, and Mosaic refuses a higher precision for them
    precision = None if q.dtype == jnp.bfloat16 else jax.config.jax_default_matmul_precision
    with jax.default_matmul_precision(precision):
        out = jax.vmap(lambda q, k, v: attend(q, k, v, segment_ids=segments))(q, k, v)
    return out[:, :, :length].transpose(0, 2, 1, 3)
