"""The convolution's own gradient is that of XLA."""

import jax
import numpy as np
import pytest

from animecolor_jax.models.convolution import LAYOUT, conv2d


@pytest.mark.parametrize(("padding", "stride"), [((1, 1), 1), ((0, 1), 2), ((0, 1), 1), ((1, 1), 2)])
@pytest.mark.parametrize("size", [(6, 8), (4, 10)])
def test_gradients_are_those_of_the_plain_convolution(padding, stride, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 3, 5)).astype(np.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), (padding, padding), dimension_numbers=LAYOUT
        )

    expected, pull_back = jax.vjp(plain, x, kernel)
    found, own_pull_back = jax.vjp(lambda x, kernel: conv2d(x, kernel, padding, stride), x, kernel)
    np.testing.assert_array_equal(found, expected)
    cotangent = rng.standard_normal(expected.shape).astype(np.float32)
    for own, theirs in zip(own_pull_back(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-5)
