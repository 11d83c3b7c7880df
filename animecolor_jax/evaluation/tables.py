"""The scores as Markdown and LaTeX tables, and those of every clip as Parquet."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.results import METRICS
from animecolor_jax.evaluation.statistics import CONFIDENCE, RESAMPLES, is_defined
from animecolor_jax.replacing import replacing

DASH = "–"
_HASH_LETTERS = 8


@dataclass(frozen=True)
class Cell:
    """A score as text."""

    value: str
    interval: str = ""
    best: bool = False
    marks: tuple = ()
    """Of the footnotes that it needs."""


@dataclass(frozen=True)
class Table:
    """A result as text that is not escaped yet."""

    headers: list
    """Metrics with their arrows."""
    rows: list
    """[(method, [Cell])]."""
    notes: list = field(default_factory=list)
    """[(mark, text)]: why there is no score, or not of all clips."""
    caption: str = ""


def build_table(result):
    """`Result` -> `Table`: columns in the paper's order, then ours; best scores as shown are marked."""
    notes = {}

    def mark(text):
        return notes.setdefault(text, _letters(len(notes)))

    best = {metric: result.best(metric) for metric in result.scored}
    rows = []
    for name, summaries in result.summaries.items():
        cells = []
        for metric in result.shown:
            label = METRICS[metric].label
            if metric in result.skipped:
                cells.append(Cell(DASH, marks=(mark(f"{label} is skipped: {result.skipped[metric]}"),)))
                continue
            summary, marks = summaries[metric], ()
            if summary.undefined or summary.mean is None:
                marks = (mark(_undefined(result, name, metric)),)
            if summary.mean is None:
                cells.append(Cell(DASH, marks=marks))
                continue
            value, interval = METRICS[metric].format(summary.mean), format_interval(metric, summary)
            cells.append(Cell(value, interval, name in best[metric], marks))
        rows.append((name, cells))
    headers = [f"{METRICS[metric].label} {METRICS[metric].arrow}" for metric in result.shown]
    return Table(headers, rows, [(mark, text) for text, mark in notes.items()], caption(result))


def _undefined(result, method, metric):
    """The footnote of a score that is not of all clips; one for all methods if it is true of all of them."""
    summary, label = result.summaries[method][metric], METRICS[metric].label
    same = all(of[metric].undefined == summary.undefined for of in result.summaries.values())
    subject = label if same and summary.undefined else f"{label} of {method}"
    if not summary.undefined:
        return f"{subject} is undefined"
    missing, count = len(summary.undefined), summary.clips + len(summary.undefined)
    clips = ", ".join(summary.undefined[:3]) + (", ..." if missing > 3 else "")
    rest = f"mean of the other {summary.clips}" if summary.clips else "no mean"
    return f"{subject} is undefined for {missing} of {_count(count, 'clip')} ({clips}): {rest}"


def format_interval(metric, summary):
    """The interval as tables show it, [low, high], or nothing."""
    if summary.interval is None:
        return ""
    return "[{}, {}]".format(*map(METRICS[metric].format, summary.interval))


def caption(result):
    """One line: protocol, clips, frames, pixels, intervals, networks with short hashes, and versions."""
    parts = [
        f"Protocol {result.protocol}",
        f"{_count(result.clips, 'clip')} with {_count(result.frames, 'frame')} in all",
        f"pixels: {result.pixel_source}",
    ]
    if any(summary.interval for of in result.summaries.values() for summary in of.values()):
        method = f"BCa bootstrap, {RESAMPLES} resamples"
        parts.append(f"in brackets: {CONFIDENCE:.0%} intervals over clips ({method})")
    if result.networks:
        parts.append("networks: " + ", ".join(network_names(result.networks)))
    if result.versions:
        parts.append(f"versions: {version_names(result.versions)}")
    return "; ".join(parts) + "."


def version_names(versions):
    """{package: version} on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def network_names(networks, letters=_HASH_LETTERS):
    """["network (file sha256)"] of {network: {file: sha256}}; hashes are cut to `letters`."""
    return [
        f"{name} ({', '.join(f'{Path(file).name} {digest[:letters]}' for file, digest in files.items())})"
        for name, files in networks.items()
    ]


def markdown(result):
    """The table in GitHub's Markdown: best scores bold, intervals below them, footnotes and caption after."""
    table = build_table(result)
    lines = [
        _markdown_row(["Method", *map(escape_markdown, table.headers)]),
        "| :-- |" + " --: |" * len(table.headers),
    ]
    for name, cells in table.rows:
        texts = []
        for cell in cells:
            text = f"**{cell.value}**" if cell.best else cell.value
            text += f"<sup>{','.join(cell.marks)}</sup>" if cell.marks else ""
            texts.append(text + (f"<br><sub>{escape_markdown(cell.interval)}</sub>" if cell.interval else ""))
        lines.append(_markdown_row([escape_markdown(name), *texts]))
    lines += [f"\n<sup>{mark}</sup> {escape_markdown(text)}" for mark, text in table.notes]
    return "\n".join([*lines, f"\n{escape_markdown(table.caption)}"]) + "\n"


