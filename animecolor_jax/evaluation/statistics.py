"""Means over clips and how sure they are.

Clips, not frames, are resampled: frames of a clip are alike, and an interval over frames would be far too
narrow. The intervals are BCa ones, not plain percentiles: scores of clips are few and skewed (a still clip
reaches 100 dB, a lost shot has a huge error), and BCa corrects the bias and the skew to the second order.

Source: B. Efron, Better Bootstrap Confidence Intervals, JASA 82 (1987), as scipy.stats.bootstrap has it.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0
_BATCH_VALUES = 2**22  # resampled at once: 32 MiB


@dataclass(frozen=True)
class Summary:
    """The mean of a metric over clips."""

    mean: float | None
    """None where no clip has a score."""
    interval: tuple | None
    """(low, high) of the mean; None for fewer than two clips."""
    clips: int
    """With a score: those that the mean and the interval are of."""
    undefined: tuple
    """Names of the clips that have none."""

    def excludes(self, value):
        """Whether the interval is there and lies on one side of `value`."""
        return self.interval is not None and not self.interval[0] <= value <= self.interval[1]


def summarize(scores, *, confidence=CONFIDENCE, resamples=RESAMPLES, seed=SEED):
    """The mean over clips and its bootstrap interval.

    Args:
        scores: {clip: float}; None and numbers that are not finite are undefined.
        confidence: of the interval, in (0, 1).
        resamples: draws of as many clips as there are, with replacement.
        seed: of the draws; the same scores give the same interval, in whatever order they stand.
    """
    defined = {clip: scores[clip] for clip in sorted(scores) if is_defined(scores[clip])}
    undefined = tuple(clip for clip in sorted(scores) if clip not in defined)
    values = np.array(list(defined.values()), np.float64)
    if not len(values):
        return Summary(None, None, 0, undefined)
    mean = math.fsum(values) / len(values)
    return Summary(mean, _interval(values, mean, confidence, resamples, seed), len(values), undefined)


def paired_difference(scores, baseline, **options):
    """The mean of scores - baseline over clips, bootstrapped in pairs: each draw takes both scores of a clip.

    What the clips have in common (some are harder than others) cancels, so that two methods whose own
    intervals overlap can still differ clearly.

    Args:
        scores, baseline: {clip: float} of two methods; a clip is undefined where either of its scores is.
        options: as of `summarize`.

    Raises:
        ValueError: the two are not of the same clips.
    """
    if scores.keys() != baseline.keys():
        alone = sorted(scores.keys() ^ baseline.keys())
        raise ValueError(f"scores of different clips: {alone[:5]} in one of them only")
    pairs = {clip: (scores[clip], baseline[clip]) for clip in scores}
    differences = {
        clip: pair[0] - pair[1] if all(map(is_defined, pair)) else None for clip, pair in pairs.items()
    }
    return summarize(differences, **options)


def is_defined(score):
    """Whether a score is a finite number."""
    return score is not None and math.isfinite(score)


def _interval(values, mean, confidence, resamples, seed):
    if len(values) < 2:
        return None
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # no spread at all: BCa would divide 0 by 0
        return mean, mean
    found = stats.bootstrap(
        (values,),
        np.mean,
        batch=max(1, _BATCH_VALUES // len(values)),
        n_resamples=resamples,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low + high) else None
