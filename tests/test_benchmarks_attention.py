"""The measure of attention: its PyTorch counterpart computes what ours does, and what it reports."""

import jax
import numpy as np
import pytest

from animecolor_jax import benchmarks_attention, flops
from animecolor_jax.parity import devices

SIZE = benchmarks_attention.Size(33, 2, 8, "float32")


@pytest.mark.torch
def test_pytorch_computes_the_same():
    pytest.importorskip("torch")
    arrays = [jax.random.normal(key, (1, *SIZE[:3])) for key in jax.random.split(jax.random.key(3), 4)]
    theirs = benchmarks_attention.torch_attention(*arrays)
    found = [x.numpy().swapaxes(1, 2) for x in theirs["forward and backward"]()]
    expected = devices._attend(*arrays, "chunked")
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_array_equal(theirs["forward"]().numpy().swapaxes(1, 2), found[0])


def test_every_backend_gets_a_line_for_each_direction():
    lines = benchmarks_attention.attention("none", 1, SIZE)
    names = [f"attention {backend}, forward" for backend in ("chunked", "xla")]
    assert [line["name"] for line in lines] == [x for name in names for x in (name, f"{name} and backward")]
    forward = flops.attention(33, 33, 16) / 1e12
    assert [line["tflop"] for line in lines] == 2 * [forward, 3 * forward]
    assert all(
        line["ours"] > 0 and line["theirs"] is None and line["shape"] == "2 heads x 8, 33 tokens"
        for line in lines
    )
