"""PSNR, SSIM and flicker against recorded results, scikit-image, and float64 arithmetic."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax.errors import InputError
from animecolor_jax.metrics import image
from animecolor_jax.metrics.image import flicker, psnr, ssim
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.safetensors_io import Reader

FOLDER = Path(__file__).parent / "fixtures" / "metrics"
SSIM_ERROR = 1e-6  # the fixture's tolerance
DECIBEL_ERROR = 1e-5


def noise(*shape, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, shape, np.uint8)


def near(frames, spread, seed=1):
    """Frames that differ from `frames` by at most `spread`."""
    change = np.random.default_rng(seed).integers(-spread, spread + 1, frames.shape)
    return np.clip(frames.astype(int) + change, 0, 255).astype(np.uint8)


def exact_psnr(generated, target):
    """Per frame, float64, of values in [0, 1]."""
    mse = np.square(generated.astype(np.float64) - target.astype(np.float64)).mean((-3, -2, -1))
    return np.where(mse < 1e-10, 100, -10 * np.log10(np.maximum(mse, 1e-30)))


def exact_ssim(generated, target):
    """One frame, float64, of values in [0, 1], by the definition: every window by itself."""
    window = np.outer(image.gaussian_window(), image.gaussian_window())[..., None]
    views = (
        np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (11, 11), axis=(0, 1))
        for x in (generated, target)
    )
    x, y = (np.moveaxis(view, 2, -1) for view in views)  # [h, w, 11, 11, C]
    mean = lambda values: (window * values).sum((2, 3))  # noqa: E731
    mu_x, mu_y = mean(x), mean(y)
    dx, dy = x - mu_x[:, :, None, None], y - mu_y[:, :, None, None]
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * mean(dx * dy) + c2) / (mean(dx * dx) + mean(dy * dy) + c2)
    return ((2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1) * structure).mean()


# ---------------------------------------------------------------- recorded results


@pytest.mark.parametrize("name", ["image_metrics", "xdog"])
def test_recorded_results_are_reproduced(name):
    result = check_fixture(FOLDER / f"{name}.safetensors")
    assert result.passed, result.worst
    assert len(result.errors) == {"image_metrics": 8, "xdog": 17}[name]


def test_recorded_means_and_the_map_are_reproduced():
    with Reader(FOLDER / "image_metrics.safetensors") as file:
        recorded = {name.removeprefix("outputs/"): file.read(name) for name in file.specs}
        inputs = [file.read(f"inputs/mixed/video{i}") for i in (0, 1)]
    np.testing.assert_allclose(image.gaussian_window(), recorded["common/gaussian_kernel"], rtol=1e-12)
    frames = np.asarray(ssim(*inputs), np.float64)
    np.testing.assert_allclose(frames.mean(0), recorded["mixed/ssim_value"], atol=SSIM_ERROR)
    np.testing.assert_allclose([frames.mean()], recorded["mixed/ssim_final"], atol=SSIM_ERROR)
    found = image.ssim_map(*(x[0, 1] for x in inputs))
    np.testing.assert_allclose(found[..., 0], recorded["mixed/ssim_map_0_1_0"], atol=5 * SSIM_ERROR)


# ---------------------------------------------------------------- scikit-image and float64


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(11, 11), (24, 57), (40, 33)], ids=str)
def test_ssim_equals_scikit_image(size, channels):
    metrics = pytest.importorskip("skimage.metrics")
    for spread in (2, 30, 255):
        target = noise(*size, channels)
        generated = near(target, spread)
        expected = metrics.structural_similarity(
            generated / 255, target / 255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=1.0, channel_axis=-1,
        )  # fmt: skip
        assert float(ssim(generated, target)) == pytest.approx(expected, abs=SSIM_ERROR)


def test_psnr_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    target = noise(20, 31, 3)
    generated = near(target, 12)
    expected = metrics.peak_signal_noise_ratio(target, generated, data_range=255)
    assert float(psnr(generated, target)) == pytest.approx(expected, abs=DECIBEL_ERROR)


@pytest.mark.parametrize("low, high, spread", [(0, 256, 255), (250, 256, 1), (0, 3, 1), (120, 122, 3)])
def test_ssim_is_within_1e_6_of_float64(low, high, spread):
    target = noise(26, 40, 3, low=low, high=high)
    generated = near(target, spread)
    assert float(ssim(generated, target)) == pytest.approx(
        exact_ssim(generated / 255, target / 255), abs=SSIM_ERROR
    )


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("level", [0.0, 0.5, 0.99])
def test_ssim_of_nearly_equal_floats_does_not_cancel(level, spread):
    rng = np.random.default_rng(0)
    target = (level + 0.01 * rng.uniform(size=(20, 30, 3))).astype(np.float32)
    generated = target + (spread * rng.standard_normal(target.shape)).astype(np.float32)
    assert float(ssim(generated, target)) == pytest.approx(exact_ssim(generated, target), abs=SSIM_ERROR)


def test_psnr_of_8_bit_frames_is_exact_up_to_4k():
    target = noise(2160, 3840, 3)
    for generated in (255 - target, target ^ 3, target ^ (target < 3)):
        difference = generated.astype(np.int32) - target
        mse = np.square(difference).sum(dtype=np.int64) / difference.size / 255**2
        assert float(psnr(generated, target)) == pytest.approx(-10 * np.log10(mse), abs=DECIBEL_ERROR)


@pytest.mark.parametrize("kind", ["noise", "constant"])
@pytest.mark.parametrize("size", [(37, 51), (2160, 3840)], ids=str)
def test_psnr_of_floats_does_not_lose_digits_to_the_number_of_values(size, kind):
    rng = np.random.default_rng(0)
    target = np.full((*size, 3), 0.2, np.float32)
    generated = target + np.float32(0.1)
    if kind == "noise":
        generated += rng.standard_normal(target.shape, np.float32) * np.float32(0.03)
    expected = float(exact_psnr(generated, target))
    assert float(psnr(generated, target)) == pytest.approx(expected, abs=DECIBEL_ERROR)


def test_sums_of_largest_squares_do_not_overflow():
    black, white = np.zeros((2, 300, 7000, 3), np.uint8), np.full((2, 300, 7000, 3), 255, np.uint8)
    np.testing.assert_allclose(psnr(black, white), [0, 0], atol=1e-6)


def test_decibels_are_rounded_once():
    mse = jnp.asarray(np.geomspace(1.1e-10, 1, 2000), jnp.float32)
    exact = -10 * np.log10(np.asarray(mse, np.float64))
    assert np.abs(np.asarray(image._decibels(mse)) - exact).max() < 5e-6


def test_flicker_is_the_difference_of_frame_differences():
    generated, target = noise(2, 4, 13, 17, 3), noise(2, 4, 13, 17, 3, seed=1)
    g, x = (np.diff(clip.astype(float), axis=1) for clip in (generated, target))
    expected = np.abs(g - x).mean((1, 2, 3, 4)) / 255
    np.testing.assert_allclose(flicker(generated, target), expected, rtol=1e-6)
    floats = [(clip / 255).astype(np.float32) for clip in (generated, target)]
    np.testing.assert_allclose(flicker(*floats), expected, rtol=1e-6)


# ---------------------------------------------------------------- properties


def test_identical_frames_give_100_and_1_and_no_flicker():
    for frames in (noise(2, 3, 16, 20, 3), np.zeros((2, 3, 16, 20, 3), np.uint8)):
        for clip in (frames, (frames / 255).astype(np.float32)):
            np.testing.assert_array_equal(psnr(clip, clip), np.full((2, 3), 100))
            np.testing.assert_array_equal(ssim(clip, clip), np.ones((2, 3)))
            np.testing.assert_array_equal(flicker(clip, clip), np.zeros(2))


def test_a_constant_offset_does_not_flicker():
    clip = noise(1, 3, 12, 12, 3, high=200)
    np.testing.assert_array_equal(flicker(clip + 40, clip), [0])
    flash = np.array([0, 40, 0], np.uint8)[:, None, None, None]
    assert flicker(clip + flash, clip) == pytest.approx(40 / 255)


def test_scores_are_symmetric_and_fall_with_distance():
    target = noise(16, 20, 3)
    scores = [(float(psnr(x, target)), float(ssim(x, target))) for x in (near(target, s) for s in (1, 9, 80))]
    assert scores[0] > scores[1] > scores[2]
    other = near(target, 9)
    assert psnr(other, target) == psnr(target, other) and ssim(other, target) == ssim(target, other)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_scores_are_bit_equal_under_any_batch_split(dtype):
    generated, target = noise(6, 4, 24, 28, 3), noise(6, 4, 24, 28, 3, seed=1)
    if dtype == np.float32:
        generated, target = ((x / 255).astype(dtype) for x in (generated, target))
    for metric in (psnr, ssim):
        together = np.asarray(metric(generated, target))
        assert together.shape == (6, 4)
        for size in (1, 3):
            parts = [metric(generated[i : i + size], target[i : i + size]) for i in range(0, 6, size)]
            np.testing.assert_array_equal(np.concatenate(parts), together)
        alone = [[metric(generated[b, t], target[b, t]) for t in range(4)] for b in range(6)]
        np.testing.assert_array_equal(alone, together)
    together = np.asarray(flicker(generated, target))
    alone = [flicker(generated[b : b + 1], target[b : b + 1])[0] for b in range(6)]
    np.testing.assert_array_equal(alone, together)


def test_8_bit_frames_and_floats_agree():
    pair = noise(2, 16, 20, 3), noise(2, 16, 20, 3, seed=1)
    mixed = pair[0], jnp.asarray(pair[1] / 255, jnp.float32)
    np.testing.assert_allclose(psnr(*mixed), psnr(*pair), atol=DECIBEL_ERROR)
    np.testing.assert_allclose(ssim(*mixed), ssim(*pair), atol=SSIM_ERROR)


def test_nan_is_no_score():
    target = np.full((2, 16, 20, 3), 0.5, np.float32)
    for place in ((0, 0, 0, 0), (0, 9, 9, 1)):
        generated = target.copy()
        generated[place] = np.nan
        for metric in (psnr, ssim):
            np.testing.assert_array_equal(np.isnan(metric(generated, target)), [True, False])


def test_metrics_work_under_jit():
    pair = noise(2, 16, 20, 3), noise(2, 16, 20, 3, seed=1)
    for metric in (psnr, ssim):
        np.testing.assert_allclose(jax.jit(metric)(*pair), metric(*pair), rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: psnr(noise(8, 8, 3), noise(8, 9, 3)), r"generated is \[8, 8, 3\], target \[8, 9, 3\]"),
        (lambda: psnr(noise(8, 8), noise(8, 8)), "generated: uint8 of shape"),
        (lambda: psnr(noise(0, 8, 3), noise(0, 8, 3)), "at least one pixel"),
        (lambda: psnr(noise(8, 8, 3), np.zeros((8, 8, 3), int)), "target: int64"),
        (lambda: ssim(noise(10, 30, 3), noise(10, 30, 3)), "at least 11x11"),
        (lambda: flicker(noise(4, 8, 8, 3), noise(4, 8, 8, 3)), "B, T, H, W, C"),
        (lambda: flicker(noise(1, 1, 8, 8, 3), noise(1, 1, 8, 8, 3)), "T at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
