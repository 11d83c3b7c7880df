"""FID's InceptionV3: parity with pytorch-fid, its pools, its shapes."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from animecolor_jax.metrics.inception import FEATURES, STAGES, Inception, average_pool, neighbour_max
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.parity.metrics import procedural_inception

FIXTURE = Path(__file__).parent / "fixtures" / "metrics" / "inception_fid.safetensors"


def test_features_and_distances_equal_the_reference():
    result = check_fixture(FIXTURE)
    assert result.passed, result.worst
    assert {"small/pool3", "odd/pool3", "large/pool3", "fid_few_samples/distance_exact"} <= set(result.errors)


def test_features_of_a_batch_are_those_of_the_reference():
    network, tensors = procedural_inception("fid_inception"), load_file(FIXTURE)
    image = tensors["inputs/odd/image"]
    batch = np.stack([image, image[::-1]])
    features = jax.jit(lambda m, x: m(x))(network, batch)
    expected = tensors["outputs/odd/pool3"]
    assert features.shape == (2, FEATURES)
    assert np.abs(features[0] - expected).max() <= 1e-5 * expected.max()
    assert np.abs(features[1] - expected).max() > 1e-2 * expected.max()


def test_stages_have_the_published_shapes():
    network = nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    resized = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = {
        name: x.shape[1:]
        for name, x in jax.eval_shape(lambda m, x: m.activations(x), network, resized).items()
    }
    assert set(shapes) == set(STAGES)
    assert shapes["pool2"] == (35, 35, 192) and shapes["Mixed_5d"] == (35, 35, 288)
    assert shapes["Mixed_6e"] == (17, 17, 768) and shapes["Mixed_7c"] == (8, 8, 2048)


def neighbours(x, row, column):
    return x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]


@pytest.mark.parametrize("height, width", [(5, 7), (1, 2), (8, 8)])
@pytest.mark.parametrize("pool, reduction", [(average_pool, "mean"), (neighbour_max, "max")])
def test_pools_take_the_neighbours_that_there_are(pool, reduction, height, width):
    x = -np.random.default_rng(0).random((2, height, width, 3)).astype(np.float32) - 1
    expected = np.empty_like(x)
    for row in range(height):
        for column in range(width):
            expected[:, row, column] = getattr(neighbours(x, row, column), reduction)((1, 2))
    np.testing.assert_allclose(pool(x), expected, rtol=1e-6)
