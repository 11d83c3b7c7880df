"""All attention backends compute the same thing."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax.models import attention as module
from animecolor_jax.models import packed_attention
from animecolor_jax.models.attention import attention, joint_attention, packed, splash
from animecolor_jax.platforms import traced_for
from animecolor_jax.sharding import make_mesh


def softmax_attention(q, k, v):
    """Float64, straight from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bsnh,bknh->bnsk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnsk,bknh->bsnh", weights / weights.sum(-1, keepdims=True), v)


def make(lengths, *, batch=2, heads=3, size=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        2 * jax.random.normal(key, (batch, length, heads, size), dtype)
        for key, length in zip(keys, (lengths[0], lengths[1], lengths[1]), strict=True)
    ]


@pytest.mark.parametrize("lengths", [(7, 7), (1, 40), (1030, 130), (2050, 515)])
@pytest.mark.parametrize("backend", ["chunked", "xla"])
def test_backends_equal_the_definition(lengths, backend):
    q, k, v = make(lengths)
    ours = jax.jit(attention, static_argnames="backend")(q, k, v, backend=backend)
    np.testing.assert_allclose(ours, softmax_attention(q, k, v), atol=2e-5)


@pytest.mark.parametrize("lengths", [(7, 9), (8, 9), (7, 10), (8, 10)])
def test_lengths_padded_for_cudnn_change_neither_result_nor_gradients(lengths):
    q, k, v = make(lengths)

    def loss(attend, *arrays):
        return jnp.sum(jnp.sin(attend(*arrays)))

    plain, padded = (
        jax.jit(jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2)))
        for attend in (module._dot_product("xla"), module._even("xla"))
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (padded(q, k, v), plain(q, k, v))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("lengths", [(130, 200), (700, 600)])
def test_splash_equals_the_definition_with_padding(lengths):
    q, k, v = make(lengths, batch=1, heads=2, size=64)
    np.testing.assert_allclose(splash(q, k, v, interpret=True), softmax_attention(q, k, v), atol=2e-5)


@pytest.mark.parametrize(
    "axes", [{"data": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "context": 4}, {"data": 4, "tensor": 2}]
)
def test_splash_on_a_mesh_equals_one_device(axes):
    q, k, v = make((301, 200), heads=2)  # 301 queries divide by no axis, a batch of 2 not by data=4

    def loss(q, k, v):
        out = splash(q, k, v, interpret=True)
        return jnp.sum(jnp.sin(out)), out

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(value_and_grad)(q, k, v)
    with jax.set_mesh(make_mesh(**axes)):
        (_, sharded), sharded_gradients = jax.jit(value_and_grad)(q, k, v)
    np.testing.assert_allclose(sharded, out, atol=1e-6)
    for a, b in zip(sharded_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


SMALL_BLOCKS = {"QUERY_BLOCK": 128, "KEY_BLOCK": 128}
SOURCES = {  # lengths of queries and of keys: the bank, text and video of a clip, whole blocks, single tokens
    "ragged": ([10, 150], [60, 10, 300]),
    "whole": ([128], [128, 256]),
    "tiny": ([1], [1, 3]),
}


def make_sources(name, *, batch=1, heads=2, dtype=jnp.float32):
    key = iter(jax.random.split(jax.random.key(1), 16))
    queries, keys = SOURCES[name]
    return tuple(
        [2 * jax.random.normal(next(key), (batch, length, heads, 64), dtype) for length in lengths]
        for lengths in (queries, keys, keys)
    )


def results_and_gradients(attend, q, k, v):
    """Of `joint_attention`'s kind, leaves of one tree."""

    def loss(q, k, v):
        out = attend(q, k, v)
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.tree.leaves((out, gradients))


@pytest.mark.parametrize("name", SOURCES)
def test_packed_equals_xla_on_sources_of_any_length_forward_and_backward(monkeypatch, name):
    for constant, size in SMALL_BLOCKS.items():
        monkeypatch.setattr(packed_attention, constant, size)
    arrays = make_sources(name)
    ours = results_and_gradients(functools.partial(packed, interpret=True), *arrays)
    theirs = results_and_gradients(functools.partial(joint_attention, backend="xla"), *arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 4}, {"context": 2, "tensor": 2}])
