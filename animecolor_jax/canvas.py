"""Geometry of clips: canvas sizes, padding, references of another shape, windows of long clips.

Pure NumPy (and Pillow for resizing) on uint8 [T, H, W, 3] frames and [H, W, 3] images; sizes are
(height, width). A latent is 8x8 pixels and, after the first frame, 4 frames; a patch is 2x2 latents,
hence sizes are multiples of 16.
"""

import itertools
import math

import numpy as np
from PIL import Image

from animecolor_jax.errors import InputError
from data_pipeline.shapes import FRAMES_PER_LATENT, SPATIAL_MULTIPLE

STRICT_FRAMES = 49  # what the official script cuts a clip to
POLARITIES = ("auto", "yes", "no")


# ---------------------------------------------------------------- canvas


def fit_size(height, width, multiple=SPATIAL_MULTIPLE):
    """The smallest (H, W) of multiples that holds height x width."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def size_of_area(height, width, area, multiple=SPATIAL_MULTIPLE):
    """The (H, W) of multiples that is nearest to the aspect of height x width, and then to `area` pixels."""
    scale = math.sqrt(area / (height * width)) / multiple
    sides = [
        [max(1, math.floor(side * scale) + more) * multiple for more in (0, 1)] for side in (height, width)
    ]

    def distance(size):
        aspect, pixels = size[0] / size[1] * width / height, size[0] * size[1] / area
        return 2 * abs(math.log(aspect)) + abs(math.log(pixels))

    return min(itertools.product(*sides), key=distance)


def pad_frames(frames, size):
    """Extends frames [T, h, w, C] to size (H, W) at the bottom and the right; `crop` undoes it.

    Edge pixels are repeated, which continues paper as paper and whatever touches the border as it is.
    A constant white would draw a straight edge along the border that the model takes for line art.
    """
    bottom, right = size[0] - frames.shape[1], size[1] - frames.shape[2]
    if bottom < 0 or right < 0:
        raise ValueError(f"frames are {frames.shape[1]}x{frames.shape[2]}, larger than {size[0]}x{size[1]}")
    return np.pad(frames, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")


def crop(frames, height, width):
    """The top left height x width of frames [..., H, W, C]."""
    if height > frames.shape[-3] or width > frames.shape[-2]:
        raise ValueError(f"cannot crop {frames.shape[-3]}x{frames.shape[-2]} to {height}x{width}")
    return frames[..., :height, :width, :]


def padded_length(num_frames):
    """The next 8m + 1 frames: 1 -> 1, 2..9 -> 9, 10..17 -> 17.

    8m + 1 frames make an odd number of latents. An even number n of them would decode to 4n frames, one
    latent's worth of them invented.
    """
    return -(-(num_frames - 1) // 8) * 8 + 1


def pad_length(frames):
    """Repeats the last of frames [T, ...] until there are `padded_length(T)`."""
    return np.concatenate([frames, np.repeat(frames[-1:], padded_length(len(frames)) - len(frames), axis=0)])


# ---------------------------------------------------------------- references


def _resize(image, size):
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def fit_reference(image, size):
    """Brings a reference [h, w, 3] of any shape onto the canvas (H, W), losing nothing of it.

    It is scaled to fit inside with its aspect kept (antialiased bicubic), centred, and extended by its
    edge pixels: a reference says which colours things have, so no part may be cut off, and a stretched
    face is another face.
    """
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    image = image if image.shape[:2] == (height, width) else _resize(image, (height, width))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    margins = ((top, size[0] - height - top), (left, size[1] - width - left), (0, 0))
    return np.pad(image, margins, mode="edge")


def resize_exact(image, size):
    """Stretches an image [h, w, 3] to (H, W), bicubic, as the official script does to the reference."""
    return _resize(image, size)


# ---------------------------------------------------------------- --strict-reference


def strict_canvas(reference_size):
    """The official script's canvas: the reference's (height, width) floored to multiples of 16.

    Raises:
        InputError: a side is below 16.
    """
    height, width = (side // SPATIAL_MULTIPLE * SPATIAL_MULTIPLE for side in reference_size)
    if not (height and width):
        raise InputError(
            f"the reference is {reference_size[0]}x{reference_size[1]}",
            where="--strict-reference",
            expected="at least 16x16, since it sets the size of the video",
            fix="use a larger reference, or leave out --strict-reference",
        )
    return height, width


def strict_frame_count(num_frames):
    """How many frames the official script keeps: 4k + 1, at most 49."""
    return min((num_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1, STRICT_FRAMES)


def resize_video_bilinear(frames, size):
    """Stretches frames [T, h, w, 3] to (H, W) by OpenCV's bilinear, without antialiasing.

    Source: get_ref_video_to_video_latent of the official script calls cv2.resize, whose fixed-point
    rounding is part of the result; so this calls it too.
    """
    import cv2  # only --strict-reference needs it

    return np.stack([cv2.resize(np.ascontiguousarray(frame), (size[1], size[0])) for frame in frames])


# ---------------------------------------------------------------- polarity


def normalise_polarity(frames, mode="auto"):
    """Dark lines on white paper, as in the training sketches.

    Args:
        frames: [T, H, W, 3] uint8 line art.
        mode: "yes" inverts, "no" does not, "auto" inverts if more than half of all pixels are darker
            than middle grey: lines cover little of a page, so the median is the paper.

    Returns:
        (frames, whether they were inverted); one decision for the whole clip, or it would flash.

    Raises:
        InputError: there is no such mode.
    """
    if mode not in POLARITIES:
        raise InputError(
            f"unknown mode {mode!r}", where="--invert", expected=f"one of {', '.join(POLARITIES)}"
        )
    inverted = mode == "yes" or (mode == "auto" and _median_luma(frames) < 128)
    return (255 - frames if inverted else frames), inverted


def _median_luma(frames):
    """Median of BT.601 luma over a clip, frame by frame to save memory."""
    counts = np.zeros(256, np.int64)
    for frame in frames:
        luma = frame @ np.array([0.299, 0.587, 0.114], np.float32)
        counts += np.bincount(np.rint(luma).astype(np.uint8).ravel(), minlength=256)
    return int(np.searchsorted(counts.cumsum(), counts.sum() / 2))


# ---------------------------------------------------------------- windows of long clips


def windows(num_frames, window=49, overlap=16):
    """First frames of the windows that a long clip is coloured in.

    Each window is encoded by itself. Its first latent then holds one frame alone, where in an encoding
    of the whole clip that latent would hold four: it serves its own window only and takes no part in
    blending or decoding (unless the window is the first), so neighbours share `overlap` frames beyond
    it. Starts are multiples of 4, a latent's frames; the last window is moved back to end with the clip.

    Args:
        num_frames: 8m + 1, see `padded_length`.
        window: frames in one window, 8k + 1 and at least 9.
        overlap: frames that neighbours share, a multiple of 4 from 4 to window - 5, so that each window
            goes on by a latent or more.

    Raises:
        InputError: `window` or `overlap` are impossible.
    """
    if num_frames < 1 or num_frames % 8 != 1:
        raise ValueError(f"num_frames is {num_frames}, expected 8m + 1")
    if window < 9 or window % 8 != 1:
        raise InputError(
            f"{window} frames", where="--window", expected="8k + 1 frames, at least 9: 9, 17, 25 ... 49 ..."
        )
    one_window = num_frames <= window  # then any sensible overlap will do
    if overlap % 4 or overlap < 4 or (overlap > window - 5 and not one_window):
        raise InputError(
            f"{overlap} frames, with a window of {window}",
            where="--overlap",
            expected=f"a multiple of 4, at least 4 and at most the window - 5 = {window - 5}",
            fix="choose a larger --window or another --overlap",
        )
    if one_window:
        return [0]
    last = num_frames - window
    return [*range(0, last, window - 1 - overlap), last]


def latent_index(starts, window_latents):
    """Which latent of the whole clip each latent of each window is.

    Args:
        starts: first frames, from `windows`.
        window_latents: latents of one window, (frames - 1) / 4 + 1.

    Returns:
        [num_windows, window_latents] int32; -1 for the first latent of every later window, which is
        none of the clip's.
    """
    first = np.array(starts, np.int32)[:, None] // FRAMES_PER_LATENT
    index = first + np.arange(window_latents, dtype=np.int32)
    index[1:, 0] = -1
    return index


def blend_weights(starts, window_latents, total_latents):
    """How much each window's latents count in the blended clip.

    A window's weight rises linearly over the latents it shares with its predecessor and falls linearly
    over those it shares with its successor. Where three or more windows meet (a large overlap, or the
    last window moved back) the weights are divided by their sum.

    Args:
        starts: first frames, from `windows`.
        window_latents: latents of one window.
        total_latents: latents of the whole clip.

    Returns:
        [num_windows, window_latents] float32. Over all windows, the weights of one latent of the clip
        sum to 1; the first latents of later windows have weight 0.

    Raises:
        ValueError: the windows do not end where the clip does.
    """
    index = latent_index(starts, window_latents)
    if index[-1, -1] != total_latents - 1:
        raise ValueError(f"windows end at latent {index[-1, -1]}, the clip has {total_latents}")
    weights = np.ones(index.shape, np.float64)
    weights[1:, 0] = 0
    for earlier, later in zip(range(len(starts) - 1), range(1, len(starts)), strict=True):
        shared = index[earlier, -1] - index[later, 1] + 1
        ramp = np.arange(1, shared + 1) / (shared + 1)
        weights[later, 1 : 1 + shared] = np.minimum(weights[later, 1 : 1 + shared], ramp)
        weights[earlier, -shared:] = np.minimum(weights[earlier, -shared:], ramp[::-1])
    used = index >= 0
    totals = np.bincount(index[used], weights[used], total_latents)
    weights[used] /= totals[index[used]]
    return weights.astype(np.float32)
