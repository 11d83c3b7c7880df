"""Training sketches in many hands: a mix of extractors, and lines that are wider, thinner, softer or paler.

Everything is drawn once per clip, as a pure function of a NumPy Generator, so that nothing flickers.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.sketch import Extractor, XDoG, to_grey


@dataclass(frozen=True)
class LineStyle:
    """How the lines of one clip are drawn; the default leaves a sketch (dark on white) as it is.

    Attributes:
        threshold: factor of the extractor's threshold.
        line_width: pixels that every line gains; negative ones thin, and pale lines that are thinner.
        softness: sigma of a blur in pixels: sharp pen, or the edges of a scanned pencil.
        ink: grey level of what was black, 0 to 255: ink, or a pencil's grey.
    """

    threshold: float = 1.0
    line_width: float = 0.0
    softness: float = 0.0
    ink: float = 0.0

    def __call__(self, sketch):
        """Sketch [T, H, W] uint8 -> the same in this style; `threshold` has no part in it."""
        tones = np.rint(255 - (255 - np.arange(256)) * (1 - self.ink / 255)).astype(np.uint8)
        sketch = np.stack([_widen(frame, self.line_width) for frame in to_grey(sketch)])
        if self.softness > 0:
            sketch = np.stack([cv2.GaussianBlur(frame, (0, 0), self.softness) for frame in sketch])
        return tones[sketch]


def _widen(frame, pixels):
    """Lines of [H, W] uint8 made wider by `pixels`, half on each side; fractions are blended."""
    change = cv2.erode if pixels > 0 else cv2.dilate  # a minimum filter spreads dark lines
    steps, part = divmod(abs(pixels) / 2, 1)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    frame = change(frame, cross, iterations=int(steps)) if steps else frame
    return cv2.addWeighted(frame, 1 - part, change(frame, cross), part, 0) if part else frame


@dataclass(frozen=True)
class SketchAugmentation:
    """The line styles that training draws from: ranges (least, most) are uniform.

    Attributes:
        probability: share of clips whose style is drawn; the rest keep the extractor's own.
        threshold_octaves: thresholds are multiplied by 2 to the power of -octaves to +octaves.
        line_width: pixels; softness: pixels; ink: grey levels. As in `LineStyle`.
    Raises:
        InputError: a range that is reversed or leaves what `LineStyle` allows.
    """

    probability: float = 0.5
    threshold_octaves: float = 0.7
    line_width: tuple[float, float] = (-0.7, 1.5)
    softness: tuple[float, float] = (0.0, 0.7)
    ink: tuple[float, float] = (0.0, 110.0)

    def __post_init__(self):
        for name, value, (least, most) in (
            ("probability", (self.probability,), (0, 1)),
            ("threshold_octaves", (self.threshold_octaves,), (0, 4)),
            ("line_width", self.line_width, (-8, 8)),
            ("softness", self.softness, (0, 8)),
            ("ink", self.ink, (0, 254)),
        ):
            if not least <= value[0] <= value[-1] <= most:
                raise InputError(
                    f"{name} is {getattr(self, name)}",
                    where="SketchAugmentation",
                    expected=f"{least} to {most}" + (", the smaller first" if len(value) > 1 else ""),
                )

    def draw(self, rng):
        """One clip's `LineStyle`, from a NumPy Generator. It takes as many numbers whatever they are."""
        changed = rng.random() < self.probability
        octaves = rng.uniform(-self.threshold_octaves, self.threshold_octaves)
        ranges = self.line_width, self.softness, self.ink
        style = LineStyle(2**octaves, *(rng.uniform(*limits) for limits in ranges))
        return style if changed else LineStyle()


@dataclass(frozen=True)
class ClipSketcher:
    """An extractor and a style, for all frames of a clip: [T, H, W, 3] uint8 RGB -> [T, H, W] uint8."""

    extractor: Extractor
    style: LineStyle = LineStyle()

    def __call__(self, frames):
        return self.style(self.extractor.with_threshold(self.style.threshold)(frames))


@dataclass(frozen=True)
class SketchMix:
    """What training sketches are made with: extractors of dark lines, weights (of any sum), and styles.

    Raises:
        InputError: no extractors, or weights that do not fit them.
    """

    extractors: tuple[Extractor, ...] = (XDoG(),)
    weights: tuple[float, ...] = (1.0,)
    augmentation: SketchAugmentation = SketchAugmentation(probability=0.0)

    def __post_init__(self):
        good = all(0 <= weight < math.inf for weight in self.weights) and sum(self.weights) > 0
        if not good or len(self.weights) != len(self.extractors):
            raise InputError(
                f"{len(self.extractors)} extractors with weights {self.weights}",
                where="SketchMix",
                expected="a weight of 0 or more for each, not all 0",
            )

    def draw(self, rng):
        """One clip's `ClipSketcher`, from a NumPy Generator."""
        choice = rng.choice(len(self.extractors), p=np.array(self.weights) / sum(self.weights))
        return ClipSketcher(self.extractors[choice], self.augmentation.draw(rng))
