"""Training curves: what the stages of a run logged, as one picture."""

import math

import numpy as np

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.plots import COLORS, STYLE
from animecolor_jax.evaluation.tables import missing_extra
from animecolor_jax.replacing import replacing

TRAINING, VALIDATION, PSNR = COLORS[0], COLORS[1], COLORS[2]
SMOOTHING = 0.04  # part of a stage's steps that the smoothed loss is a mean over
_PANEL = (3.4, 2.5)  # inches
_COLUMNS = 3  # at most
_DPI = 150


def draw_curves(runs, path):
    """Training and validation losses of every stage, a panel each; writes a PNG.

    The loss of every step is light, its mean over nearby steps dark; validations are points, with bars of one
    standard error where it was logged. Where validations have a PSNR, it stands on an axis of its own, to the
    right, or as a number above the panel if there is only one. Losses are on a logarithmic axis; what is not
    a finite number leaves a gap.

    Args:
        runs: {stage: records of `train.run_log.read_metrics`}; used are "step", "kind" ("train" or
            "validation"), "loss", "standard_error" and "psnr", of which any but the first two may be missing.
        path: of the file, which appears only when it is complete.

    Raises:
        InputError: no runs, one without a loss or PSNR to draw, or matplotlib is not installed.
    """
    if not runs:
        raise InputError("no runs", where="draw_curves", expected="records of one stage or more")
    stages = {stage: read_curves(records) for stage, records in runs.items()}
    for stage, curves in stages.items():
        if not any(np.isfinite(values[1]).any() for values in curves.values()):
            raise InputError(
                "nothing to draw", where=f"run of {stage}", expected="records with a loss or PSNR",
                fix="leave that stage out, or wait until it has made a step",
            )  # fmt: skip
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "the training curves") from error
    rows = -(-len(stages) // _COLUMNS)
    columns = -(-len(stages) // rows)  # 4 stages: 2 rows of 2
    with matplotlib.rc_context(STYLE), replacing(path) as partial:
        figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1] + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn = {}
        for axes, (stage, curves) in zip(panels, stages.items(), strict=False):
            drawn |= _draw(axes, stage, curves)
        for axes in panels[len(stages) :]:
            axes.remove()
        place = {"loc": "outside lower center", "ncols": len(drawn) if columns > 1 else 1}
        figure.legend(drawn.values(), drawn.keys(), frameon=False, fontsize=8.5, **place)
        figure.savefig(partial, dpi=_DPI, format="png", metadata={"Software": None})


def read_curves(records):
    """What there is to draw of a run.

    Returns:
        {"train": (steps, losses), "validation": (steps, losses, standard errors), "psnr": (steps, dB)}:
        [N] arrays, float64 but the steps; NaN where a record has no number.
    """
    kinds = {kind: [one for one in records if one["kind"] == kind] for kind in ("train", "validation")}
    train, validation = kinds["train"], [one for one in kinds["validation"] if one.get("loss") is not None]
    scored = [one for one in kinds["validation"] if one.get("psnr") is not None]
    return {
        "train": _columns(train, "loss"),
        "validation": _columns(validation, "loss", "standard_error"),
        "psnr": _columns(scored, "psnr"),
    }


def smooth(values, width):
    """Means over `width` neighbours of every value, half before and half after it; fewer at the ends.

    Args:
        values: [N] float64; NaN is left out of the means, and remains NaN.
        width: 1 or more; an even one counts as the next odd one.
    """
    half, there = width // 2, np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(of)]) for of in (np.where(there, values, 0), there.astype(float))
    )
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(there, means, math.nan)


def _columns(records, *names):
    found = [[one.get(name) for one in records] for name in names]
    steps = np.array([one["step"] for one in records], np.int64)
    return steps, *(np.array([math.nan if x is None else x for x in column]) for column in found)


def _draw(axes, stage, curves):
    """Draws one stage. Returns {label: what stands for it in the legend}."""
    drawn = {}
    steps, losses = curves["train"]
    if len(steps):
        width = max(1, round(SMOOTHING * len(steps)))
        axes.plot(steps, losses, color=TRAINING, alpha=0.25, linewidth=0.6)
        drawn["training loss"] = axes.plot(steps, smooth(losses, width), color=TRAINING, linewidth=1.6)[0]
    steps, losses, errors = curves["validation"]
    if len(steps):
        bars = np.nan_to_num(errors)  # 0: none
        drawn["validation loss, ± 1 standard error"] = axes.errorbar(
            steps, losses, bars, color=VALIDATION, marker="o", markersize=3.2, linewidth=1.1, elinewidth=1.1,
            capsize=2.2,
        )  # fmt: skip
    _scale_losses(axes)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.set_title(stage, parse_math=False)
    axes.set_xlabel("step")
    steps, decibels = curves["psnr"]
    if len(steps) == 1:
        note = {"loc": "right", "fontsize": 8.5, "fontweight": "normal", "color": PSNR}
        axes.set_title(f"PSNR {decibels[0]:.2f} dB, step {steps[0]}", **note)
    elif len(steps):
        right = axes.twinx()
        drawn["validation PSNR [dB], right axis"] = right.plot(
            steps, decibels, color=PSNR, marker="s", markersize=3.2, linewidth=1.1, linestyle="--"
        )[0]
        right.spines["right"].set_visible(True)
        right.tick_params(axis="y", colors=PSNR)
        right.margins(x=0.02)
    return drawn


def _scale_losses(axes):
    """A logarithmic axis with plain numbers, of which a loss has few decades: mostly one or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
