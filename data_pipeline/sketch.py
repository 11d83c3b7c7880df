"""Line art from colour frames: XDoG as the reference has it, and other extractors behind one interface.

Sketches are [T, H, W] uint8: 255 is paper, 0 a line, between them pencil. Every frame is treated by itself.
"""

import functools
import inspect
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import cv2
import numpy as np

from animecolor_jax.errors import InputError


class Extractor(Protocol):
    """Makes line art of a clip. One that has weights loads them when it is made.

    Attributes:
        name: its name in `EXTRACTORS`, for records.
    """

    name: str

    def __call__(self, frames):
        """Frames [T, H, W, 3] uint8 RGB -> sketch [T, H, W] uint8."""

    def with_threshold(self, factor):
        """The same extractor, its threshold times `factor`: above 1 fewer lines, below 1 more."""


def extractor(name, **options):
    """Makes the extractor `name`; `options` are its fields, such as `sigma` of "xdog".

    Raises:
        InputError: there is no such extractor, or it has no such option.
    """
    if name not in EXTRACTORS:
        raise InputError(
            f"unknown extractor {name!r}", where="extractor", expected=f"one of {', '.join(EXTRACTORS)}"
        )
    known = inspect.signature(EXTRACTORS[name]).parameters
    for option in options:
        if option not in known:
            raise InputError(
                f"{name!r} has no option {option!r}", where="extractor", expected=f"of {', '.join(known)}"
            )
    return EXTRACTORS[name](**options)


