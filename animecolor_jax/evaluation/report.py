"""One HTML page about an evaluation, with its pictures in a folder beside it; needs no network."""

import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import plots
from animecolor_jax.evaluation.figures import tile_clips
from animecolor_jax.evaluation.page import PAGE
from animecolor_jax.evaluation.results import METRICS
from animecolor_jax.evaluation.statistics import CONFIDENCE, is_defined
from animecolor_jax.evaluation.tables import (
    build_table,
    caption,
    format_interval,
    network_names,
    version_names,
)
from animecolor_jax.replacing import replacing

_OUR_FILES = re.compile(r"(clips|set|frames|example)-[\w-]+\.(png|webp)")


@dataclass(frozen=True)
class ReportConfig:
    """What the report shows."""

    title: str = "Evaluation"
    examples: int = 3
    """Worst clips, and as many best ones, of each method."""
    ranked_by: str | None = None
    """Metric that says which are worst; default: the first of LPIPS, PSNR and the others that is there."""
    height: int = 160
    """Of each playing clip, in pixels."""
    columns: int = 4
    """Clips side by side at most; more are spread over rows."""
    fps: float = 24.0
    """Frames a second of the clips."""
    max_frames: int = 48
    """Frames that an animation has at most: of longer clips every second one is shown, or every third ..."""
    quality: int = 80
    """Of the animations, WebP, up to 100."""


def check_report(path):
    """Checks, before any long work, that `write_report` can write to `path`, and returns its folder.

    Raises:
        InputError: the suffix is not .html, `path` is a folder, or the folder for the pictures, REPORT_files
            beside REPORT.html, holds something else.
    """
    path = Path(path)
    if path.suffix != ".html" or path.is_dir():
        what = "is a folder" if path.is_dir() else f"unknown suffix {path.suffix!r}"
        raise InputError(what, where=path, expected="the name of an .html file")
    folder = path.with_name(f"{path.stem}_files")
    if folder.exists():
        names = os.listdir(folder) if folder.is_dir() else [""]
        others = sorted(name for name in names if not _OUR_FILES.fullmatch(name))
        if others:
            raise InputError(
                f"holds {others[0]!r}" if folder.is_dir() else "is a file",
                where=folder,
                expected="a new name, or a folder of nothing but a report's pictures",
                fix="choose another name for the report",
            )
    return folder


def write_report(result, path, read_clip=None, config=None, *, has_sketches=True):
    """Writes the report: REPORT.html and the folder REPORT_files of pictures.

    Both appear only when all of them is there, and replace those of an earlier report.

    Args:
        result: `Result`.
        path: of the .html file.
        read_clip: (a method's name, "target" or "sketch"; clip) -> [T, H, W, 3] uint8 (a sketch also
            [T, H, W]); only the clips that are shown are read. Without it there are no examples.
        config: `ReportConfig`, or None for its defaults.
        has_sketches: whether `read_clip` knows "sketch".

    Raises:
        InputError: as `check_report` does, matplotlib is missing, or `ranked_by` has no scores of clips.
    """
    path, config = Path(path), config or ReportConfig()
    folder = check_report(path)
    ranked_by = _ranking_metric(result, config.ranked_by)
    with replacing(folder) as partial:
        partial.mkdir()
        plots_html, curves_html = _plots(result, partial, folder.name)
        examples_html = ""
        if read_clip is not None and ranked_by is not None:
            maker = _Examples(result, read_clip, config, has_sketches, partial, folder.name)
            examples_html = maker.sections(ranked_by)
        sections = [
            _section("Scores", _score_table(result)),
            _section("Differences on the same clips", _differences(result)),
            _section("Distribution over clips", plots_html),
            _section("Frame by frame", curves_html),
            _section("Worst and best clips", examples_html),
            _section("How the scores were made", _provenance(result)),
        ]
        facts = [result.protocol, f"{result.clips} clips", f"{result.frames} frames", result.pixel_source]
        html = PAGE.substitute(
            title=escape(config.title),
            facts="".join(f"<li>{escape(fact)}</li>" for fact in facts),
            sections="\n".join(section for section in sections if section),
        )
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")