def latex(result):
    """The table in LaTeX, for the packages booktabs and adjustbox; intervals stand in a row below."""
    table = build_table(result)
    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→1": r"$\to 1$"}
    headers = []
    for header in table.headers:
        label, arrow = header.rsplit(" ", 1)
        headers.append(f"{escape_latex(label)} {arrows[arrow]}")
    lines = [
        "% \\usepackage{booktabs, adjustbox}",
        "\\begin{table*}",
        "  \\centering",
        f"  \\caption{{{escape_latex(table.caption)}}}",
        "  \\begin{adjustbox}{max width=\\textwidth}",
        f"  \\begin{{tabular}}{{@{{}}l{'c' * len(headers)}@{{}}}}",
        "    \\toprule",
        f"    {' & '.join(['Method', *headers])} \\\\",
        "    \\midrule",
    ]
    for name, cells in table.rows:
        texts = [escape_latex(name)]
        for cell in cells:
            text = "--" if cell.value == DASH else cell.value
            text = f"\\textbf{{{text}}}" if cell.best else text
            texts.append(text + (f"\\textsuperscript{{{','.join(cell.marks)}}}" if cell.marks else ""))
        lines.append(f"    {' & '.join(texts)} \\\\")
        if any(cell.interval for cell in cells):  # in braces: a line may not begin with a bracket
            small = [f"{{\\scriptsize {cell.interval}}}" if cell.interval else "" for cell in cells]
            lines.append(f"    {' & '.join(['', *small])} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}", "  \\end{adjustbox}"]
    if table.notes:
        notes = [
            f"\\textsuperscript{{{mark}}}~{escape_latex(text.rstrip('.'))}." for mark, text in table.notes
        ]
        lines += ["", "  \\smallskip", "  \\parbox{\\textwidth}{\\footnotesize " + " ".join(notes) + "}"]
    return "\n".join([*lines, "\\end{table*}"]) + "\n"


def escape_markdown(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(str(text).split()))


def escape_latex(text):
    """Text that LaTeX prints as it is, on one line."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        DASH: "--",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    }
    return "".join(special.get(letter, letter) for letter in " ".join(str(text).split()))


def write_parquet(result, path):
    """Writes the scores of every clip: columns clip, method, frames (null if unknown), and one per metric.

    One row for each clip of each method; a score that is undefined is null. The file's metadata hold the
    whole result as JSON under "animecolor". The file appears only when it is complete.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("pyarrow", "the scores of every clip as Parquet") from error
    metrics = [metric for metric in result.scored if METRICS[metric].kind == "clip"]
    columns = {"clip": [], "method": [], "frames": [], **{metric: [] for metric in metrics}}
    for name, method in result.methods.items():
        for clip in sorted(set().union(*(method.clip_scores[metric] for metric in metrics))):
            columns["clip"].append(clip)
            columns["method"].append(name)
            columns["frames"].append(result.clip_frames.get(clip))
            for metric in metrics:
                score = method.clip_scores[metric].get(clip)
                columns[metric].append(float(score) if is_defined(score) else None)
    schema = pa.schema(
        [("clip", pa.string()), ("method", pa.string()), ("frames", pa.int64())]
        + [(metric, pa.float64()) for metric in metrics],
        metadata={"animecolor": json.dumps(result.as_json(), allow_nan=False)},
    )
    with replacing(path) as partial:
        pq.write_table(pa.table(columns, schema=schema), partial)


def missing_extra(package, purpose):
    """The error for a package of the extra "evaluate" that is not there."""
    return InputError(
        f"{package} is not installed",
        where=purpose,
        expected="the packages of the extra 'evaluate'",
        fix="pip install -e '.[evaluate]'",
    )


def _markdown_row(texts):
    return "| " + " | ".join(texts) + " |"


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _letters(index):
    """0 -> a, 25 -> z, 26 -> aa."""
    text = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        text = chr(ord("a") + letter) + text
    return text
