"""Temporal consistency: how much frames change beyond the motion of the target clip. On the host, in float64.

The flow is OpenCV's DIS, so that no weights are needed and every host gets the same; scores carry its name
(`tc_dis`), because another flow gives other figures.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from animecolor_jax.errors import InputError

STILL = 1e-15  # warping errors below are rounding: one level in one value of a 4K frame gives 1e-12
MIN_SIDE = 32  # pixels; OpenCV's DIS reads outside of lower images (5.0: a crash) or refuses them
_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


@dataclass(frozen=True)
class FlowConfig:
    """The flow and its visibility test.

    A pixel at p is visible in the next frame if q = p + f(p) lies in it and, b being the flow back,
    |f(p) + b(q)|^2 <= relative (|f(p)|^2 + |b(q)|^2) + absolute.

    Attributes:
        preset: of DIS: ultrafast, fast or medium.
        relative: part of the squared flows. absolute: pixels squared.
    Raises:
        InputError: an unknown preset, or a negative number.
    Source: Sundaram et al. 2010; Lai et al. 2018 use the same numbers.
    """

    preset: str = "medium"
    relative: float = 0.01
    absolute: float = 0.5

    def __post_init__(self):
        if self.preset not in _PRESETS or not (self.relative >= 0 and self.absolute >= 0):
            raise InputError(
                f"is {self}", where="FlowConfig",
                expected=f"a preset of {', '.join(_PRESETS)}, and numbers that are not negative",
            )  # fmt: skip


class WarpingErrors(NamedTuple):
    """Warping errors of one clip: mean squared differences of values in [0, 1], a mean over pairs of frames.

    Attributes:
        generated, target: float64; nan where `pairs` is 0.
        pairs: of neighbouring frames with any pixel that is visible in both; others are left out.
    """

    generated: float
    target: float
    pairs: int

    @property
    def ratio(self):
        """`tc_dis`: generated over target. 1 is the target's own consistency, below it is smoother.

        1 where both are 0. Infinite where the target's is 0, a still clip, and the generated one's is not:
        such a clip has no ratio, and a mean has to leave it out and say so. nan without pairs.
        """
        if self.target < STILL:
            return 1.0 if self.generated < STILL else math.inf
        return self.generated / self.target


class WarpingError:
    """Warping errors of a clip that comes frame by frame; holds two frames of each side.

    Frame t + 1 is warped to frame t along the target's flow, bilinearly, and compared with it where it is
    visible, on both sides at the same pixels. The result does not depend on the number of threads.

    Source: Lai et al. 2018 (arXiv 1808.00449), its warping error, with the target's flow instead of the
        input's, another flow method, and without its mask of motion boundaries.
    """

    def __init__(self, config=FlowConfig()):  # noqa: B008 (frozen)
        self.config = config
        self._flow = cv2.DISOpticalFlow_create(_PRESETS[config.preset])
        self._last = None
        self._sums, self._pairs = np.zeros(2), 0

    def add(self, generated, target):
        """Takes the next frame of each side, [H, W, 3], uint8 or floats in [0, 1].

        Raises:
            InputError: another shape or dtype, sides below 32 pixels, or another size than before.
        """
        frames = [_frame(name, x) for name, x in (("generated", generated), ("target", target))]
        before = frames if self._last is None else self._last[0]
        shapes = {x.shape for x in (*frames, *before)}
        if len(shapes) > 1:
            raise InputError(
                f"frames of {' and '.join(str(list(shape)) for shape in sorted(shapes))}",
                where="generated, target", expected="one size",
            )  # fmt: skip
        grey = _grey(frames[1])
        if self._last is not None:
            self._compare(before, self._last[1], frames, grey)
        self._last = frames, grey

    def result(self):
        """`WarpingErrors` of the frames so far."""
        if self._pairs == 0:
            return WarpingErrors(math.nan, math.nan, 0)
        return WarpingErrors(*(self._sums / self._pairs).tolist(), self._pairs)

    def _compare(self, before, grey_before, after, grey_after):
        forward = self._flow.calc(grey_before, grey_after, None).astype(np.float64)
        backward = self._flow.calc(grey_after, grey_before, None).astype(np.float64)
        warp = Bilinear(forward)
        back = warp(backward)
        mismatch = np.square(forward + back).sum(-1)
        size = np.square(forward).sum(-1) + np.square(back).sum(-1)
        visible = warp.inside & (mismatch <= self.config.relative * size + self.config.absolute)
        if not visible.any():
            return
        self._pairs += 1
        for side in range(2):
            error = np.square(warp(after[side]) - before[side])
            self._sums[side] += error[visible].mean()


def warping_errors(generated, target, config=FlowConfig()):  # noqa: B008 (frozen)
    """`WarpingErrors` of two clips [T, H, W, 3], uint8 or floats in [0, 1], T at least 2.

    Raises:
        InputError: another shape or dtype, other numbers of frames, fewer than 2, or sides below 32 pixels.
    """
    if len(generated) != len(target) or len(target) < 2:
        raise InputError(
            f"{len(generated)} and {len(target)} frames", where="generated, target",
            expected="as many in both, 2 or more",
        )  # fmt: skip
    error = WarpingError(config)
    for pair in zip(generated, target, strict=True):
        error.add(*pair)
    return error.result()


def tc_dis(generated, target, config=FlowConfig()):  # noqa: B008 (frozen)
    """Temporal consistency: `WarpingErrors.ratio` of two clips, see there; 1 for identical ones."""
    return warping_errors(generated, target, config).ratio


class Bilinear:
    """Looks images up at every pixel moved by a flow.

    Args:
        flow: [H, W, 2] float64, (x, y) in pixels.
    Attributes:
        inside: [H, W] bool, where the place lies in the image.
    """

    def __init__(self, flow):
        height, width = flow.shape[:2]
        x = np.arange(width) + flow[..., 0]
        y = np.arange(height)[:, None] + flow[..., 1]
        self.inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
        left, top = (np.minimum(at.astype(np.intp), n - 2) for at, n in ((x, width), (y, height)))
        self._corner, self._width = top * width + left, width
        self._right, self._down = (x - left)[..., None], (y - top)[..., None]

    def __call__(self, image):
        """[H, W, C] float64 -> [H, W, C]."""
        flat = image.reshape(-1, image.shape[-1])
        left, right, lower_left, lower_right = (
            np.take(flat, self._corner + step, axis=0, mode="clip")  # all of them lie inside; the fast mode
            for step in (0, 1, self._width, self._width + 1)
        )
        upper = left + self._right * (right - left)
        lower = lower_left + self._right * (lower_right - lower_left)
        return upper + self._down * (lower - upper)


def _frame(name, frame):
    """[H, W, 3] float64 in [0, 1]."""
    frame = np.asarray(frame)
    good = frame.dtype == np.uint8 or np.issubdtype(frame.dtype, np.floating)
    if not good or frame.ndim != 3 or frame.shape[-1] != 3 or min(frame.shape[:2]) < MIN_SIDE:
        raise InputError(
            f"{frame.dtype} of shape {list(frame.shape)}", where=name,
            expected=f"[H, W, 3], uint8 or floats in [0, 1], sides of {MIN_SIDE} pixels or more",
        )  # fmt: skip
    return frame / 255.0 if frame.dtype == np.uint8 else frame.astype(np.float64)


def _grey(frame):
    """OpenCV's grey, 8-bit: [H, W, 3] float64 in [0, 1] -> [H, W] uint8."""
    return cv2.cvtColor(np.rint(255 * np.clip(frame, 0, 1)).astype(np.uint8), cv2.COLOR_RGB2GRAY)
