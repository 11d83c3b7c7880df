"""An evaluation from its first clip to its report: stored in between, shared by processes, written out.

    OUT/state/part-I-of-N-*.npz what process I has scored; taken up by the same command
    OUT/result.json             all scores of sets, means, intervals, provenance
    OUT/clips.parquet           every score of every clip
    OUT/table.md, table.tex     the paper's columns first
    OUT/report.html             with report_files/
    OUT/figures/                temporal profiles and comparison grids
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from animecolor_jax import canvas
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import figures, pairs, report, tables
from animecolor_jax.evaluation.results import METRICS, Result
from animecolor_jax.evaluation.score import TARGET, Scorer
from animecolor_jax.replacing import replacing
from data_pipeline.sketch import to_grey

STORE_SECONDS = 30.0
NOT_ASKED = "not asked for (--metrics)"
PACKAGES = ("animecolor-jax", "jax", "flax", "numpy", "opencv-python-headless", "pillow", "av")


def choose_metrics(names):
    """Names of metrics, all of them for none given, in the order of METRICS; InputError for unknown ones."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(
            f"{', '.join(unknown)}", where="--metrics", expected=f"some of {', '.join(METRICS)}"
        )
    return [name for name in METRICS if not names or name in names]


def parse_methods(texts):
    """`["ours=DIR", "other/"]` -> {"ours": Path, "other": Path}; InputError for two of one name."""
    methods = {}
    for text in texts:
        name, _, folder = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        name = name or Path(folder).resolve().name
        if name in methods:
            raise InputError(
                f"{name!r} twice", where="--generated", expected="a name of its own for every method",
                fix=f"write NAME={folder}",
            )  # fmt: skip
        methods[check_method(name)] = Path(folder)
    return methods


def check_method(name):
    """`name`, unless pictures show something else under it: InputError."""
    if name.lower() in ("target", "sketch", "mask"):
        raise InputError(
            f"a method called {name!r}", where="--generated", expected="another name",
            fix=f"write my-{name}=DIR, or rename the folder of weights",
        )  # fmt: skip
    return name


class Store:
    """What was scored so far, on disk: one file for every process.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(self, out, settings, facts, process=0, processes=1):
        """
        Args:
            out: folder. settings: JSON values that all scores depend on. facts: {clip: JSON values that its
                scores depend on}. What was stored with others is not used.
        """
        self.folder, self.process, self.processes = Path(out) / "state", process, processes
        # the clips of a process are a share of all: another set of clips makes other shares
        settings = [settings, processes > 1 and sorted(facts)]
        self.settings, self.facts = digest(settings), {clip: digest(fact) for clip, fact in facts.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot be made: {error}", where=out, expected="a new folder") from error

    def _path(self, process):
        """Other settings have files of their own, which are left alone."""
        return self.folder / f"part-{process}-of-{self.processes}-{self.settings[:8]}.npz"

    def read(self, process=None):
        """(state, whether it is complete) of a process, default this one; None where there is none."""
        path = self._path(self.process if process is None else process)
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                state = dict(arrays)
            settings, facts, complete = json.loads(state.pop("head").tobytes())
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"is damaged: {error}", where=path, expected="scores of an earlier run", fix="delete it"
            ) from error
        if settings == self.settings and all(self.facts.get(clip) == fact for clip, fact in facts.items()):
            return state, complete
        if process is None:
            print(f"{path}: clips that were scored have changed; all are scored again", file=sys.stderr)
        return None

    def write(self, scorer, complete):
        """Replaces what is stored of this process."""
        state, facts = scorer.state(), {clip: self.facts[clip] for clip in scorer.scored}
        head = np.frombuffer(json.dumps([self.settings, facts, complete]).encode(), np.uint8)
        with replacing(self._path(self.process)) as partial, open(partial, "wb") as file:
            np.savez(file, head=head, **state)

    def read_all(self):
        """States of all processes, or None while one of them is not complete."""
        found = [self.read(process) for process in range(self.processes)]
        return [state for state, _ in found] if all(part and part[1] for part in found) else None


def digest(values):
    """Hash of JSON values as hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def score_all(scorer, names, load, store=None):
    """Scores clips that are not yet.

    Args:
        scorer: Scorer. names: of this process's clips.
        load: function of the names that are to be scored -> iterator of (name, arguments of Scorer.add).
        store: Store or None.

    Returns:
        Scorer of all processes' clips; None where others are not finished.
    """
    if store is not None and (found := store.read()) is not None:
        scorer.merge(found[0])
    todo = [name for name in names if name not in scorer.scored]
    stored = time.monotonic()
    bar = tqdm(
        total=len(names), initial=len(names) - len(todo), desc="clips", disable=not sys.stderr.isatty()
    )
    with bar:
        try:
            for name, clip in load(todo):
                scorer.add(name, **clip)
                bar.update()
                if store is not None and time.monotonic() - stored > STORE_SECONDS:
                    store.write(scorer, complete=False)
                    stored = time.monotonic()
        except BaseException:
            if store is not None and not scorer.changing:
                store.write(scorer, complete=False)
            raise
    if store is None:
        return scorer
    store.write(scorer, complete=True)
    states = store.read_all()
    if states is None:
        return None
    if len(states) == 1:
        return scorer
    merged = Scorer(scorer.protocol, scorer.metrics, scorer.methods, {})
    for state in states:
        merged.merge(state)
    return merged


