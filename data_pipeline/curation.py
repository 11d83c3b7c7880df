"""One pass over a video: its clips, what was measured on each, whether it is kept, and if not, why.

Measuring and deciding are two steps: `curate_video` measures, `decide` compares the scores with the
thresholds. So thresholds can be changed, and scores that need a network added, without decoding anything
again.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline import duplicates, scores, text_detection
from data_pipeline.shots import analysis_frame, label_shots, resized

_SAMPLES = 8  # frames of a clip that the text detector sees
_SAMPLE_SIDE = 300  # their shorter side at most, in pixels: the height that the detector works at
_LETTERBOX_STEP = 8  # every so many frames are searched for bars

# What of the config changes the measuring; all the rest only decides.
MEASURING = (
    "max_clip_frames",
    "shot_content",
    "shot_structure",
    "flash_frames",
    "trim_frames",
)


@dataclass(frozen=True)
class CurationConfig:
    """What a clip must be like. A limit of None is not asked for.

    The defaults drop what no training run can use and little else; they were set on seven real clips, painted
    and line art (in brackets what was measured there), and on drawn ones.
    """

    min_frames: int = 9
    """Frames; 9 frames are 3 latent ones, the fewest that show a movement."""
    max_clip_frames: int = 240
    """Frames; longer shots are split into parts of so many. Memory grows with it: 0.1 MB a frame."""
    min_side: int | None = 240
    """Pixels of the shorter side inside the letterbox. Below, lines are thinner than a pixel of the 480-line
    training size and cannot be told from noise."""
    max_side: int | None = None
    """Pixels of the longer side inside the letterbox."""
    min_fps: float | None = 5.0
    """Frames per second; drawings on fours at 24 are 6 a second [6 ... 30]."""
    max_fps: float | None = None
    """Frames per second."""

    shot_content: float = 2.0
    """Levels: PySceneDetect's content score that a change needs to be looked at as a cut. Its own default,
    27, misses all cuts between line-art shots [8.6 and more], and half of it already finds cuts in movement
    [up to 11.5]."""
    shot_structure: float = 0.43
    """Correlation of edges, 0 to 1, after following the movement: below is a cut [cuts at most 0.35 and
    between drawn clips 0.42, movement 0.46 and more, light 0.7 and more]."""
    flash_frames: int = 4
    """Frames: a change is no cut if the picture is back after so many."""
    trim_frames: int = 0
    """Frames left out on both sides of a cut; for sources whose frame rate was converted by blending."""

    max_static_share: float | None = 0.98
    """Share of the steps from frame to frame that show no new drawing: above is a still image. A single blink
    in 120 frames passes [at most 0.60]."""
    min_motion: float | None = 0.005
    """Percent of the frame's diagonal per second, the mean of all pixels [1.9 ... 30; a detail of a fifteenth
    of the frame's sides that changes twice in a second 0.01]."""
    max_motion: float | None = None
    """In the same unit."""
    min_brightness: float | None = 10.0
    """Mean luma, 0 to 255; the real clips would have 13 if they were dimmed to a tenth [135 ... 242]."""
    max_brightness: float | None = None
    """Mean luma, 0 to 255; line art is nearly white [up to 242]."""
    min_contrast: float | None = 8.0
    """Standard deviation of luma inside a frame, in levels: paper with 0.2 percent of black pixels has 11 [37
    ... 61]."""
    max_text: float | None = text_detection.TEXT_THRESHOLD
    """Score of the text detector, 0 to 1 for the built-in one."""
    min_aesthetic: float | None = None
    """In the scale of the scorer that the user brings."""

    duplicate_distance: float | None = 6.0
    """Bits of 64 by which the frames of a copy differ at most, on average [re-encoded, scaled, brighter: up
    to 4.4; cropped by 2 percent: 6.0; other shots: 26 and more]. At most 11.5."""
    duplicate_chroma: float = 0.93
    """Cosine between the colours of copies, at least [copies 0.954 and more, the same drawing in other
    colours 0.91]."""

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value, kind = getattr(self, entry.name), entry.type | int  # an int will do for a float
            least, most = _RANGES.get(entry.name, (0, np.inf))
            if value is None and isinstance(None, kind):
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                raise InputError(
                    f"is {value!r}", where=entry.name, expected=f"a number, {least:g} to {most:g}"
                )
        for quantity in ("side", "fps", "motion", "brightness"):
            low, high = (getattr(self, f"{end}_{quantity}") for end in ("min", "max"))
            if low is not None and high is not None and low > high:
                raise InputError(
                    f"is {low!r}", where=f"min_{quantity}", expected=f"at most max_{quantity}, {high!r}"
                )


