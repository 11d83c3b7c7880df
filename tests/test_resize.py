"""Bilinear resizing: the formula of torch's interpolate."""

import jax
import numpy as np
import pytest

from animecolor_jax.metrics.resize import resize

SIZES = [((7, 9), (14, 18)), ((64, 48), (29, 31)), ((5, 6), (1, 13)), ((1, 3), (4, 3)), ((301, 57), (99, 29))]


def images(height, width, seed=0):
    return np.random.default_rng(seed).random((2, height, width, 3), np.float32)


def expected_axis(x, axis, target):
    """One axis in float64, pixel by pixel."""
    size, out = x.shape[axis], []
    for index in range(target):
        point = max((index + 0.5) * size / target - 0.5, 0)
        lower = min(int(point), size - 1)
        upper = min(lower + 1, size - 1)
        out.append(x.take(lower, axis) * (1 - (point - lower)) + x.take(upper, axis) * (point - lower))
    return np.stack(out, axis)


@pytest.mark.parametrize("size, target", SIZES)
def test_every_pixel_is_that_of_the_formula(size, target):
    x = images(*size)
    expected = expected_axis(expected_axis(x.astype(np.float64), 1, target[0]), 2, target[1])
    rounding = max(size) * 2.0**-23  # of the sample points, in float32
    np.testing.assert_allclose(jax.jit(resize, static_argnums=1)(x, target), expected, atol=rounding + 1e-6)


def test_the_same_size_changes_nothing_and_a_constant_stays():
    x = images(11, 13)
    np.testing.assert_array_equal(resize(x, (11, 13)), x)
    np.testing.assert_allclose(resize(np.full_like(x, 0.3), (29, 5)), 0.3, rtol=1e-6)


def test_a_scale_of_its_own_moves_the_sample_points():
    ramp = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None], (10, 4, 1))
    scaled = resize(ramp, (6, 4), scale=(1.5, None))  # rather than 10 / 6
    np.testing.assert_allclose(scaled[:, 0, 0], (np.arange(6) + 0.5) * 1.5 - 0.5, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("size, target", SIZES)
def test_it_equals_torch_to_rounding(size, target):
    torch = pytest.importorskip("torch")
    x = images(*size)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    interpolate = torch.nn.functional.interpolate
    theirs = interpolate(planes, size=target, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize(x, target), theirs.numpy(), atol=5e-7)


@pytest.mark.torch
@pytest.mark.parametrize("factor", [1.7, 0.61])
def test_it_equals_torch_with_a_scale_factor(factor):
    torch = pytest.importorskip("torch")
    x = images(33, 27)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(
        planes, scale_factor=factor, mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    ours = resize(x, theirs.shape[1:3], scale=(1 / factor, 1 / factor))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-7)
