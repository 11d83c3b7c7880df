"""What the metrics and their feature networks share; all of it float32 at full precision."""

from functools import reduce

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST  # a GPU's or TPU's default would round the products


def unit_range(values):
    """uint8 values divided by 255, floats as they are; float32."""
    values = jnp.asarray(values)
    return values.astype(jnp.float32) / (255 if values.dtype == jnp.uint8 else 1)


def conv2d(x, kernel, *, stride=1, padding="VALID"):
    """[N, H, W, I], [h, w, I, O] -> [N, H', W', O].

    Args:
        padding: "VALID", "SAME" (for stride 1), or ((low, high), (low, high)) of height and width.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.matmul(x, kernel[0, 0], precision=HIGHEST)
    width = None
    if padding == "VALID" and jax.default_backend() == "cpu":
        # XLA's CPU convolutions without any padding take 2 to 5 times as long: some columns are thrown away
        width = (x.shape[2] - kernel.shape[1]) // stride + 1
        padding = ((0, 0), (0, kernel.shape[1] - 1))
    found = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    return found[:, :, :width]


def windows(x, axis, size, stride):
    """The `size` strided slices of `x` whose position i together are the window of output i along `axis`."""
    count = (x.shape[axis] - size) // stride + 1
    return [
        jax.lax.slice_in_dim(x, start, start + stride * (count - 1) + 1, stride, axis)
        for start in range(size)
    ]


def max_pool(x, size, stride):
    """[N, H, W, C] -> [N, H', W', C], windows of `size` x `size` without padding, what is left over dropped.

    Rows, then columns, as element-wise maxima over neighbouring channels, which a CPU vectorises.
    """
    for axis in (1, 2):
        x = reduce(jnp.maximum, windows(x, axis, size, stride))
    return x