_RANGES = {
    "min_frames": (1, np.inf),
    "max_clip_frames": (1, np.inf),
    "shot_content": (0.1, 255),
    "shot_structure": (0, 1),
    "max_static_share": (0, 1),
    "min_aesthetic": (-np.inf, np.inf),
    "duplicate_distance": (0, duplicates.LARGEST_DISTANCE),
    "duplicate_chroma": (-1, 1),
}


@dataclass(frozen=True)
class Clip:
    """A row of the table: where the clip is, its scores, and the decision; plain values, as JSON has them."""

    source: str
    start: int
    """Index of the first frame in the source."""
    end: int
    """Index after the last frame."""
    shot: int
    """Number of the shot in the source; parts of a long one share it."""
    fps: float
    height: int
    """Of the source, in pixels."""
    width: int
    crop: tuple
    """(top, left, height, width) in pixels: what is inside the letterbox. All other scores are of that."""
    motion: float
    """Percent of the diagonal per second; see `scores.movement`."""
    static_share: float
    brightness: float
    """Mean luma, 0 to 255."""
    contrast: float
    """Standard deviation of luma, in levels."""
    text: float
    """Score of the text detector."""
    phash: str
    """See `duplicates.hash_frames`."""
    chroma: str
    is_image: bool = False
    """Whether the source is a still image, of which no length and no movement is asked."""
    aesthetic: float | None = None
    """None until a scorer was asked."""
    reasons: tuple = ()
    """Why it is dropped, in the order of the checks: "short", "small", "static" ..."""
    details: dict = field(default_factory=dict)
    """reason -> a sentence with the value and the limit."""

    def __post_init__(self):  # lists, after a round trip through JSON
        object.__setattr__(self, "crop", tuple(self.crop))
        object.__setattr__(self, "reasons", tuple(self.reasons))

    @property
    def kept(self):
        """Whether nothing speaks against it."""
        return not self.reasons

    @property
    def num_frames(self):
        """Frames of the clip."""
        return self.end - self.start

    @property
    def pixels(self):
        """Pixels of a frame inside the letterbox."""
        return self.crop[2] * self.crop[3]

    @property
    def name(self):
        """How messages name it: "episode.mkv[120:240]"."""
        return self.source if self.is_image else f"{self.source}[{self.start}:{self.end}]"


# ---------------------------------------------------------------- measuring


def curate_video(stream, source, config, text_score=text_detection.text_score):
    """Splits a video into clips, scores them, and decides.

    Decodes once, with memory for `config.max_clip_frames` small frames and a few large ones, however long the
    video.

    Args:
        stream: `VideoStream` of `open_video`; or anything with `frames` (iterator of [H, W, 3] uint8 RGB) and
            `fps`.
        source: name of the video, for the table.
        config: `CurationConfig`.
        text_score: callable, frames [K, H, W, 3] uint8 RGB of the clip -> score.

    Returns:
        List of `Clip`, in order. Copies are found later, among the clips of all videos: `mark_duplicates`.

    Raises:
        InputError: from the stream, which is damaged.
    """
    clips, part = [], None
    for index, shot, frame, small in label_shots(stream.frames, config):
        if part and (part.shot != shot or part.end != index or len(part.small) == config.max_clip_frames):
            clips.append(part.clip(source, text_score))
            part = None
        part = part or _Part(index, shot)
        part.add(frame, small)
    if part:
        clips.append(part.clip(source, text_score))
    # of some files the true frame rate is known only now; motion so far is per frame
    rate = float(stream.fps)
    timed = (dataclasses.replace(clip, fps=rate, motion=clip.motion * rate) for clip in clips)
    return [decide(clip, config) for clip in timed]


