"""PSNR, SSIM and flicker of frames against target frames, on the device in float32.

Frames are uint8 in [0, 255] or floats in [0, 1]. Every frame is scored by itself, in a loop: its score
does not depend on the batch it came in, and what is computed on the way stays in the processor's cache.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.layers import unit_range

IDENTICAL_DB = 100.0
IDENTICAL_MSE = 1e-10  # below it frames count as identical
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
K1, K2 = 0.01, 0.03
MAX_SIDE = 1 << 16  # rows, and values in a row, whose 8-bit squares can be summed in 32 bits


def psnr(generated, target):
    """Peak signal-to-noise ratio in dB.

    Args:
        generated, target: [..., H, W, C], uint8 or floats in [0, 1].
    Returns:
        [...] float32, over all channels of a frame; 100 where the mean squared error of values in [0, 1] is
        below 1e-10. Within 1e-5 dB of exact arithmetic; the error of 8-bit frames is summed in integers.
    Raises:
        InputError: shapes differ, are no frames, or dtypes are others.
    Source: calculate_psnr of JunyaoHu/common_metrics_on_video_quality.
    """
    return _psnr(*frame_pair(generated, target, "[..., H, W, C]"))


def ssim(generated, target):
    """Structural similarity: Gaussian window of 11 x 11, sigma 1.5, K = 0.01 and 0.03, valid positions.

    Args:
        generated, target: [..., H, W, C], uint8 or floats in [0, 1]; H, W at least 11.
    Returns:
        [...] float32, the mean over positions and channels. Within 1e-6 of float64: variances are sums
        of squared deviations, never differences of large numbers.
    Raises:
        InputError: shapes differ or are too small, or dtypes are others.
    Source: Wang et al. 2004; calculate_ssim of JunyaoHu/common_metrics_on_video_quality.
    """
    generated, target = frame_pair(generated, target, "[..., H, W, C]")
    if min(generated.shape[-3:-1]) < WINDOW:
        raise InputError(
            f"frames of {'x'.join(map(str, generated.shape[-3:-1]))}", where="ssim",
            expected=f"at least {WINDOW}x{WINDOW} pixels",
        )  # fmt: skip
    return _ssim(generated, target)


def flicker(generated, target):
    """Mean absolute difference between the frame differences of two clips.

    Args:
        generated, target: [B, T, H, W, C], uint8 or floats in [0, 1]; T at least 2.
    Returns:
        [B] float32 in [0, 2]: the mean of |(g[t + 1] - g[t]) - (x[t + 1] - x[t])| with values in [0, 1].
    Raises:
        InputError: shapes differ, are no clips of 2 frames, or dtypes are others.
    """
    generated, target = frame_pair(generated, target, "[B, T, H, W, C]")
    if generated.ndim != 5 or generated.shape[1] < 2:
        raise InputError(
            f"shape {list(generated.shape)}", where="flicker", expected="clips [B, T, H, W, C], T at least 2"
        )
    return _flicker(generated, target)


def frame_pair(generated, target, axes):
    """Both arrays on the device, as uint8 if both are, else as float32 in [0, 1].

    Raises:
        InputError: as `check_pair`.
    """
    pair = check_pair(generated, target, axes)
    if all(x.dtype == np.uint8 for x in pair):
        return tuple(map(jnp.asarray, pair))
    return tuple(map(unit_range, pair))


def check_pair(generated, target, axes):
    """Both as they are, JAX or NumPy arrays.

    Args:
        axes: what they should be, such as "[..., H, W, C]".

    Raises:
        InputError: shapes differ, have too few axes or no pixels, or dtypes are neither uint8 nor floats.
    """
    pair = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (generated, target)]
    rank = axes.count(",") + ("..." not in axes)
    for name, x in zip(("generated", "target"), pair, strict=True):
        known = x.dtype == np.uint8 or jnp.issubdtype(x.dtype, jnp.floating)
        if x.ndim < rank or 0 in x.shape or not known:
            raise InputError(
                f"{x.dtype} of shape {list(x.shape)}", where=name,
                expected=f"uint8, or floats in [0, 1], {axes} with at least one pixel",
            )  # fmt: skip
    if pair[0].shape != pair[1].shape:
        raise InputError(
            f"generated is {list(pair[0].shape)}, target {list(pair[1].shape)}",
            where="generated, target", expected="the same shape", fix="resize or cut one of them",
        )  # fmt: skip
    return pair


def each_frame(function, *arrays, rank=3):
    """`function` of every item of `rank` axes, one after the other; [...] of its results."""
    lead = arrays[0].shape[: arrays[0].ndim - rank]
    flat = [x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in arrays]
    found = lax.map(lambda items: function(*items), tuple(flat))
    return found.reshape(*lead, *found.shape[1:])


def mean_squared_error(generated, target):
    """Mean squared difference of all values, in [0, 1]; a scalar. Both are uint8, or both are float32."""
    peak = 255.0 if generated.dtype == jnp.uint8 else 1.0
    difference = _signed(generated) - _signed(target)
    return accurate_mean(difference * difference) / peak**2


def accurate_mean(values):
    """Mean of all values [H, ...], which are not negative.

    Of integers up to 255 squared from their exact sum, of floats from one whose error hardly grows with
    their number.

    Raises:
        InputError: more than 65536 rows, or integers in one.
    """
    rows = values.reshape(values.shape[0], -1)
    if jnp.issubdtype(values.dtype, jnp.integer):
        if max(rows.shape) > MAX_SIDE:
            raise InputError(
                f"8-bit frames of {rows.shape[0]} rows, {rows.shape[1]} values each", where="frames",
                expected=f"up to {MAX_SIDE} of both",
            )  # fmt: skip
        sums = rows.sum(-1, dtype=jnp.uint32)
        high, low = (sums >> 16).sum(dtype=jnp.uint32), (sums & 0xFFFF).sum(dtype=jnp.uint32)
        total = high.astype(jnp.float32) * (1 << 16) + low.astype(jnp.float32)
    else:
        total = _tree_sum(rows.reshape(-1))
    return total / values.size


def _tree_sum(values):
    """Sum of [N]: 16 parts are added to each other, and so on.

    XLA's own sum is as accurate for large arrays alone; SSIM of small frames was off by 1e-5.
    """
    total = jnp.float32(0)
    while values.size >= 16:
        width = values.size // 16
        total += values[16 * width :].sum()
        parts = [values[i * width : (i + 1) * width] for i in range(16)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        values = parts[0]
    return total + values.sum()


def _signed(values):
    return values.astype(jnp.int32) if values.dtype == jnp.uint8 else values


@jax.jit
def _psnr(generated, target):
    return each_frame(lambda *pair: _decibels(mean_squared_error(*pair)), generated, target)


def _decibels(mse):
    # Half a unit in the last place: the mantissa's logarithm is small, and the exponent's multiple of
    # 10 log10(2) is exact in its leading part.
    mantissa, exponent = jnp.frexp(mse)
    high = 3 + 21 / 2048
    low = 10 * math.log10(2) - high
    decibels = -high * exponent - (low * exponent + 10 * jnp.log10(mantissa))
    return jnp.where(mse < IDENTICAL_MSE, jnp.float32(IDENTICAL_DB), decibels)


@jax.jit
def _flicker(generated, target):
    peak = 255.0 if generated.dtype == jnp.uint8 else 1.0

    def pair(g0, g1, x0, x1):
        return accurate_mean(jnp.abs((_signed(g1) - _signed(g0)) - (_signed(x1) - _signed(x0)))) / peak

    frames = generated[:, :-1], generated[:, 1:], target[:, :-1], target[:, 1:]
    return each_frame(pair, *frames).mean(-1)


@jax.jit
def _ssim(generated, target):
    return each_frame(lambda *pair: accurate_mean(ssim_map(*pair)), generated, target)


def gaussian_window():
    """The 11 weights of one axis, float64, summing to 1."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    return weights / weights.sum()


