"""The swap test: with the same sketches and another reference, do the colours follow the reference?

PSNR cannot tell a model that reads its reference from one that guesses colours well. Here the reference says
other colours than the sketches' own clip has: only a model that reads it takes them over.
"""

from dataclasses import dataclass

from scipy.stats import binomtest

from animecolor_jax.evaluation.statistics import CONFIDENCE
from animecolor_jax.metrics.palette import COLORS, palette, palette_distance


@dataclass(frozen=True)
class SwapSummary:
    """What a swap test found."""

    share: float
    """Of the clips, those whose palette is nearer to the new reference."""
    interval: tuple[float, float]
    """(low, high) of the share: Wilson's 95 % interval, which holds for few clips and for shares near 1."""
    nearer: int
    clips: int
    further: tuple
    """Names of the clips that are not nearer: those to look at."""

    def __str__(self):
        low, high = self.interval
        share = f"{self.share:.1%} of {self.clips} clips are nearer to the new reference"
        return f"{share} ({CONFIDENCE:.0%} interval {low:.1%} to {high:.1%})"


def swap_result(generated, new_reference, old_reference, *, colors=COLORS, seed=0):
    """Whether a clip is coloured like its new reference, by earth mover's distances between palettes.

    Args:
        generated: [T, H, W, 3] uint8, coloured from the new reference.
        new_reference, old_reference: [h, w, 3] or [T, h, w, 3] uint8. They should show the same drawing, as
            areas count: a red house on a small and on a large part of the picture are different palettes.
        colors: of a palette. seed: of its k-means.

    Returns:
        {"to_new", "to_old": Delta E, "nearer": whether it is nearer to the new one; not if as far}.

    Raises:
        InputError: frames of another shape or dtype.
    """
    own, new, old = (palette(frames, colors, seed) for frames in (generated, new_reference, old_reference))
    to_new, to_old = palette_distance(own, new), palette_distance(own, old)
    return {"to_new": to_new, "to_old": to_old, "nearer": to_new < to_old}


def summarize_swaps(results):
    """The share of clips that follow their new reference.

    Args:
        results: {clip: dict of `swap_result`}, at least one.

    Returns:
        `SwapSummary`.

    Raises:
        ValueError: there are no results.

    Source: of the interval, Wilson 1927.
    """
    if not results:
        raise ValueError("results of no clip, expected at least one")
    further = tuple(clip for clip in sorted(results) if not results[clip]["nearer"])
    clips = len(results)
    test = binomtest(clips - len(further), clips)
    found = test.proportion_ci(CONFIDENCE, method="wilson")
    return SwapSummary(test.statistic, (float(found.low), float(found.high)), test.k, clips, further)