def curate_image(frame, source, config, text_score=text_detection.text_score):
    """The `Clip` of a still image [H, W, 3] uint8 RGB; its `fps` is 0."""
    part = _Part(0, 0)
    part.add(frame, analysis_frame(frame))
    return decide(dataclasses.replace(part.clip(source, text_score), is_image=True), config)


class _Part:
    """A clip while its frames come in."""

    def __init__(self, start, shot):
        self.start, self.shot, self.small = start, shot, []
        self._letterbox, self._samples, self._stride, self._size = scores.Letterbox(), [], 1, None

    @property
    def end(self):
        return self.start + len(self.small)

    def add(self, frame, small):
        position = len(self.small)
        if position % _LETTERBOX_STEP == 0:
            self._letterbox.add(frame)
        if position % self._stride == 0:
            self._samples.append(_sample(frame))
            if len(self._samples) == 2 * _SAMPLES:  # the clip is longer than thought: every other one will do
                self._samples, self._stride = self._samples[::2], 2 * self._stride
        self._size = frame.shape[:2]
        self.small.append(small)

    def clip(self, source, text_score):
        """The `Clip` with all scores but `fps`, and `motion` per frame."""
        box = self._letterbox.box()
        frames = np.stack(self.small)
        if box[2:] != self._size:
            frames = np.stack([analysis_frame(frame) for frame in scores.crop(frames, box, self._size)])
        samples = scores.crop(np.stack(self._samples), box, self._size)
        chosen = np.linspace(0, len(samples) - 1, min(_SAMPLES, len(samples))).round().astype(int)
        motion, static_share = scores.movement(frames, fps=1)
        brightness, contrast = scores.light(frames)
        phash, chroma = duplicates.hash_frames(frames)
        return Clip(
            source=source,
            start=self.start,
            end=self.end,
            shot=self.shot,
            fps=0.0,
            height=self._size[0],
            width=self._size[1],
            crop=box,
            motion=motion,
            static_share=static_share,
            brightness=brightness,
            contrast=contrast,
            text=float(text_score(samples[chosen])),
            phash=phash,
            chroma=chroma,
        )


def _sample(frame):
    height, width = frame.shape[:2]
    scale = min(1, _SAMPLE_SIDE / min(height, width))
    return resized(frame, round(height * scale), round(width * scale))


# ---------------------------------------------------------------- deciding


def decide(clip, config):
    """The clip with `reasons` and `details` as its scores and the config say; earlier ones are forgotten."""
    details = {reason: why for reason, why in _faults(clip, config) if why}
    return dataclasses.replace(clip, reasons=tuple(details), details=details)


def _faults(clip, config):
    sides = clip.crop[2:]
    if not clip.is_image:
        yield "short", _below(clip.num_frames, config.min_frames, "{:g} frames")
    yield "small", _below(min(sides), config.min_side, "shorter side {:g} pixels")
    yield "large", _above(max(sides), config.max_side, "longer side {:g} pixels")
    if not clip.is_image:
        yield "low-fps", _below(clip.fps, config.min_fps, "{:.4g} frames per second")
        yield "high-fps", _above(clip.fps, config.max_fps, "{:.4g} frames per second")
        yield (
            "static",
            _above(clip.static_share, config.max_static_share, "{:.1%} of the steps show no new drawing"),
        )
        motion = "motion {:.3g} % of the diagonal per second"
        yield "little-motion", _below(clip.motion, config.min_motion, motion)
        yield "much-motion", _above(clip.motion, config.max_motion, motion)
    yield "dark", _below(clip.brightness, config.min_brightness, "brightness {:.3g}")
    yield "bright", _above(clip.brightness, config.max_brightness, "brightness {:.3g}")
    yield "low-contrast", _below(clip.contrast, config.min_contrast, "contrast {:.3g}")
    yield "text", _above(clip.text, config.max_text, "text {:.3g}")
    if clip.aesthetic is not None:
        yield "aesthetic", _below(clip.aesthetic, config.min_aesthetic, "aesthetic score {:.3g}")


def _below(value, limit, text):
    return limit is not None and value < limit and f"{text.format(value)}, at least {limit:g} wanted"


def _above(value, limit, text):
    return limit is not None and value > limit and f"{text.format(value)}, at most {limit:g} wanted"