class Files:
    """Clips that lie in folders, matched by name."""

    def __init__(self, generated, target, sketch, mask, protocol, partial=False):
        """Arguments and errors are those of `pairs.match`; the protocol says whether masks are needed."""
        if protocol.mask and mask is None:
            raise InputError(
                f"protocol {protocol.name} needs masks", where="--mask",
                expected="a folder of masks, white where the foreground is", fix="give --mask DIR",
            )  # fmt: skip
        if mask is not None and not protocol.mask:
            raise InputError(
                f"protocol {protocol.name} has no masks", where="--mask", expected="a protocol with masks",
                fix="use --protocol anidoc-256-fg, or a file with mask = true",
            )  # fmt: skip
        matched = pairs.match(generated, target, sketch, mask, protocol, partial)
        self.protocol, self.methods, self.partial = protocol, list(generated), partial
        self.notes, self.settings = matched.notes, None
        self.pairs = {pair.name: pair for pair in matched.pairs}
        self.has_sketches, self.folders = sketch is not None, [target, *generated.values(), sketch, mask]
        self.pixel_source = "; ".join(
            f"{kind} {'+'.join(sorted(sources))}" for kind, sources in matched.sources.items()
        ) + f"; line art {'given' if self.has_sketches else 'of the targets'}"

    def check(self, scorer):
        """Raises one InputError with all clips that are too short or small for what is to be scored."""
        problems = []
        for name, pair in self.pairs.items():
            shape = self.protocol.num_frames(pair.frames), *(self.protocol.size or pair.size)
            try:
                scorer.check(name, shape)
            except InputError as error:
                problems.append(error)
        if problems:
            listed = "; ".join(f"{error.where}: {error.what}" for error in problems[: pairs.LISTED])
            raise InputError(
                f"{len(problems)} clips: {listed}", where="--metrics", expected=problems[0].expected,
                fix=problems[0].fix,
            )  # fmt: skip

    @functools.cached_property
    def facts(self):
        """{clip: what its scores depend on}: every file with its size and time of change."""

        def facts(path):
            if path is None:
                return None
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            files = [file for file in files if not file.name.startswith(".")]
            return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

        return {
            name: [pair.frames, *map(facts, (pair.target, *pair.generated.values(), pair.sketch, pair.mask))]
            for name, pair in self.pairs.items()
        }

    def load(self, names):
        """Yields (name, arguments of `Scorer.add`); the next clip is read while one is scored."""
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self._read, names[0])] if names else []
            for position, name in enumerate(names):
                clip = ahead.pop().result()
                if position + 1 < len(names):
                    ahead.append(pool.submit(self._read, names[position + 1]))
                yield name, clip

    def _read(self, name):
        pair = self.pairs[name]

        def read(path, **options):
            return pairs.read(path, pair.frames, or_more=self.partial, **options)

        return {
            "target": read(pair.target),
            "generated": {method: read(path) for method, path in pair.generated.items()},
            "sketch": None if pair.sketch is None else to_grey(_dark_lines(read(pair.sketch))),
            "mask": None if pair.mask is None else to_grey(read(pair.mask, or_one=True)),
        }

    def read_clip(self, kind, name):
        """The frames of a method, "target" or "sketch" as they are scored, without a mask."""
        pair = self.pairs[name]
        path = {"target": pair.target, "sketch": pair.sketch, **pair.generated}[kind]
        clip = pairs.read(path, pair.frames, or_more=self.partial)
        protocol = dataclasses.replace(self.protocol, values="uint8")
        return protocol.prepare(protocol.choose(_dark_lines(clip) if kind == "sketch" else clip))


