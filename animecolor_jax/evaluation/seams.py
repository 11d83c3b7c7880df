"""Seams of long clips: whether colours jump where the windows meet that a clip was coloured in."""

import itertools
from dataclasses import dataclass

import numpy as np

from animecolor_jax.errors import InputError


@dataclass(frozen=True)
class Seams:
    """Mean absolute differences between neighbouring frames, of values in [0, 1]."""

    border: float
    """Where windows meet: from the last frame of one window alone to the first of the next one alone."""
    inside: float
    """Between all other frames."""
    target: "Seams | None" = None
    """Those of the target clip at the same frames."""

    @property
    def ratio(self):
        """Border over inside, divided by the same of the target if there is one; None where it is undefined.

        1.0: the clip changes as much where windows meet as elsewhere (with a target: as much more or less as
        the target does, whose motion need not be even), so seams cannot be told from motion. Above it frames
        jump at the borders: 1.5 is half as much change again. Below it borders are smoother than the rest.

        A clip without motion at its borders and inside has 1. It is undefined where the clip, or the target,
        moves at the borders only, or the target inside only: such a clip has to be looked at.
        """
        own = _ratio(self.border, self.inside)
        other = 1.0 if self.target is None else self.target.ratio
        return None if own is None or not other else own / other


def measure_seams(frames, starts, window, target=None):
    """Compares how much a clip changes across the borders of its windows with how much it changes elsewhere.

    The first frame of a later window is not blended (see `canvas.windows`), so from window to window the
    picture passes over on the frames after it, up to the end of the earlier window; both ends of this
    stretch are borders too, and a jump anywhere in it counts. How far windows overlap follows from `starts`.

    Args:
        frames: [T, H, W, 3] uint8, the whole clip; the frames that windows are padded with may be missing.
        starts: first frames of the windows, as `canvas.windows` gives them.
        window: frames in one window.
        target: [T, H, W, 3] uint8, or None.

    Returns:
        `Seams`.

    Raises:
        InputError: shapes or dtypes do not fit, windows do not follow each other or cover the clip, or the
            clip is one window.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(
            f"{frames.dtype} of shape {list(frames.shape)}", where="frames", expected="uint8 [T, H, W, 3]"
        )
    borders = border_pairs(len(frames), starts, window)
    if not borders.any():
        raise InputError(
            f"no two windows meet in {len(frames)} frames: they are of {window} frames, from {list(starts)}",
            where="starts", expected="a clip of several windows",
            fix="measure a longer clip, or one that was coloured in shorter windows",
        )  # fmt: skip
    if target is not None:
        target = np.asarray(target)
        if target.shape != frames.shape or target.dtype != frames.dtype:
            raise InputError(
                f"target is {target.dtype} {list(target.shape)}, frames are uint8 {list(frames.shape)}",
                where="target", expected="the same shape and dtype", fix="resize or cut one of them",
            )  # fmt: skip
        target = _measure(target, borders)
    return _measure(frames, borders, target)


def border_pairs(num_frames, starts, window):
    """Which pairs of neighbouring frames lie where windows meet.

    Returns:
        [T - 1] bool; the pair t is that of the frames t and t + 1.

    Raises:
        InputError: windows do not begin with the clip, do not overlap or touch, do not cover it, or are of
            fewer than two frames.
    """
    starts = list(starts)
    steps = np.diff(starts)
    follow = starts[:1] == [0] and ((steps > 0) & (steps <= window)).all()
    if window < 2 or not follow or starts[-1] + window < num_frames:
        raise InputError(
            f"windows of {window} frames from {starts}, for {num_frames} frames", where="starts",
            expected="the first 0, rising by at most a window, to the end of the clip",
            fix="take those of canvas.windows(canvas.padded_length(T), window, overlap)",
        )  # fmt: skip
    pairs = np.zeros(num_frames - 1, bool)
    for earlier, later in itertools.pairwise(starts):
        # Windows that only touch have their one border before the later one.
        pairs[min(later, earlier + window - 1) : earlier + window] = True
    return pairs


def _measure(frames, borders, target=None):
    changes = np.array([
        np.abs(after.astype(np.int16) - before).mean() / 255 for before, after in itertools.pairwise(frames)
    ])  # fmt: skip
    return Seams(float(changes[borders].mean()), float(changes[~borders].mean()), target)


def _ratio(border, inside):
    if inside == 0:
        return 1.0 if border == 0 else None
    return border / inside
