"""Softmax attention for TPUs (Pallas) on heads of 64, two of which fill the 128 lanes of a register.

Arrays keep the layout of the projections, [B, S, D] with the heads side by side: nothing is transposed, and
no head is padded to 128. A pair of heads is computed as one head of 128 whose queries appear twice, the other
head's half zero: the products that the matrix unit sees are those of two padded heads, but keys and values
lie in it once for both. Keys and values come from several sources, which are never joined, and whose lengths
need not divide: what lies beyond is masked in a source's last block alone. The backward pass is one kernel,
which makes the scores once for the gradients of queries, keys and values (as FlashAttention-2,
arXiv:2307.08691; JAX's splash attention, in memory that is linear in tokens, makes them twice).

Inside, rows are a block's queries of the pair's first head, then those of the second.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from animecolor_jax.models.chunked_attention import SAVED

HEAD_SIZE = 64
LANES = 2 * HEAD_SIZE
QUERY_BLOCK, KEY_BLOCK = 512, 1024  # of tokens
NEVER = -1e30  # score of what is masked
VMEM_BYTES = 60 * 2**20  # of a chip's fast memory; v5p has 64 MiB, v5e and v6e more
BESIDES = 6 * 2**20  # of it beside the gradient of queries, for each byte of a number
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # have 16 MiB
BY_ROWS, BY_LANES = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # a @ b, and a @ b.T


class Source(NamedTuple):
    """Keys of one source: how many count, tokens of a block, number of blocks, blocks of earlier sources."""

    length: int
    block: int
    count: int
    first: int


def takes(heads, size):
    """Whether heads of that number and size are whole pairs."""
    return size == HEAD_SIZE and heads % 2 == 0


def fits(tokens, heads, size, itemsize, device_kind):
    """Whether the kernels can attend from so many tokens of a clip, with that many heads of that size, in
    numbers of `itemsize` bytes, on such a device."""
    gradient = 4 * LANES * (tokens + QUERY_BLOCK)  # of a pair's queries, float32
    small = device_kind.startswith(TOO_SMALL) or gradient + itemsize * BESIDES > VMEM_BYTES
    return takes(heads, size) and not small


def packed_attention(q, k, v, lengths, interpret=False):
    """softmax(q k^T / 8) v for every head.

    Args:
        q: [B, S, D]. k, v: lists of [B, K_i, D], of which the first `lengths[i]` tokens count, at least one.
        interpret: run the kernels' Python on any device (tests).

    Returns:
        [B, S, D].
    """
    return _attend(q, tuple(k), tuple(v), tuple(lengths), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, k, v, lengths, interpret):
    return _forward(q, k, v, lengths, interpret)[0]


def _forward(q, k, v, lengths, interpret):
    sources, rows = _sources(lengths), _query_block(q.shape[1])
    batch, length, dim = q.shape
    pairs, blocks = dim // LANES, pl.cdiv(length, rows)
    of_queries = pl.BlockSpec((None, rows, LANES), lambda b, p, i, j: (b, i, p))
    of_rows = pl.BlockSpec((None, None, None, 1, 2 * rows), lambda b, p, i, j: (b, p, i, 0, 0))
    of_keys = [_key_spec(source, lambda b, p, i, j: (b, p, j)) for source in sources]
    out, logsum = pl.pallas_call(
        functools.partial(_forward_kernel, sources=sources, length=length),
        grid=(batch, pairs, blocks, sum(source.count for source in sources)),
        in_specs=[of_queries, *of_keys, *of_keys],
        out_specs=[of_queries, of_rows],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, pairs, blocks, 1, 2 * rows), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((2 * rows, LANES), q.dtype),
            *[pltpu.VMEM((2 * rows, LANES), jnp.float32)] * 3,
        ],
        compiler_params=_compiler_params("parallel"),
        interpret=interpret,
        name="packed_attention",
    )(q, *k, *v)
    out, logsum = checkpoint_name(out, SAVED), checkpoint_name(logsum, SAVED)
    return out, (q, k, v, out, logsum)


def _forward_kernel(q_ref, *refs, sources, length):
    keys, values = refs[: len(sources)], refs[len(sources) : 2 * len(sources)]
    out_ref, logsum_ref, q_rows, largest, total, summed = refs[2 * len(sources) :]
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        q_rows[...] = _rows_of(q_ref, i, length, HEAD_SIZE**-0.5)
        largest[...] = jnp.full_like(largest, NEVER)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    def attend(k, v, left):
        scores = _product(q_rows[...], k, BY_LANES)  # [rows, keys]
        if left is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(column < left, scores, NEVER)
        before = largest[...]
        largest[...] = now = jnp.maximum(before, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - jnp.tile(now, (1, scores.shape[1] // LANES)))
        kept = jnp.exp(before - now)
        total[...] = kept * total[...] + weights.sum(-1, keepdims=True)
        summed[...] = kept * summed[...] + _product(weights.astype(v.dtype), v, BY_ROWS)

    for source, k_ref, v_ref in zip(sources, keys, values, strict=True):
        _on_block(source, j, functools.partial(_call_on_keys, attend, k_ref, v_ref))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = _merge(summed[...] / total[...]).astype(out_ref.dtype)
        logsum_ref[...] = (largest[...] + jnp.log(total[...])).T[:1]


def _backward(lengths, interpret, residuals, out_bar):
    q, k, v, out, logsum = residuals
    sources, rows = _sources(lengths), _query_block(q.shape[1])
    batch, length, dim = q.shape
    pairs, blocks = dim // LANES, pl.cdiv(length, rows)
    steps = sum(source.count for source in sources)

    delta = out.astype(jnp.float32) * out_bar.astype(jnp.float32)
    delta = delta.reshape(batch, length, pairs, 2, HEAD_SIZE).sum(-1)
    delta = jnp.pad(delta, ((0, 0), (0, blocks * rows - length), (0, 0), (0, 0)))
    delta = delta.reshape(batch, blocks, rows, pairs, 2).transpose(0, 3, 1, 4, 2).reshape(logsum.shape)

    of_queries = pl.BlockSpec((None, rows, LANES), lambda b, p, j, i: (b, i, p))
    of_rows = pl.BlockSpec((None, None, None, 1, 2 * rows), lambda b, p, j, i: (b, p, i, 0, 0))
    of_keys = [_key_spec(source, lambda b, p, j, i: (b, p, j)) for source in sources]
    # a block of their gradient is ready in the last round, and until then none is left
    of_q_bar = pl.BlockSpec(
        (None, rows, LANES), lambda b, p, j, i: (b, jnp.where(j == steps - 1, i, 0), p)
    )
    largest = max(source.block for source in sources)
    q_bar, *bars = pl.pallas_call(
        functools.partial(_backward_kernel, sources=sources, length=length),
        grid=(batch, pairs, steps, blocks),
        in_specs=[of_queries, of_queries, of_rows, of_rows, *of_keys, *of_keys],
        out_specs=[of_q_bar, *of_keys, *of_keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *k, *v)],
        scratch_shapes=[
            pltpu.VMEM((blocks * rows, LANES), jnp.float32),
            *[pltpu.VMEM((largest, LANES), jnp.float32)] * 2,
        ],
        compiler_params=_compiler_params("arbitrary"),
        interpret=interpret,
        name="packed_attention_backward",
    )(q, out_bar, logsum, delta, *k, *v)
    # blocks without a key that counts were left as they were
    bars = [
        bar if bar.shape[1] == length else _zero_from(bar, length, axis=1)
        for bar, length in zip(bars, 2 * lengths, strict=True)
    ]
    return q_bar, tuple(bars[: len(k)]), tuple(bars[len(k) :])


def _backward_kernel(q_ref, out_bar_ref, logsum_ref, delta_ref, *refs, sources, length):
    count = len(sources)
    keys, values, q_bar_ref = refs[:count], refs[count : 2 * count], refs[2 * count]
    k_bars, v_bars = refs[2 * count + 1 : 3 * count + 1], refs[3 * count + 1 : 4 * count + 1]
    q_sum, k_sum, v_sum = refs[4 * count + 1 :]
    j, i = pl.program_id(2), pl.program_id(3)
    size = q_ref.shape[0]
    here = pl.ds(i * size, size)
    scale = HEAD_SIZE**-0.5

    @pl.when(j == 0)
    def _():
        q_sum[here] = jnp.zeros((size, LANES), jnp.float32)

    @pl.when(i == 0)
    def _():
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    def attend(k, v, left):
        tokens = pl.ds(0, k.shape[0])
        q, out_bar = _rows_of(q_ref, i, length, scale), _rows_of(out_bar_ref, i, length)
        # keys are the rows of the scores: of the five products one alone has to turn its large operand
        weights = jnp.exp(_product(k, q, BY_LANES) - logsum_ref[...])  # [keys, rows]
        if left is not None:  # their score of 0 may be far above all others
            weights = _zero_from(weights, left)
        v_sum[tokens] += _product(weights.astype(out_bar.dtype), out_bar, BY_ROWS)
        scores_bar = weights * (_product(v, out_bar, BY_LANES) - delta_ref[...])
        scores_bar = scores_bar.astype(q.dtype)
        k_sum[tokens] += _product(scores_bar, q, BY_ROWS)
        q_sum[here] += _merge(_product(scores_bar.T, k, BY_ROWS))

    def leave(k_bar_ref, v_bar_ref):
        k_bar_ref[...] = k_sum[: k_bar_ref.shape[0]].astype(k_bar_ref.dtype)
        v_bar_ref[...] = v_sum[: v_bar_ref.shape[0]].astype(v_bar_ref.dtype)

    last = i == pl.num_programs(3) - 1
    for source, k_ref, v_ref, *bars in zip(sources, keys, values, k_bars, v_bars, strict=True):
        _on_block(source, j, functools.partial(_call_on_keys, attend, k_ref, v_ref))
        mine = (j >= source.first) & (j < source.first + source.count)
        pl.when(last & mine)(functools.partial(leave, *bars))

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        q_bar_ref[...] = (q_sum[here] * scale).astype(q_bar_ref.dtype)


_attend.defvjp(_forward, _backward)


def _sources(lengths):
    found, first = [], 0
    for length in lengths:
        block = min(KEY_BLOCK, pl.cdiv(length, LANES) * LANES)
        found.append(Source(length, block, pl.cdiv(length, block), first))
        first += found[-1].count
    return found


def _query_block(length):
    return min(QUERY_BLOCK, pl.cdiv(length, LANES) * LANES)


def _key_spec(source, position):
    """Blocks of a source's keys; outside its turn the nearest one, so that nothing is fetched or left twice.

    Args:
        position: grid indices -> (b, p, j).
    """

    def index(*indices):
        b, p, j = position(*indices)
        return b, jnp.clip(j - source.first, 0, source.count - 1), p

    return pl.BlockSpec((None, source.block, LANES), index)


def _compiler_params(third):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", third, "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def _on_block(source, j, call):
    """Calls `call(left)` when it is the turn of one of the source's blocks, of which `left` keys count, None
    for all."""
    whole = source.length // source.block
    if whole:
        pl.when((j >= source.first) & (j < source.first + whole))(lambda: call(None))
    if whole < source.count:
        left = source.length - whole * source.block
        pl.when(j == source.first + whole)(lambda: call(left))


def _call_on_keys(attend, k_ref, v_ref, left):
    if left is None:
        attend(k_ref[...], v_ref[...], None)
    else:  # beyond the end may lie anything, NaN as well
        some = pl.ds(0, pl.cdiv(left, LANES) * LANES)
        attend(_zero_from(k_ref[some], left), _zero_from(v_ref[some], left), left)


def _rows_of(ref, i, length, scale=1.0):
    """[tokens, both heads] of block i -> rows; tokens beyond `length` are zero."""
    x = ref[...] if scale == 1.0 else ref[...] * jnp.asarray(scale, ref.dtype)
    if length % len(x):
        x = _zero_from(x, length - i * len(x))
    first = _first_head(x)
    return jnp.concatenate([jnp.where(first, x, 0), jnp.where(first, 0, x)])


def _merge(rows):
    """Rows [2 tokens, LANES] -> [tokens, both heads]."""
    half = len(rows) // 2
    return jnp.where(_first_head(rows[:half]), rows[:half], rows[half:])


def _first_head(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HEAD_SIZE


def _zero_from(x, index, axis=0):
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < index, x, 0)


def _product(a, b, dimensions):
    # products of bfloat16 are exact in float32 anyway, and Mosaic refuses a higher precision for them
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)