def rank_clips(result, method, metric):
    """A method's clips from best to worst by a metric of kind "clip", without undefined ones: names."""
    scores = result.methods[method].clip_scores[metric]
    defined = [clip for clip in sorted(scores) if is_defined(scores[clip])]
    return sorted(defined, key=lambda clip: METRICS[metric].loss(scores[clip]))


def _ranking_metric(result, wanted):
    """The metric that ranks the clips, or None if nothing was scored clip by clip."""
    per_clip = [metric for metric in result.scored if METRICS[metric].kind == "clip"]
    if wanted is not None and wanted not in per_clip:
        raise InputError(
            f"clips cannot be ranked by {wanted!r}",
            where="ranked_by",
            expected=f"one of {', '.join(per_clip) or 'nothing: no metric has scores of clips'}",
        )
    return wanted or next((m for m in ("lpips_alex", *per_clip) if m in per_clip), None)


def _section(title, content):
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _score_table(result):
    table = build_table(result)
    heads = "".join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    rows = []
    for name, cells in table.rows:
        row = [f'<th scope="row">{escape(name)}</th>']
        for cell in cells:
            value = f"<b>{escape(cell.value)}</b>" if cell.best else escape(cell.value)
            marks = f"<sup>{','.join(cell.marks)}</sup>" if cell.marks else ""
            interval = f"<small>{escape(cell.interval)}</small>" if cell.interval else ""
            row.append(f"<td{_class('best', cell.best)}>{value}{marks}{interval}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    html = _table(f'<th scope="col">Method</th>{heads}', rows)
    if table.notes:
        notes = "".join(f"<li><sup>{mark}</sup> {escape(text)}</li>" for mark, text in table.notes)
        html += f'<ul class="notes">{notes}</ul>'
    return html


def _differences(result):
    differences = result.differences()
    metrics = [metric for metric in result.scored if METRICS[metric].kind == "clip"]
    if not differences or not metrics:
        return ""
    first = next(iter(result.methods))
    rows = []
    for other, summaries in differences.items():
        row = [f'<th scope="row">{escape(other)}</th>']
        for metric in metrics:
            summary = summaries[metric]
            if summary.mean is None:
                row.append("<td>–</td>")
                continue
            mean = f"{summary.mean:+.{METRICS[metric].digits}f}"
            interval = escape(format_interval(metric, summary))
            clear = summary.excludes(0)
            pairs = f"{summary.clips} clips" if summary.undefined else ""
            small = "".join(f"<small>{text}</small>" for text in (interval, pairs) if text)
            row.append(f"<td{_class('clear', clear)}>{mean}{small}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    heads = "".join(f'<th scope="col">{escape(METRICS[m].label)} {METRICS[m].arrow}</th>' for m in metrics)
    text = (
        f"<p>Each method minus <b>{escape(first)}</b>, averaged over the clips that both have a score of, "
        f"with a {CONFIDENCE:.0%} interval of the paired bootstrap. Marked: the interval excludes 0.</p>"
    )
    return text + _table(f'<th scope="col">Method</th>{heads}', rows)


def _plots(result, folder, link):
    """HTML of the plots of clips and sets, and of those over time; writes them to `folder`."""
    scores, curves = [], []
    for metric in result.scored:
        kind, label = METRICS[metric].kind, METRICS[metric].label
        name = f"{'clips' if kind == 'clip' else 'set'}-{metric}.png"
        (plots.plot_clips if kind == "clip" else plots.plot_sets)(result, metric, folder / name)
        scores.append(_picture(f"{link}/{name}", f"{label} of every method"))
    for metric in METRICS:
        if any(any(method.frame_scores.get(metric, {}).values()) for method in result.methods.values()):
            name = f"frames-{metric}.png"
            plots.plot_frames(result, metric, folder / name)
            curves.append(_picture(f"{link}/{name}", f"{METRICS[metric].label} over time"))
    legend = (
        f"<p>Dots are clips, pale boxes the middle half of them, diamonds means, lines their "
        f"{CONFIDENCE:.0%} intervals. Metrics of whole sets have one score per method.</p>"
    )
    over_time = "<p>Mean over clips of every frame; the pale bands hold the middle 80 % of the clips.</p>"
    return (
        legend + f'<div class="plots">{"".join(scores)}</div>' if scores else "",
        over_time + f'<div class="plots">{"".join(curves)}</div>' if curves else "",
    )


class _Examples:
    """The worst and best clips of each method; a clip is read and written once, however often it is shown."""

    def __init__(self, result, read_clip, config, has_sketches, folder, link):
        self.result, self.read_clip, self.config = result, read_clip, config
        self.has_sketches, self.folder, self.link = has_sketches, folder, link
        self.cards = {}

    def sections(self, metric):
        shown = METRICS[metric]
        parts = [
            f"<p>By {escape(shown.label)}, played side by side: {'sketch, ' if self.has_sketches else ''}"
            "the methods, and the target.</p>"
        ]
        for method in self.result.methods:
            ranked = rank_clips(self.result, method, metric)
            worst = ranked[::-1][: min(self.config.examples, -(-len(ranked) // 2))]
            best = ranked[: min(self.config.examples, len(ranked) // 2)]  # no clip is both
            for title, clips in (("Worst", worst), ("Best", best)):
                if clips:
                    cards = "".join(self._card(clip, method, metric) for clip in clips)
                    parts.append(f'<h3>{title} of {escape(method)}</h3><div class="cards">{cards}</div>')
        return "".join(parts) if len(parts) > 1 else ""

    def _card(self, clip, method, metric):
        if clip not in self.cards:
            name = f"example-{len(self.cards)}.webp"
            size = self._animate(clip, self.folder / name)
            picture = _picture(f"{self.link}/{name}", f"clip {clip}", size)
            self.cards[clip] = picture + self._scores(clip)
        score = self.result.methods[method].clip_scores[metric][clip]
        title = f"<h4>{escape(clip)}</h4><span>{METRICS[metric].label} {METRICS[metric].format(score)}</span>"
        return f'<article class="card"><header>{title}</header>{self.cards[clip]}</article>'

    def _animate(self, clip, path):
        """Writes the clip's animation and returns its (width, height)."""
        sources = {"Sketch": "sketch"} if self.has_sketches else {}
        sources |= {name: name for name in self.result.methods} | {"Target": "target"}
        clips = {label: self.read_clip(source, clip) for label, source in sources.items()}
        step = max(1, -(-max(map(len, clips.values())) // self.config.max_frames))
        clips = {label: frames[::step] for label, frames in clips.items()}
        rows = -(-len(clips) // self.config.columns)
        tiled = tile_clips(clips, height=self.config.height, columns=-(-len(clips) // rows))
        first, *others = map(Image.fromarray, tiled)
        first.save(
            path,
            format="WEBP",
            save_all=True,
            append_images=others,
            duration=round(1000 * step / self.config.fps),  # ms
            loop=0,
            quality=self.config.quality,
            method=4,
        )
        return first.size

    def _scores(self, clip):
        metrics = [metric for metric in self.result.scored if METRICS[metric].kind == "clip"]
        heads = "".join(f'<th scope="col">{escape(METRICS[metric].label)}</th>' for metric in metrics)
        rows = []
        for name, method in self.result.methods.items():
            scores = [(metric, method.clip_scores[metric].get(clip)) for metric in metrics]
            texts = [METRICS[metric].format(score) if is_defined(score) else "–" for metric, score in scores]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
        return _table(f"<th></th>{heads}", rows)


def _provenance(result):
    rows = [("Protocol", escape(result.protocol)), ("Summary", escape(caption(result)))]
    if result.networks:
        hashes = network_names(result.networks, letters=64)
        rows.append(("Networks (SHA-256)", "<br>".join(f"<code>{escape(text)}</code>" for text in hashes)))
    if result.versions:
        rows.append(("Versions", escape(version_names(result.versions))))
    if result.command:
        rows.append(("Command", f"<pre>{escape(result.command)}</pre>"))
    return '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows) + "</dl>"


def _table(heads, rows):
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(source, text, size=None):
    sides = f' width="{size[0]}" height="{size[1]}"' if size else ""
    return f'<img src="{escape(source)}" alt="{escape(text)}"{sides} loading="lazy">'


def _class(name, applies):
    return f' class="{name}"' if applies else ""