def to_grey(frames):
    """Frames [T, H, W, 3] uint8 RGB (or grey [T, H, W], which is returned) -> [T, H, W] uint8.

    Raises:
        InputError: another shape or dtype, or no pixels.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or not frames.size or frames.shape[3:] not in ((), (3,)) or frames.ndim < 3:
        raise InputError(
            f"{frames.dtype} of shape {list(frames.shape)}",
            where="frames",
            expected="uint8 RGB [T, H, W, 3] or grey [T, H, W] with at least one pixel",
        )
    if frames.ndim == 3:
        return frames
    return np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames])


# ---------------------------------------------------------------- XDoG


@dataclass(frozen=True)
class XDoG:
    """Extended difference of Gaussians, bit for bit as the official extraction script computes it.

    `dog = g1 - gamma * g2` of two blurred grey images, divided by its maximum over the frame. A pixel is
    paper where `1 + tanh(phi * (dog - epsilon / 255)) >= 1`. The blurs are OpenCV's of 8-bit images: in
    fixed point and rounded to 8 bits. Where the maximum is not positive (a black frame), the script
    divides by zero; here such a frame has no lines.

    Attributes:
        sigma: of the finer blur in pixels; sigma and k * sigma lie between 0.1 and 10.
        k: the coarser blur's sigma, in units of `sigma`.
        gamma: weight of the coarser blur, a multiple of 0.001 from 0 to 1.
        epsilon: threshold in 1/255 of the maximum, above -255 and at most 0; nearer to 0 are more lines.
        phi: steepness of the grey levels, from 1 up; of no influence where `binarize` is set.
        binarize: only 0 and 255, as the script writes. Otherwise the grey levels before that: 255 where
            the binary sketch has it, below that the response in 1/255, rounded down. (Its thresholds are
            multiples of 1/32768 of the maximum, so that integers suffice.)
        light_lines: light lines on dark ground instead.
    Raises:
        InputError: a value outside its range.
    Source: XDoG (Winnemoeller 2011); detector and DoG_filter of extract_sketch_from_vid.py.
    """

    sigma: float = 1.0
    k: float = 1.6
    gamma: float = 0.98
    epsilon: float = -1.3
    phi: float = 50.0
    binarize: bool = True
    light_lines: bool = False

    def __post_init__(self):
        for name, value, good, expected in (
            ("sigma", self.sigma, 0.1 <= self.sigma <= 10, "0.1 to 10 pixels"),
            ("k", self.k, 0.1 <= self.sigma * self.k <= 10, "k * sigma of 0.1 to 10 pixels"),
            ("gamma", self.gamma, self.gamma in _GAMMAS, "a multiple of 0.001 from 0 to 1"),
            ("epsilon", self.epsilon, -255 < self.epsilon <= 0, "above -255, at most 0"),
            ("phi", self.phi, 1 <= self.phi < math.inf, "1 or more"),
        ):
            if not good:
                raise InputError(f"{name} is {value!r}", where="XDoG", expected=expected)

    @property
    def name(self):
        return "xdog" if self.binarize else "xdog-soft"

    def with_threshold(self, factor):
        return replace(self, epsilon=self.epsilon * factor)

    def blurred(self, grey):
        """(g1, g2), each uint8, of one frame [H, W] uint8."""
        return tuple(cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (self.sigma, self.sigma * self.k))

    def response(self, frames):
        """`1 + tanh(...)` as the script has it before binarisation, [T, H, W] float64 in [0, 2]."""
        blurs = [self.blurred(frame) for frame in to_grey(frames)]
        dogs = np.stack([g1 - self.gamma * g2 for g1, g2 in blurs])
        return self._response(dogs, dogs.max((1, 2), keepdims=True))

    def _response(self, dog, peak):
        ratio = np.divide(dog, peak, out=np.ones(np.broadcast_shapes(dog.shape, peak.shape)), where=peak > 0)
        return 1 + np.tanh(self.phi * (ratio - self.epsilon / 255))

    def __call__(self, frames):
        sketch = np.stack([self._sketch(frame) for frame in to_grey(frames)])
        return 255 - sketch if self.light_lines else sketch

    def _sketch(self, grey):
        """One frame [H, W]; by itself, because all of its arrays fit in the processor's cache."""
        g1, g2 = self.blurred(grey)
        order = dog_order(self.gamma)
        coarse = order.weight * np.arange(256, dtype=np.int32) - order.tie
        keys = np.int32(order.scale) * g1 - cv2.LUT(g2, coarse)
        peak = keys.max()
        sketch = (keys >= self.paper_thresholds(peak)).view(np.uint8) * np.uint8(255)
        if not self.binarize:
            lines = sketch == 0
            depths = self.level_depths() * (int(peak) // order.steps) >> DEPTH_BITS
            sketch[lines] = np.searchsorted(-depths * order.steps, keys[lines], side="right")
        return sketch

    def paper_thresholds(self, peaks):
        """The smallest key (see `dog_order`) that is paper, for the maxima `peaks` of frames; [...] int32."""
        order = dog_order(self.gamma)
        peak = np.searchsorted(order.keys, peaks)
        low, high = np.zeros_like(peak), peak.copy()  # the maximum itself is paper: epsilon <= 0
        while (low < high).any():
            middle = (low + high) // 2
            paper = self._response(order.dogs[middle], order.dogs[peak]) >= 1
            low, high = np.where(paper, low, middle + 1), np.where(paper, middle, high)
        return order.keys[high]

    def level_depths(self):
        """How far below 0 dog / maximum may be for grey levels 1 to 254, in 2**-DEPTH_BITS; [254] int64."""
        levels = np.arange(1, 255) / 255
        return np.floor((-self.epsilon / 255 - np.arctanh(levels - 1) / self.phi) * 2**DEPTH_BITS).astype(int)


DEPTH_BITS = 15
_GAMMAS = frozenset(step / 1000 for step in range(1001))


@dataclass(frozen=True)
class DogOrder:
    """Integer keys `scale * g1 - weight * g2 + tie[g2]` that sort all (g1, g2) as float64 dogs do.

    Attributes:
        scale, weight: below 2**11, so that keys are below 2**19.
        steps: key // steps is g1 - gamma * g2 in exact arithmetic, in units of steps / scale.
        tie: [256] int32, below `steps`.
        keys: [N] int32, all that occur, ascending.
        dogs: [N] float64, `g1 - gamma * g2` of those keys, ascending.
    """

    scale: int
    weight: int
    steps: int
    tie: np.ndarray
    keys: np.ndarray
    dogs: np.ndarray


@functools.lru_cache(maxsize=64)
def dog_order(gamma):
    """`DogOrder` for a gamma = p / q that is a multiple of 0.001.

    Whether a pixel is paper is decided by float64 rounding where dog / maximum equals epsilon / 255
    exactly (at gamma 0.98 and epsilon -1.3 for maxima 51, 102, 153 ...), so the order of dogs that
    should be equal counts as well. `q * g1 - p * g2` sorts those that differ; equal ones have g2 that
    differ by multiples of q and are sorted by the rounding error of gamma * g2.
    """
    exact = Fraction(round(gamma * 1000), 1000)
    q = exact.denominator
    error = [Fraction(gamma * g2) - exact * g2 for g2 in range(256)]
    tie = np.zeros(256, np.int32)
    for residue in range(min(q, 256)):
        errors = sorted({error[g2] for g2 in range(residue, 256, q)}, reverse=True)
        for g2 in range(residue, 256, q):
            tie[g2] = errors.index(error[g2])
    steps = int(tie.max()) + 1
    scale, weight = steps * q, steps * exact.numerator
    levels = np.arange(256, dtype=np.int32)
    keys, first = np.unique(scale * levels[:, None] - weight * levels + tie, return_index=True)
    dogs = (levels[:, None] - gamma * levels).ravel()[first]
    assert (np.diff(dogs) >= 0).all()
    return DogOrder(scale, weight, steps, tie, keys, dogs)


def gaussian_kernel(sigma):
    """OpenCV's kernel for blurring 8-bit images, in 1/256: a tuple of odd length that sums to 256.

    Weights are rounded from the edge inwards, each taking over the last one's rounding error, and the
    centre is what remains.

    Source: createGaussianKernels in OpenCV's modules/imgproc/src/smooth.dispatch.cpp.
    """
    size = round(sigma * 3 * 2 + 1) | 1
    weights, error, half = cv2.getGaussianKernel(size, sigma)[:, 0] * 256, 0.0, []
    for weight in weights[: size // 2]:
        half.append(round(weight + error))
        error += weight - half[-1]
    return (*half, 256 - 2 * sum(half), *half[::-1])


# ---------------------------------------------------------------- other extractors


@dataclass(frozen=True)
class Canny:
    """Canny's edges: lines one pixel wide on both sides of an ink line, and wherever two colours meet.

    Attributes:
        low, high: hysteresis thresholds of the gradient (Sobel 3x3, |dx| + |dy|), in grey levels.
        sigma: of the blur before, in pixels.
    Raises:
        InputError: thresholds that are negative or in the wrong order, or a sigma that is not positive.
    """

    low: float = 40.0
    high: float = 120.0
    sigma: float = 1.0

    def __post_init__(self):
        if not (0 <= self.low <= self.high and self.sigma > 0):
            raise InputError(f"is {self}", where="Canny", expected="0 <= low <= high, and a positive sigma")

    name = "canny"

    def with_threshold(self, factor):
        return replace(self, low=self.low * factor, high=self.high * factor)

    def __call__(self, frames):
        smooth = [cv2.GaussianBlur(frame, (0, 0), self.sigma) for frame in to_grey(frames)]
        return 255 - np.stack([cv2.Canny(frame, self.low, self.high) for frame in smooth])


@dataclass(frozen=True)
class Ink:
    """The ink that is in the frames: what is darker than both its sides, and not where two colours meet.

    Black top hat (grey closing minus frame) with a disc: ink lines keep their width and their tone, and sharp
    corners of dark areas count as ink.

    Attributes:
        width: lines narrower than this many pixels are ink; odd.
        threshold: contrast with the surroundings from which on a pixel is drawn, in grey levels.
        contrast: of a line that is drawn black, in grey levels.
    Raises:
        InputError: an even or too small width, or threshold and contrast in the wrong order.
    """

    width: int = 7
    threshold: float = 8.0
    contrast: float = 50.0

    def __post_init__(self):
        if self.width < 3 or self.width % 2 == 0 or not 0 <= self.threshold < self.contrast:
            raise InputError(
                f"is {self}", where="Ink", expected="an odd width of 3 or more, and 0 <= threshold < contrast"
            )

    name = "ink"

    def with_threshold(self, factor):
        return replace(self, threshold=min(self.threshold * factor, self.contrast - 1))

    def __call__(self, frames):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (self.width, self.width))
        depth = np.stack([cv2.morphologyEx(frame, cv2.MORPH_BLACKHAT, disc) for frame in to_grey(frames)])
        levels = (np.arange(256) - self.threshold) / (self.contrast - self.threshold)
        return np.rint(255 - 255 * np.clip(levels, 0, 1)).astype(np.uint8)[depth]


EXTRACTORS = {"xdog": XDoG, "xdog-soft": functools.partial(XDoG, binarize=False), "canny": Canny, "ink": Ink}
