"""All attention backends compute the same thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax.models import attention as module
from animecolor_jax.models.attention import attention, splash
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
    assert module._choose(jnp.bfloat16) == "chunked"
