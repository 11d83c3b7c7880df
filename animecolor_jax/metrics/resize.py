"""Bilinear resizing of images as torch does it: align_corners=False, no antialiasing.

Two gathers and one linear interpolation along each axis, whose indices and weights are constants: the
formula of the reference itself, and work that grows with the output alone.
Source: torch.nn.functional.interpolate, mode="bilinear".
"""

import jax.numpy as jnp
import numpy as np


def sample_points(size, target, scale=None):
    """Where the pixels of a resized axis lie between those of the original.

    Torch finds the points in float32, by one fused multiply-add where the processor has it; that moves them
    by up to 1e-5 of a pixel. So it is done here: float64 holds the product exactly.

    Args:
        size, target: pixels of the original and of the resized axis.
        scale: original pixels per resized pixel; size / target by default.

    Returns:
        lower, upper: [target] int32, the neighbours of every point. weight: [target] float32 in [0, 1], of
        the upper one.
    """
    scale = np.float32(size) / np.float32(target) if scale is None else np.float32(scale)
    points = (np.float64(scale) * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
    points = np.maximum(points, np.float32(0))
    lower = np.minimum(points.astype(np.int32), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    return lower, upper, np.minimum(points - lower.astype(np.float32), np.float32(1))


def _resize_axis(x, axis, target, scale):
    size = x.shape[axis]
    if target == size and scale in (None, 1):
        return x
    lower, upper, weight = sample_points(size, target, scale)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    take = lambda index: jnp.take(x, index, axis, mode="clip")  # noqa: E731
    return take(lower) * (1 - weight) + take(upper) * weight


def resize(images, size, *, scale=(None, None)):
    """Bilinear resize.

    Args:
        images: [..., H, W, C] float32.
        size: (height, width) of the result.
        scale: original pixels per resized pixel in height and width, where that is not the quotient of the
            sizes: 1 / s for what torch computes with scale_factor = s (and recompute_scale_factor unset),
            whose size is floor(H s), floor(W s).

    Returns:
        [..., height, width, C] float32; the images themselves where nothing changes.
    """
    images = jnp.asarray(images)
    for axis, target, step in zip((-2, -3), size[::-1], scale[::-1], strict=True):
        images = _resize_axis(images, images.ndim + axis, target, step)
    return images
