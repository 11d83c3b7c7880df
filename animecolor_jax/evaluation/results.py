"""What an evaluation found: the scores of every method, and how they were made."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.statistics import Summary, paired_difference, summarize

RESERVED_NAMES = ("sketch", "target")  # what `read_clip` calls the clips that no method made


@dataclass(frozen=True)
class Metric:
    """How a metric is shown and read."""

    label: str
    direction: str
    """What is better: "high", "low", or "one" (the nearer to 1, the better)."""
    digits: int
    """Digits after the point."""
    kind: str
    """Either "clip", a score for every clip, averaged; or "set", one score of all clips together."""
    unit: str = ""

    @property
    def arrow(self):
        """The direction as a sign: an arrow up or down, or one that points to 1."""
        return {"high": "↑", "low": "↓", "one": "→1"}[self.direction]

    def loss(self, value):
        """A number that is the smaller, the better `value` is."""
        return {"high": -value, "low": value, "one": abs(value - 1)}[self.direction]

    def format(self, value):
        """The number as tables show it."""
        return f"{value:.{self.digits}f}"


METRICS = {  # the paper's columns first, in its order
    "psnr": Metric("PSNR", "high", 2, "clip", "dB"),
    "ssim": Metric("SSIM", "high", 4, "clip"),
    "lpips_alex": Metric("LPIPS", "low", 4, "clip"),
    "sa": Metric("SA", "low", 4, "clip"),
    "fid": Metric("FID", "low", 2, "set"),
    "fvd_styleganv": Metric("FVD", "low", 2, "set"),
    "lpips_vgg": Metric("LPIPS (VGG)", "low", 4, "clip"),
    "fvd_videogpt": Metric("FVD (videogpt)", "low", 2, "set"),
    "edmd": Metric("EDMD", "low", 2, "clip", "px"),
    "tc_dis": Metric("TC (DIS)", "one", 3, "clip"),
    "flicker": Metric("Flicker", "low", 4, "clip"),
}


@dataclass(frozen=True)
class MethodResult:
    """The scores of one method. A score that does not exist is None: it is counted, never left out."""

    clip_scores: dict
    """{metric: {clip: float or None}} for the metrics of kind "clip"."""
    set_scores: dict
    """{metric: float or None} for the metrics of kind "set"."""
    frame_scores: dict = field(default_factory=dict)
    """{metric: {clip: [float of every frame]}}, for curves over time; any metrics and clips, or none."""


@dataclass(frozen=True)
class Result:
    """An evaluation of one or more methods on the same clips.

    Raises:
        InputError: a method is called "sketch" or "target".
        ValueError: an unknown metric, one that is neither skipped nor there in every method, or clips that
            only some of the methods have (what is undefined is None).
    """

    protocol: str
    clips: int
    frames: int
    """Of all clips together."""
    pixel_source: str
    """Where the pixels come from: lossless or compressed files, sizes, how they were resized."""
    metrics: tuple
    """Names in METRICS that were asked for, the skipped ones among them or not."""
    methods: dict
    """{name: MethodResult}, in the order of the tables; differences are taken to the first."""
    skipped: dict = field(default_factory=dict)
    """{metric: why nothing could be scored with it}."""
    networks: dict = field(default_factory=dict)
    """{network: {file: sha256}} of the networks that scored."""
    versions: dict = field(default_factory=dict)
    """{package: version}."""
    command: str = ""
    clip_frames: dict = field(default_factory=dict)
    """{clip: number of its frames}, where known."""

    def __post_init__(self):
        for name in self.methods:
            if name in RESERVED_NAMES:
                raise InputError(
                    f"a method is called {name!r}",
                    where="--generated",
                    expected=f"another name than {' and '.join(RESERVED_NAMES)}",
                    fix=f"name the folder, for instance my-{name}=DIR",
                )
        unknown = sorted({*self.metrics, *self.skipped} - set(METRICS))
        if unknown:
            raise ValueError(f"unknown metrics {unknown}, expected some of {list(METRICS)}")
        for name, method in self.methods.items():
            missing = [metric for metric in self.scored if metric not in _scores(method, metric)]
            if missing:
                raise ValueError(f"method {name!r} lacks the scores of {missing}, which are not skipped")
        for metric in self.scored:
            if METRICS[metric].kind == "clip":
                clips = [set(method.clip_scores[metric]) for method in self.methods.values()]
                alone = sorted(set().union(*clips) - set.intersection(*clips)) if clips else []
                if alone:
                    raise ValueError(f"not every method has a score or None in {metric!r} for {alone[:5]}")

    @property
    def shown(self):
        """Names of the metrics that were asked for or skipped, in the order of METRICS."""
        return [metric for metric in METRICS if metric in self.metrics or metric in self.skipped]

    @property
    def scored(self):
        """Those of `shown` that were not skipped."""
        return [metric for metric in self.shown if metric not in self.skipped]

    @cached_property
    def summaries(self):
        """{method: {metric: Summary}} of the scored metrics; set scores have neither interval nor clips."""
        return {
            name: {metric: _summary(method, metric) for metric in self.scored}
            for name, method in self.methods.items()
        }

    def differences(self):
        """{other method: {metric: Summary of other - first}} over the same clips, metrics of kind "clip"."""
        first, *others = self.methods
        metrics = [metric for metric in self.scored if METRICS[metric].kind == "clip"]
        return {
            other: {
                metric: paired_difference(*(self.methods[m].clip_scores[metric] for m in (other, first)))
                for metric in metrics
            }
            for other in others
        }

    def best(self, metric):
        """Names of the methods that are best as shown, ties included; none where there is one method."""
        if len(self.methods) < 2 or metric in self.skipped:
            return []
        shown, digits = METRICS[metric], METRICS[metric].digits
        means = {name: summaries[metric].mean for name, summaries in self.summaries.items()}
        losses = {
            name: round(shown.loss(round(mean, digits)), digits)
            for name, mean in means.items()
            if mean is not None
        }
        return [name for name, loss in losses.items() if loss == min(losses.values())]

    def as_json(self):
        """The result as one strict JSON object.

        Returns:
            {"protocol", "clips", "frames", "pixel_source",
             "methods": {name: {metric: mean or set score, null where skipped or undefined}},
             "skipped": {metric: reason},
             "intervals": {name: {metric: [low, high] or null}}, 95 %, for the metrics of kind "clip",
             "undefined": {name: {metric: [clips without that score]}}, only those there are,
             "networks": {network: {file: sha256}}, "versions": {package: version}, "command"}
            With one method its metrics also stand at the top level.
        """
        methods, intervals, undefined = {}, {}, {}
        for name, summaries in self.summaries.items():
            methods[name] = {
                metric: summaries[metric].mean if metric in summaries else None for metric in self.shown
            }
            intervals[name] = {
                metric: list(summary.interval) if summary.interval else None
                for metric, summary in summaries.items()
                if METRICS[metric].kind == "clip"
            }
            undefined[name] = {
                metric: list(summary.undefined) for metric, summary in summaries.items() if summary.undefined
            }
        top = next(iter(methods.values())) if len(methods) == 1 else {}
        return {
            "protocol": self.protocol,
            "clips": self.clips,
            "frames": self.frames,
            "pixel_source": self.pixel_source,
            **top,
            "methods": methods,
            "skipped": dict(self.skipped),
            "intervals": intervals,
            "undefined": {name: metrics for name, metrics in undefined.items() if metrics},
            "networks": self.networks,
            "versions": self.versions,
            "command": self.command,
        }


def _scores(method, metric):
    return method.clip_scores if METRICS[metric].kind == "clip" else method.set_scores


def _summary(method, metric):
    if METRICS[metric].kind == "clip":
        return summarize(method.clip_scores[metric])
    score = method.set_scores[metric]
    return Summary(None if score is None or not math.isfinite(score) else float(score), None, 0, ())