def test_packed_on_a_mesh_equals_one_device(monkeypatch, axes):
    """No length divides by `context`: what is gathered ends in tokens that do not count."""
    for constant, size in SMALL_BLOCKS.items():
        monkeypatch.setattr(packed_attention, constant, size)
    arrays, attend = make_sources("ragged", batch=2, heads=4), functools.partial(packed, interpret=True)
    alone = results_and_gradients(attend, *arrays)
    with jax.set_mesh(make_mesh(**axes)):
        shared = results_and_gradients(attend, *arrays)
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_keys_that_do_not_count_stay_out_of_gradients_however_low_the_scores_are():
    """A key beyond the end has a score of 0, here 3,200 above the others'."""
    q, k = [20 * jnp.ones((1, 16, 2, 64))], [-20 * jnp.ones((1, 100, 2, 64))]
    v = [jax.random.normal(jax.random.key(5), k[0].shape)]
    ours = results_and_gradients(functools.partial(packed, interpret=True), q, k, v)
    theirs = results_and_gradients(functools.partial(joint_attention, backend="xla"), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_packed_in_bfloat16_is_as_exact_as_xla():
    arrays = make_sources("ragged", dtype=jnp.bfloat16)
    exact = results_and_gradients(
        functools.partial(joint_attention, backend="xla"),
        *jax.tree.map(lambda x: x.astype(jnp.float32), arrays),
    )
    ours, theirs = (
        [np.sqrt(np.square(np.asarray(a, np.float32) - b).mean()) for a, b in zip(found, exact, strict=True)]
        for found in (
            results_and_gradients(functools.partial(packed, interpret=True), *arrays),
            results_and_gradients(functools.partial(joint_attention, backend="xla"), *arrays),
        )
    )
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(("heads", "size"), [(3, 64), (4, 32)])
def test_packed_refuses_heads_that_are_no_pairs_of_64(heads, size):
    x = [jnp.ones((1, 8, heads, size))]
    with pytest.raises(ValueError, match=f"{heads} heads of {size}.*even number of 64"):
        packed(x, x, x, interpret=True)


@pytest.mark.parametrize(
    ("kind", "tokens", "heads", "backend"),
    [
        ("TPU v5 lite", 17_776, 30, "packed"),
        ("TPU v5 lite", 17_776, 15, "splash"),  # no pairs
        ("TPU v5 lite", 200_000, 30, "splash"),  # the gradient of queries does not fit the chip's memory
        ("TPU v4", 17_776, 30, "splash"),
    ],
)
def test_on_tpus_packed_is_taken_where_it_fits(kind, tokens, heads, backend):
    x = jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.bfloat16)
    with traced_for("tpu", kind):
        assert module.choose([x]) == backend


def test_heads_of_a_mesh_are_counted_on_each_device():
    x = jax.ShapeDtypeStruct((2, 1000, 30, 64), jnp.bfloat16)
    with traced_for("tpu", "TPU v5 lite"):
        with jax.set_mesh(make_mesh(context=4, tensor=2)):
            assert module.choose([x]) == "splash"  # 15 heads each
        with jax.set_mesh(make_mesh(fsdp=2, context=4)):
            assert module.choose([x]) == "packed"


def test_splash_never_asks_a_higher_precision_of_bfloat16():
    """The TPU's compiler refuses it ("Bad lhs type"); no other device notices."""

    def asks(dtype):
        with jax.default_matmul_precision("highest"):
            return "HIGHEST" in str(jax.make_jaxpr(splash)(*make((130, 200), size=64, dtype=dtype)))

    assert asks(jnp.float32) and not asks(jnp.bfloat16)


def test_gradients_of_chunked_equal_those_of_xla():
    q, k, v = make((530, 70), batch=1, heads=2)

    def loss(backend):
        return lambda *qkv: jnp.sum(jnp.sin(attention(*qkv, backend)))

    ours, theirs = (
        jax.jit(jax.grad(loss(backend), argnums=(0, 1, 2)))(q, k, v) for backend in ("chunked", "xla")
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    q, k, v = make((64, 2000), dtype=jnp.bfloat16)
    error = np.asarray(attention(q, k, v, "chunked"), np.float64) - softmax_attention(q, k, v)
    assert np.sqrt(np.mean(error**2)) < 3e-3 * np.sqrt(np.mean(softmax_attention(q, k, v) ** 2)) + 1e-3


def test_large_scores_do_not_overflow():
    q, k, v = make((9, 9))
    assert jnp.isfinite(attention(100 * q, 100 * k, v, "chunked")).all()


def test_chunked_memory_is_linear_in_tokens():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        compiled = jax.jit(lambda q, k, v: attention(q, k, v, "chunked")).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.5 * temporary_bytes(4096)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'flash'.*expected one of"):
        attention(*make((4, 4)), backend="flash")


def test_auto_is_chunked_on_cpu():
    assert module.choose([jnp.ones((1, 2, 2, 64), jnp.bfloat16)]) == "chunked"


@pytest.mark.parametrize(
    ("capability", "backend"),
    [("7.5", "chunked"), ("8.0", "cudnn"), ("12.0", "cudnn"), ("gfx942", "chunked")],
)
def test_gpus_that_have_no_fused_attention_do_without(monkeypatch, capability, backend):
    x = jnp.ones((1, 2, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert module.choose([x]) == backend