def ssim_map(generated, target):
    """SSIM at every valid position of one frame [H, W, C] -> [H - 10, W - 10, C] float32.

    Written with the sum and the difference of the frames: 2 cov = (var(sum) - var(difference)) / 2, and so
    on, which takes four maps instead of five and is most accurate where the frames are alike.
    """
    height, width, channels = generated.shape
    peak = 255.0 if generated.dtype == jnp.uint8 else 1.0
    row = width * channels
    # Flat, so that a step along an axis is one number. Windows over the end of a row are cut off in the end.
    a, b = (x.astype(jnp.float32).reshape(-1) for x in (generated, target))
    maps = _compute_once((a + b, None, a - b, None), a)
    for step in (channels, row):
        maps = _compute_once((*_window_moments(*maps[:2], step), *_window_moments(*maps[2:], step)), a)
    mean_sum, var_sum, mean_dif, var_dif = maps
    mean_sum, mean_dif = mean_sum * mean_sum, mean_dif * mean_dif
    c1, c2 = (np.float32(2 * (k * peak) ** 2) for k in (K1, K2))
    luminance = (mean_sum - mean_dif + c1) / (mean_sum + mean_dif + c1)
    contrast = (var_sum - var_dif + c2) / (var_sum + var_dif + c2)
    scores = jnp.pad(luminance * contrast, (0, (WINDOW - 1) * channels))
    return scores.reshape(-1, width, channels)[:, : width - WINDOW + 1]


def _window_moments(means, variances, step):
    """Mean and variance in windows of 11 values that lie `step` apart, by the law of total variance.

    The variance is the mean of the parts' variances plus the variance of their means. Deviations are from the
    window's centre, whose weight is a quarter, so that what is subtracted in the end is at most four times
    the variance, and nothing cancels.

    Args:
        means: [N] of the parts. variances: [N] of the parts, or None if they are single values.
    Returns:
        [N - 10 step] each.
    """

    weights = np.float32(gaussian_window())
    centre = WINDOW // 2

    def taps(values):
        count = values.shape[0] - step * (WINDOW - 1)
        return [lax.slice_in_dim(values, at * step, at * step + count) for at in range(WINDOW)]

    parts = taps(means)
    deviations = [part - parts[centre] for part in parts]
    shift = sum(weights[i] * deviations[i] for i in range(WINDOW) if i != centre)
    squares = sum(weights[i] * deviations[i] ** 2 for i in range(WINDOW) if i != centre)
    within = 0 if variances is None else sum(weights[i] * part for i, part in enumerate(taps(variances)))
    return parts[centre] + shift, within + (squares - shift**2)


def _compute_once(arrays, like):
    """The arrays as they are, but computed before they are used.

    XLA's CPU backend would compute them anew for every one of the 11 taps that read them, and drops
    `lax.optimization_barrier`; it cannot see through a condition on data. That is false for nan only, which
    is then the result anyway.
    """
    nothing = lambda found: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), found)  # noqa: E731
    return lax.cond(like[0] > -jnp.inf, lambda found: found, nothing, arrays)
