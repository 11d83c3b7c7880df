"""The plots of the report: scores of the clips, scores of sets, and scores over time."""

import contextlib
import warnings

import numpy as np

from animecolor_jax.evaluation.results import METRICS
from animecolor_jax.evaluation.statistics import is_defined
from animecolor_jax.evaluation.tables import missing_extra

COLORS = ("#0b6fb8", "#d95f02", "#1b9e77", "#c2559d", "#b8860b", "#4aa8d8", "#6b6b6b", "#7a4fbf")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#b9bfc8",
    "axes.labelcolor": "#3d4450",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5b6472",
    "ytick.color": "#22262e",
    "grid.color": "#e4e7ec",
    "savefig.facecolor": "white",
}
_WIDTH = 6.2  # inches
_DPI = 160
_FAR = 5  # interquartile ranges beyond which a clip is drawn at the edge
_BAND = (10, 90)  # percentiles of the clips


def plot_clips(result, metric, path):
    """Every clip's score, quartiles, and the mean with its interval, a line per method; writes a PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    names, shown = list(result.methods), METRICS[metric]
    scores = {name: _defined(result.methods[name].clip_scores[metric]) for name in names}
    summaries = {name: result.summaries[name][metric] for name in names}
    low, high = _view(np.concatenate(list(scores.values())), summaries.values())
    rng = np.random.default_rng(0)  # of the jitter
    with _figure(path, 1.05 + 0.52 * len(names)) as axes:
        for place, (name, values) in enumerate(scores.items()):
            color, summary = COLORS[place % len(COLORS)], summaries[name]
            if not len(values):
                across = axes.get_yaxis_transform()
                axes.text(0.5, place, "no score", transform=across, va="center", ha="center")
                continue
            quartiles = np.percentile(values, (25, 75))
            axes.barh(place, np.ptp(quartiles), 0.5, left=quartiles[0], color=color, alpha=0.13, linewidth=0)
            heights = place + rng.uniform(-0.2, 0.2, len(values))
            alpha = float(np.clip(25 / len(values), 0.12, 0.55))
            below, above = values < low, values > high
            for marker, size, those in (("o", 13, ~below & ~above), ("<", 28, below), (">", 28, above)):
                shown_at = np.clip(values[those], low, high)
                axes.scatter(shown_at, heights[those], size, color, marker=marker, alpha=alpha, linewidths=0)
            if summary.interval:
                axes.plot(summary.interval, (place, place), "-|", color=color, linewidth=2.2, markersize=9)
            axes.plot(summary.mean, place, "D", color=color, markersize=5, markeredgecolor="white")
        if shown.direction == "one":
            axes.axvline(1, color="#22262e", linewidth=0.9, linestyle="--", zorder=0)
        _note_far_clips(axes, metric, scores, low, high)
        _name_rows(axes, names)
        _title(axes, metric)


def plot_sets(result, metric, path):
    """The score of every method as a bar; writes a PNG. Raises as `plot_clips` does."""
    names = list(result.methods)
    with _figure(path, 0.95 + 0.42 * len(names)) as axes:
        for place, name in enumerate(names):
            mean = result.summaries[name][metric].mean
            if mean is not None:
                axes.barh(place, mean, 0.55, color=COLORS[place % len(COLORS)], alpha=0.85, linewidth=0)
            text = "no score" if mean is None else METRICS[metric].format(mean)
            axes.annotate(text, (mean or 0, place), (5, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        _name_rows(axes, names)
        _title(axes, metric)


def plot_frames(result, metric, path):
    """The mean over clips of every frame, with the middle 80 % of the clips; writes a PNG. Raises as above.

    Clips may differ in length: a frame's mean is over those that reach it.
    """
    with _figure(path, 3.0) as axes:
        curves = []
        for place, (name, method) in enumerate(result.methods.items()):
            clips = method.frame_scores.get(metric)
            if not clips:
                continue
            color = COLORS[place % len(COLORS)]
            mean, low, high = frame_curve(list(clips.values()))
            steps = np.arange(len(mean))
            if len(clips) > 1:
                axes.fill_between(steps, low, high, color=color, alpha=0.09, linewidth=0)
            marker = "." if len(mean) < 3 else None
            curves += axes.plot(steps, mean, color=color, linewidth=1.8, marker=marker, label=_plain(name))
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("frame")
        if len(result.methods) > 1:
            place = {"loc": "outside lower left", "ncols": 2}
            axes.figure.legend(handles=curves, frameon=False, fontsize=8.5, **place)
        _title(axes, metric)


def frame_curve(clips):
    """The mean and the 10th and 90th percentile over clips, frame by frame.

    Args:
        clips: lists of scores of frames, of any lengths; None and NaN are left out.

    Returns:
        three [T] float64 arrays, T frames of the longest clip; NaN where no clip has a score.
    """
    table = np.full((len(clips), max(map(len, clips))), np.nan)
    for row, scores in zip(table, clips, strict=True):
        row[: len(scores)] = [score if is_defined(score) else np.nan for score in scores]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a frame that no clip has a score of
        return np.nanmean(table, axis=0), *np.nanpercentile(table, _BAND, axis=0)


@contextlib.contextmanager
def _figure(path, height):
    """Axes of a new figure of `height` inches, written to `path` in the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "the plots of the report") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure.add_subplot()
        figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})


def _defined(scores):
    return np.array([score for score in scores.values() if is_defined(score)], np.float64)


def _view(values, summaries):
    """The (low, high) to show: all clips, unless some are so far out that they would squeeze the others."""
    if not len(values):
        return 0.0, 1.0
    first, third = np.percentile(values, (25, 75))
    reach = _FAR * (third - first)
    shown = [*values[(values >= first - reach) & (values <= third + reach)]]
    for summary in summaries:
        shown += summary.interval or ([] if summary.mean is None else [summary.mean])
    return min(shown), max(shown)


def _note_far_clips(axes, metric, scores, low, high):
    values = np.concatenate(list(scores.values()))
    far = values[(values < low) | (values > high)]
    if len(far):
        text = METRICS[metric].format
        span = text(far[0]) if len(far) == 1 else f"{text(far.min())} to {text(far.max())}"
        what = "triangle: a clip" if len(far) == 1 else f"triangles: {len(far)} clips"
        axes.set_xlabel(f"{what} beyond the axis, at {span}", fontsize=8)


def _name_rows(axes, names):
    axes.set_yticks(range(len(names)), [_plain(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _title(axes, metric):
    shown = METRICS[metric]
    better = {"high": "higher is better", "low": "lower is better", "one": "nearer to 1 is better"}[
        shown.direction
    ]
    unit = f" [{shown.unit}]" if shown.unit else ""
    axes.set_title(f"{shown.label}{unit}")
    axes.set_title(better, loc="right", fontsize=8.5, fontweight="normal", color="#5b6472")


def _plain(text, letters=40):
    """Text that matplotlib neither reads as a formula nor, for a leading underscore, hides; cut if long."""
    text = " ".join(text.split())
    text = text if len(text) <= letters else text[: letters - 1] + "…"
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")