def _dark_lines(sketch):
    """Line art as dark lines on white, as `colorize` takes it."""
    return canvas.normalise_polarity(sketch)[0]


def make_result(scorer, protocol, metrics, skipped, hashes, pixel_source, command):
    """`Result` of what a scorer found."""
    return Result(
        protocol=f"{protocol.name} ({protocol.describe()})",
        clips=len(scorer.scored),
        frames=sum(scorer.scored.values()),
        pixel_source=pixel_source,
        metrics=tuple(metrics),
        methods=scorer.result(),
        skipped=skipped,
        networks=hashes,
        versions=versions(),
        command=command,
        clip_frames=dict(scorer.scored),
    )


def versions():
    """{package: version} of what scores depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}


def _installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def as_json(result, protocol, notes=()):
    """`Result.as_json` with the protocol's name alone and every metric there is, null without a value."""
    found = result.as_json()
    asked = found["skipped"] | {name: NOT_ASKED for name in METRICS if name not in result.shown}
    rows = {name: dict.fromkeys(METRICS) | row for name, row in found["methods"].items()}
    top = next(iter(rows.values())) if len(rows) == 1 else {}
    facts = {"protocol": protocol.name, "protocol_details": dataclasses.asdict(protocol)}
    facts["notes"] = list(notes)
    return found | facts | {"methods": rows, "skipped": asked} | top


def check_out(out, inside=()):
    """Checks, before any clip is scored, that an evaluation can be written to the folder `out`.

    Args:
        inside: folders of clips, of which it would be one.
    """
    for package in ("matplotlib", "pyarrow"):
        if not _installed(package):
            raise tables.missing_extra(package, "--out")
    for folder in inside:
        if folder is not None and Path(out).resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(f"lies in {folder}", where=f"--out {out}", expected="a folder beside the clips")
    report.check_report(Path(out) / "report.html")


def write_outputs(result, protocol, out, clips, shown=()):
    """Writes everything but the state into the folder `out`.

    Args:
        clips: has `read_clip(kind, name)`, `has_sketches`, `methods` and `notes`.
        shown: names of clips of which figures are drawn; default: the first.
    """
    out = Path(out)
    for name, text in (
        ("result.json", json.dumps(as_json(result, protocol, clips.notes), indent=1, allow_nan=False)),
        ("table.md", tables.markdown(result)),
        ("table.tex", tables.latex(result)),
    ):
        with replacing(out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    tables.write_parquet(result, out / "clips.parquet")
    for name in shown or sorted(result.clip_frames)[:1]:
        generated = {method: clips.read_clip(method, name) for method in clips.methods}
        target = clips.read_clip(TARGET, name)
        sketch = clips.read_clip("sketch", name) if clips.has_sketches else None
        profiles = figures.draw_temporal_profiles({**generated, "Target": target}, row=target.shape[1] // 2)
        grid = figures.draw_comparison_grid(generated, sketch=sketch, target=target)
        (out / "figures").mkdir(exist_ok=True)
        figures.write_png(out / "figures" / f"{name}-profile.png", profiles)
        figures.write_png(out / "figures" / f"{name}-grid.png", grid)
    report.write_report(result, out / "report.html", clips.read_clip, has_sketches=clips.has_sketches)
