"""How well generated frames keep to the line art: SA on the device, EDMD on the host.

Line art is [..., H, W]: uint8, 255 paper and 0 line, or floats with 1 paper and 0 line.
"""

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.image import check_pair, each_frame, frame_pair, mean_squared_error
from animecolor_jax.sketch import xdog
from data_pipeline.sketch import XDoG, extractor

LINE_THRESHOLD = 0.5  # of paper's value: half-way between line and paper


def line_art(frames, make="xdog"):
    """Line art of frames for the metrics below.

    Args:
        frames: [..., H, W, 3] uint8 RGB.
        make: a name in `data_pipeline.sketch.EXTRACTORS`, or anything that is called with [T, H, W, 3] uint8
            and gives [T, H, W] uint8. XDoG runs on the device, others on the host.
    Returns:
        [..., H, W] uint8: a JAX array from XDoG, else a NumPy array.
    Raises:
        InputError: an unknown extractor, or frames of another shape or dtype.
    """
    make = extractor(make) if isinstance(make, str) else make
    if isinstance(make, XDoG):
        return xdog(frames, make)
    frames = np.asarray(frames)
    if frames.ndim < 3:
        raise InputError(f"shape {list(frames.shape)}", where="frames", expected="[..., H, W, 3]")
    return make(frames.reshape(-1, *frames.shape[-3:])).reshape(frames.shape[:-1])


def sketch_alignment(generated_sketch, sketch):
    """SA: root mean square difference between the line art of generated frames and the input sketches.

    Args:
        generated_sketch, sketch: [..., H, W] line art.
    Returns:
        [...] float32 in [0, 1], one for each frame; 0 is the best.
    Raises:
        InputError: shapes differ, or dtypes are neither uint8 nor floats.
    Source: AnimeColor (arXiv 2507.20158) section 4.1, which has no formula more exact than that.
    """
    return _sketch_alignment(*frame_pair(generated_sketch, sketch, "[..., H, W]"))


@jax.jit
def _sketch_alignment(generated_sketch, sketch):
    return each_frame(lambda *pair: jnp.sqrt(mean_squared_error(*pair)), generated_sketch, sketch, rank=2)


def distance_map_rmse(generated_sketch, sketch, threshold=LINE_THRESHOLD):
    """EDMD: root mean square difference in pixels between maps of the distance to the nearest line.

    A pixel is line where its value is below `threshold`, of paper's 1. The distance is Euclidean, between
    centres of pixels, 0 on a line. A frame without any line is at the image's diagonal from one everywhere,
    farther than any pixel can be; two such frames are at 0 from each other. Symmetric in its arguments.

    Args:
        generated_sketch, sketch: [..., H, W] line art.
        threshold: above 0 and up to 1.
    Returns:
        [...] float64, one for each frame, in pixels; it grows with the frames' size.
    Raises:
        InputError: shapes differ, dtypes are neither uint8 nor floats, or a threshold out of range.
    Source: named by LVCD (arXiv 2409.12960), whose code has no evaluation.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold {threshold!r}", where="distance_map_rmse", expected="above 0, up to 1")
    pair = [np.asarray(x) for x in check_pair(generated_sketch, sketch, "[..., H, W]")]
    lines = [x < threshold * (255 if x.dtype == np.uint8 else 1) for x in pair]
    lead, size = lines[0].shape[:-2], lines[0].shape[-2:]
    flat = (x.reshape(-1, *size) for x in lines)
    scores = [_rms(distance_map(a) - distance_map(b)) for a, b in zip(*flat, strict=True)]
    return np.asarray(scores).reshape(lead)


def distance_map(lines):
    """Distance in pixels from every pixel to the nearest that is True; [H, W] bool -> [H, W] float64."""
    if not lines.any():
        return np.full(lines.shape, np.hypot(*lines.shape))
    paper = (~lines).view(np.uint8)
    found = cv2.distanceTransform(paper, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squares are integers. OpenCV's last bits depend on where an array lies in memory.
    return np.sqrt(np.rint(np.square(found, dtype=np.float64)))


def _rms(values):
    return np.sqrt(np.mean(np.square(values)))
