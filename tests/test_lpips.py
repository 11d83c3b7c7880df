"""LPIPS: parity with the reference, equal images, gradients, sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.layers import max_pool
from animecolor_jax.metrics.lpips import TRUNKS, Lpips, normalize
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.parity.metrics import procedural_lpips

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"


@pytest.fixture(scope="module")
def alex():
    return procedural_lpips("alex", trunk="alexnet", heads="lpips_alex")


@jax.jit
def distance(network, image0, image1):
    return network(image0, image1)


def images(height, width, number=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_every_output_equals_the_reference(net):
    result = check_fixture(FIXTURES / f"lpips_{net}.safetensors")
    assert result.passed, result.worst
    required = {"square/distance", "square/layer_distances", "square/spatial_mean", "odd/spatial_map"}
    assert required <= set(result.errors)


@pytest.mark.parametrize("size", [(31, 31), (64, 64), (67, 91), (80, 128)])
@pytest.mark.parametrize("number", [1, 3])
def test_equal_images_have_a_distance_of_exactly_zero(alex, size, number):
    x = images(*size, number)
    np.testing.assert_array_equal(distance(alex, x, x.copy()), np.zeros(number))


def test_equal_images_have_a_distance_of_exactly_zero_with_all_optimisations():
    """The tests run with few; with all, a product may be fused with a difference and not be rounded."""
    program = (
        "import jax, numpy as np; from animecolor_jax.parity.metrics import procedural_lpips\n"
        "x = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)\n"
        "network = procedural_lpips('alex', trunk='alexnet', heads='lpips_alex')\n"
        "print(np.asarray(jax.jit(lambda m, *pair: m(*pair))(network, x, x.copy())).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert json.loads(done.stdout) == [0, 0]


def test_equal_images_have_a_map_of_exactly_zero(alex):
    x = images(48, 40)
    spatial = jax.jit(lambda network, *pair: network(*pair, spatial=True))
    assert not np.any(spatial(alex, x, x.copy()))


def test_the_distance_is_symmetric_and_that_of_each_pair_alone(alex):
    a, b = images(64, 64), images(64, 64, seed=1)
    both = distance(alex, a, b)
    np.testing.assert_allclose(distance(alex, b, a), both, rtol=1e-5)
    np.testing.assert_allclose(distance(alex, a[1:], b[1:]), both[1:], rtol=1e-5)
    assert (both > 0).all()


def test_bytes_equal_their_values_in_the_unit_range(alex):
    a, b = images(64, 64), images(64, 64, seed=1)
    unit = (np.float32(1) * x / 255 for x in (a, b))
    np.testing.assert_allclose(distance(alex, *unit), distance(alex, a, b), rtol=1e-5)


def test_the_gradient_is_finite_for_equal_images(alex):
    x = jnp.asarray(images(64, 64), jnp.float32) / 255
    gradient = jax.jit(jax.grad(lambda image: distance(alex, image, x).sum()))
    at_equal, at_other = gradient(x), gradient(x * 0.9)
    assert jnp.isfinite(at_equal).all() and jnp.isfinite(at_other).all()
    assert jnp.abs(at_equal).max() <= 1e-5 * jnp.abs(at_other).max()  # equal images are the minimum


def test_the_gradient_is_finite_where_all_features_are_zero(alex):
    network = jax.tree.map(jnp.copy, alex)
    network.conv_0.bias[...] = jnp.full(64, -1e3)
    x, y = jnp.full((1, 64, 64, 3), 0.4), jnp.full((1, 64, 64, 3), 0.6)
    assert not network.features(x)[0].any()
    gradient = jax.jit(jax.value_and_grad(lambda image, other: distance(network, image, other).sum()))
    for other in (x, y):
        value, slope = gradient(x, other)
        assert value == 0 and jnp.isfinite(slope).all()


def test_features_are_divided_by_their_length_and_zeros_stay():
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 8)).astype(np.float32)
    x[0, 0] = 0
    lengths = np.linalg.norm(normalize(x), axis=-1)
    np.testing.assert_allclose(lengths[0, 1:], 1, rtol=1e-6)
    assert not lengths[0, 0].any()
    # the epsilon lies beside the root: 1e-10 / (1e-10 + 1e-10)
    np.testing.assert_allclose(normalize(jnp.full((1, 1, 1, 1), 1e-10)), 0.5, rtol=1e-4)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_smallest_image_is_as_small_as_it_can_be(net):
    smallest = TRUNKS[net].smallest
    network = nnx.eval_shape(lambda: Lpips(net, rngs=nnx.Rngs(0)))
    features = jax.eval_shape(
        lambda m, x: m.features(x), network, jax.ShapeDtypeStruct((1, smallest, 64, 3), np.uint8)
    )
    assert features[-1].shape[1] == 1
    with pytest.raises(InputError, match=f"{smallest - 1}x64.*\n.*at least {smallest} pixels"):
        jax.eval_shape(
            lambda m, x: m.features(x), network, jax.ShapeDtypeStruct((1, smallest - 1, 64, 3), np.uint8)
        )


@pytest.mark.parametrize("size, stride", [(2, 2), (3, 2)])
@pytest.mark.parametrize("height, width", [(8, 9), (7, 12)])
def test_max_pools_drop_what_is_left_over(size, stride, height, width):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    np.testing.assert_array_equal(max_pool(x, size, stride), windows.max((-1, -2)))
