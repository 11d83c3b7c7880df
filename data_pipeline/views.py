"""How one clip becomes one training example: motion window, reference frames, mirror image, text dropout."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from animecolor_jax.errors import InputError

REFERENCES = ("any", "first", "outside")
SEEK_FRAMES = 24  # a wider gap between wanted frames is jumped over, not decoded through


@dataclass(frozen=True)
class ViewConfig:
    """How examples are drawn from clips. The defaults are those of the paper and of the code it builds on."""

    strides: tuple[int, ...] = (3,)
    """A window takes every stride-th frame of the clip. Drawn alike from those at which the window fits into
    the clip; a clip too short for all of them has the largest stride that fits."""
    random_start: bool = True
    """Whether the window starts at a random frame, or at the first."""
    full_length: float = 0.9
    """Probability that a batch has all frames of its bucket; otherwise their number is drawn alike from the
    lesser ones (random frame crop)."""
    length_step: int = 4
    """The lesser numbers of frames are length_step + 1, 2 * length_step + 1, ...; a multiple of 4. Every
    number is a program to compile, so that large steps save compiling."""
    reference: str = "any"
    """Which frames are references: "any" of the clip, inside the window or not; "first" of the window, as at
    inference (further ones are any); "outside" the window by `reference_gap`."""
    reference_gap: int = 1
    """Of "outside": least distance in frames of the clip from every frame of the window. A clip too short for
    it gets a smaller stride; one too short even at stride 1 has the window at one end and the reference at
    the other."""
    num_references: int = 1
    """Reference frames of an example, all different if the clip has that many."""
    flip: float = 0.0
    """Probability of the mirror image. Off, as captions may say left and right and drawings hold writing."""
    text_dropout: float = 0.1
    """Probability that the caption is left out, which guidance needs."""

    def __post_init__(self):
        def require(holds, field, expected):
            if not holds:
                raise InputError(f"{getattr(self, field)}", where=f"view.{field}", expected=expected)

        require(self.strides and min(self.strides) >= 1, "strides", "numbers of frames, 1 or more")
        require(self.length_step >= 4 and self.length_step % 4 == 0, "length_step", "a multiple of 4")
        require(self.reference in REFERENCES, "reference", f"one of {', '.join(REFERENCES)}")
        require(self.reference_gap >= 1, "reference_gap", "1 frame or more")
        require(self.num_references >= 1, "num_references", "1 or more")
        for field in ("full_length", "flip", "text_dropout"):
            require(0 <= getattr(self, field) <= 1, field, "a probability from 0 to 1")

    @staticmethod
    def evaluation(stride=3):
        """Nothing random: the window from the first frame, which is the reference, and the caption."""
        return ViewConfig((stride,), False, full_length=1, reference="first", text_dropout=0)


class View(NamedTuple):
    """What of a clip is seen.

    Attributes:
        frames: [T] int32 frame numbers of the clip, the motion window.
        references: [R] int32 frame numbers of the clip.
    """

    frames: np.ndarray
    references: np.ndarray


def draw_length(config, bucket, rng):
    """Frames T of a batch: those of the bucket, or after a random frame crop fewer; 4k + 1."""
    lesser = range(config.length_step + 1, bucket.frames, config.length_step)
    if not lesser or rng.random() < config.full_length:
        return bucket.frames
    return int(rng.choice(lesser))


def draw_view(config, clip_frames, length, rng):
    """`View` of a clip.

    Args:
        clip_frames: how many frames the clip has, `length` or more.
        length: T, frames of the window.
    """
    gap = config.reference_gap if config.reference == "outside" else 0
    if clip_frames - length < gap:
        return _opposite_ends(clip_frames, length, config.num_references, rng)
    stride = _draw_stride(config.strides, clip_frames - gap, length, rng)
    span = (length - 1) * stride + 1
    starts = np.arange(clip_frames - span + 1)
    if gap:
        starts = starts[(starts >= gap) | (starts <= clip_frames - span - gap)]
    start = rng.choice(starts) if config.random_start else starts[0]
    window = start + stride * np.arange(length)
    frames = np.arange(clip_frames)
    if gap:
        frames = frames[(frames <= start - gap) | (frames >= window[-1] + gap)]
    if config.reference == "first":
        frames = np.append(start, frames[frames != start])
    references = _draw_references(config, frames, rng)
    return View(window.astype(np.int32), references.astype(np.int32))


def draw_candidates(config, count, rng):
    """Which of `count` precomputed references are taken, [R] int64; the first of them is the first frame."""
    return _draw_references(config, np.arange(count), rng)


def _draw_references(config, frames, rng):
    """Different frames if there are enough; the first of `frames` among them where the policy says so."""
    count, kept = config.num_references, frames[:0]
    if config.reference == "first":
        kept, count = frames[:1], count - 1
        frames = frames[1:] if len(frames) > 1 else frames
    return np.concatenate([kept, rng.choice(frames, count, replace=count > len(frames))])


def _opposite_ends(clip_frames, length, num_references, rng):
    ends = np.arange(length), np.full(num_references, clip_frames - 1)
    if rng.random() < 0.5:
        ends = tuple(clip_frames - 1 - numbers for numbers in ends)
    frames, references = ends
    return View(np.sort(frames).astype(np.int32), references.astype(np.int32))


def _draw_stride(strides, room, length, rng):
    """`room`: frames that the window may span."""
    if length == 1:
        return 1
    largest = (room - 1) // (length - 1)
    return int(rng.choice([stride for stride in strides if stride <= largest] or [largest]))


def describe(record):
    """What messages call a clip."""
    return f"clip {record['id']} of {record['source']}"


def read_view(record, view, flip):
    """Pixels of a view.

    A reference is mirrored with its clip: a parting, a scar and the light are on the same side in both, as
    they are where the reference is a frame of the video itself.

    Args:
        record: one of `records.clip_features`.

    Returns:
        (video [T, H, W, 3], references [R, H, W, 3]), both uint8 RGB.

    Raises:
        InputError: the stored clip is damaged, or lacks a frame.
    """
    from data_pipeline import clip_video  # decodes with PyAV; the config above does not need it

    wanted = np.unique(np.concatenate(view))
    groups = np.split(wanted, np.flatnonzero(np.diff(wanted) > SEEK_FRAMES) + 1)
    where = describe(record)
    pixels = np.concatenate([clip_video.decode(record["video"], group.tolist(), where) for group in groups])
    if flip:
        pixels = pixels[:, :, ::-1]
    return tuple(np.ascontiguousarray(pixels[np.searchsorted(wanted, part)]) for part in view)
