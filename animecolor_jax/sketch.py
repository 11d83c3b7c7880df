"""XDoG line art on the device, for batches: bit for bit what `data_pipeline.sketch.XDoG` makes on the host.

All arithmetic is in integers, so that it does not depend on the device.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from animecolor_jax.errors import InputError
from data_pipeline.sketch import DEPTH_BITS, XDoG, dog_order, gaussian_kernel


def xdog(frames, parameters=XDoG()):  # noqa: B008 (frozen)
    """Line art of frames [..., H, W, 3] uint8 RGB -> [..., H, W] uint8, as `parameters` does on the host.

    Jitted, and usable under jit and vmap; parameters are constants there. A change of `epsilon` or `phi`
    alone compiles nothing anew. A grey frame is one with three equal channels.

    Raises:
        InputError: frames of another shape or dtype, or without pixels.
    """
    if frames.dtype != jnp.uint8 or frames.ndim < 3 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(
            f"{frames.dtype} of shape {list(frames.shape)}",
            where="frames",
            expected="uint8 RGB [..., H, W, 3] with at least one pixel",
        )
    return _xdog(
        frames,
        *_thresholds(parameters),
        kernels=(gaussian_kernel(parameters.sigma), gaussian_kernel(parameters.sigma * parameters.k)),
        gamma=parameters.gamma,
        binarize=parameters.binarize,
        light_lines=parameters.light_lines,
    )


@functools.lru_cache(maxsize=64)
def _thresholds(parameters):
    """(peaks [N], papers [N], depths [254]) int32: every positive maximum of a frame, the smallest key that
    is paper then, and `level_depths`."""
    order = dog_order(parameters.gamma)
    peaks = order.keys[order.dogs > 0]
    return peaks, parameters.paper_thresholds(peaks), parameters.level_depths().astype(np.int32)


@partial(jax.jit, static_argnames=("kernels", "gamma", "binarize", "light_lines"))
def _xdog(frames, peaks, papers, depths, *, kernels, gamma, binarize, light_lines):
    red, green, blue = (frames[..., channel].astype(jnp.int32) for channel in range(3))
    grey = ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).astype(jnp.uint8)  # OpenCV's
    margin = max(map(len, kernels)) // 2
    padded = jnp.pad(grey, [(0, 0)] * (grey.ndim - 2) + [(margin, margin)] * 2, mode="reflect")
    # In a loop, because XLA's CPU backend would compute the blurs anew wherever they are used.
    blurs = [partial(_blur, padded, kernel, margin) for kernel in kernels]
    fine, coarse = lax.map(lambda index: lax.switch(index, blurs), jnp.arange(2))  # [..., H, W]

    order = dog_order(gamma)
    keys = order.scale * fine.astype(jnp.int32) - order.weight * coarse.astype(jnp.int32)
    keys += _look_up(order.tie, coarse)
    peak = keys.max((-2, -1), keepdims=True)
    paper = keys >= jnp.where(peak >= peaks[0], papers[jnp.searchsorted(peaks, peak)], order.keys[0])
    levels = jnp.uint8(0) if binarize else _levels(keys, peak, depths, order.steps)
    sketch = jnp.where(paper, jnp.uint8(255), levels)
    return 255 - sketch if light_lines else sketch


def _blur(padded, kernel, margin):
    """OpenCV's 8-bit Gaussian blur of [..., H + 2 margin, W + 2 margin] uint8, without the margins.

    Shifted slices, because XLA has no fast convolution of integers on CPUs.
    """

    def correlate(image, axis):
        size, as_int = image.shape[axis] - 2 * margin, image.dtype.type
        taps = [(start, weight) for start, weight in enumerate(kernel, margin - len(kernel) // 2) if weight]
        return sum(as_int(w) * lax.slice_in_dim(image, at, at + size, axis=axis) for at, w in taps)

    columns = correlate(padded.astype(jnp.uint16), padded.ndim - 2)  # at most 255 * 256
    both = correlate(columns.astype(jnp.uint32), padded.ndim - 1)
    return ((both + (1 << 15)) >> 16).astype(jnp.uint8)


def _look_up(table, index):
    """table[index] for a NumPy table [256] and index uint8, from bits packed in words; int32.

    XLA's CPU backend runs a gather one element after the other.
    """
    word, place = index >> 5, (index & 31).astype(jnp.uint32)
    values = jnp.zeros(index.shape, jnp.int32)
    for bit in range(int(table.max()).bit_length()):
        words = np.packbits(table >> bit & 1, bitorder="little").view("<u4")
        packed = sum(jnp.where(word == number, np.uint32(bits), 0) for number, bits in enumerate(words))
        values += ((packed >> place & 1) << bit).astype(jnp.int32)
    return values


def _levels(keys, peak, depths, steps):
    """How many of the grey levels' limits, `depths` of the frame's maximum below 0, a key reaches; uint8."""
    # floor(depths * peak / 2**DEPTH_BITS) in two parts, because the product does not fit in 32 bits
    peak = peak // steps
    low = (depths & 63) * peak >> 6
    limits = -((depths >> 6) * peak + low >> DEPTH_BITS - 6) * steps  # [..., 1, 254]
    limits = jnp.moveaxis(limits, -1, 0)[..., None]  # [254, ..., 1, 1]

    def count(reached, limit):
        return reached + (keys >= limit).astype(jnp.uint8), None

    return lax.scan(count, jnp.zeros(keys.shape, jnp.uint8), limits, unroll=8)[0]
