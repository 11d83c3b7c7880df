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
from animecolor_jax.platforms import device_kind, has_fused_attention, platform

BACKENDS = ("auto", "chunked", "cudnn", "packed", "splash", "xla")
PLATFORM_OF = {"cudnn": "gpu", "packed": "tpu", "splash": "tpu"}  # those that one kind of device has
SPLASH_BLOCK = 512


def attention(q, k, v, backend="auto"):
    """softmax(q k^T / sqrt(H)) v, with the softmax in float32.

    Args:
        q: [B, S, N, H]; k, v: [B, K, N, H], all of one dtype.
        backend: one of `BACKENDS`; "auto" takes cudnn on NVIDIA from Ampere on in half precision, on TPU
            packed for an even number of heads of 64 and else splash, anywhere else chunked.

    Raises:
        ValueError: unknown backend, or one that the device, dtype or head size does not have.
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
        backend = choose(q)
    if backend not in _ATTEND:
        raise ValueError(f"unknown attention backend {backend!r}, expected one of {BACKENDS}")
    return over_mesh(_ATTEND[backend], q, k, v)


def choose(q):
    """The backend that "auto" takes for queries as of `joint_attention`."""
    device, dtype = platform(), q[0].dtype
    if device == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return "packed" if _fits_packed(q) else "splash"
    if device == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and has_fused_attention():
        return "cudnn"
    return "chunked"


def _fits_packed(q):
    from animecolor_jax.models import packed_attention  # not above: Pallas takes long to import

    tokens, (heads, size), mesh = max(x.shape[1] for x in q), q[0].shape[2:], jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        tokens = -(-tokens // mesh.shape["context"])
        heads //= mesh.shape["tensor"] if _dividing(heads, "tensor") else 1
    return packed_attention.fits(tokens, heads, size, q[0].dtype.itemsize, device_kind())


def over_mesh(attend, q, k, v):
    """`attend` from several sequences to several, shared out over the mesh in use (`jax.set_mesh`): XLA
    cannot partition a kernel.

    Every device holds its share of the batch (`data`, `fsdp`), of the heads (`tensor`) and of every sequence
    (`context`), and gathers the keys and values of the others. Batch and heads are shared out only where they
    divide; sequences, each for itself, are padded to what does.

    Args:
        attend: what one device does: function of q, k, v, lists as of `joint_attention`, and how many tokens
            of each of the keys count -> list.
        q, k, v: lists as of `joint_attention`.
    """
    lengths, key_lengths = ([x.shape[1] for x in xs] for xs in (q, k))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, key_lengths)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % mesh.shape["context"]), (0, 0), (0, 0)))

    def gathered(x):
        if mesh.shape["context"] == 1:
            return x
        # as tokens of [N H], which no device's memory pads
        whole = jax.lax.all_gather(_flat(x), "context", axis=1, tiled=True)
        return whole.reshape(*whole.shape[:2], *x.shape[2:])

    batch = q[0].shape[0]
    batch_axes = _dividing(batch, "data", "fsdp") or _dividing(batch, "data")
    spec = P(batch_axes, "context", _dividing(q[0].shape[2], "tensor"))
    attend_to_all = jax.shard_map(
        lambda q, k, v: attend(q, *jax.tree.map(gathered, (k, v)), key_lengths),
        in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    out = attend_to_all(*jax.tree.map(padded, (q, k, v)))
    return [x[:, :length] for x, length in zip(out, lengths, strict=True)]


def _dividing(size, *axes):
    """The axes of the mesh in use if they divide `size`, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _flat(x):  # [B, S, N, H] -> [B, S, N H]
    return x.reshape(*x.shape[:2], -1)


def _joined(attend):
    """A backend of one sequence as one of several, see `over_mesh`."""

    def attend_joined(q, k, v, lengths):
        k, v = (
            jnp.concatenate([x[:, :length] for x, length in zip(xs, lengths, strict=True)], axis=1)
            for xs in (k, v)
        )
        out = attend(jnp.concatenate(q, axis=1), k, v)
        return jnp.split(out, np.cumsum([x.shape[1] for x in q])[:-1], axis=1)

    return attend_joined


def packed(q, k, v, *, interpret=False):
    """`joint_attention` by our own TPU kernels, see `packed_attention`.

    Args:
        interpret: run the kernels' Python on any device (tests).

    Raises:
        ValueError: heads that are not an even number of size 64 on each device.
    """
    return over_mesh(partial(_packed_on_one_device, interpret=interpret), q, k, v)


def _packed_on_one_device(q, k, v, lengths, *, interpret):
    from animecolor_jax.models import packed_attention

    heads, size = q[0].shape[2:]
    if not packed_attention.takes(heads, size):
        raise ValueError(f"{heads} heads of {size}, attention backend packed takes an even number of 64")
    k, v = (list(map(_flat, xs)) for xs in (k, v))
    return [
        packed_attention.packed_attention(_flat(x), k, v, lengths, interpret).reshape(x.shape) for x in q
    ]


def splash(q, k, v, *, interpret=False):
    """TPU flash attention (Pallas).

    Args:
        interpret: run the kernel's Python on any device (tests).
    """
    return over_mesh(_joined(partial(_splash_on_one_device, interpret=interpret)), [q], [k], [v])[0]


def _splash_on_one_device(q, k, v, *, interpret):
    """Lengths are padded to the block; padded keys lie in another segment."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, keys, heads, size = q.shape[1], k.shape[1], q.shape[2], q.shape[3]

    def prepare(x, block):  # [B, L, N, H] -> [B, N, L', H]
        padding = -x.shape[1] % block
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    block_q, block_kv = (SPLASH_BLOCK if tokens > SPLASH_BLOCK else 128 for tokens in (length, keys))
    q, k, v = prepare(q * size**-0.5, block_q), prepare(k, block_kv), prepare(v, block_kv)
    segments = kernel.SegmentIds(
        q=(jnp.arange(q.shape[2]) >= length).astype(jnp.int32),
        kv=(jnp.arange(k.shape[2]) >= keys).astype(jnp.int32),
    )
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    of_queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q)
    of_keys = dict.fromkeys(
        ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), block_kv
    )
    sizes = kernel.BlockSizes(**of_queries, **of_keys)
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
    "chunked": _joined(chunked_attention),
    "cudnn": _joined(_even("cudnn")),
    "packed": partial(_packed_on_one_device, interpret=False),
    "splash": _joined(partial(_splash_on_one_device, interpret=False)),
    "xla": _joined(_dot_product("xla")),
}
