"""What runs on every core: one task looks at one source video, or stores the clips that were kept of it.

Each result is one file that appears whole, named by what it was made from, so that work can be stopped at any
moment, repeated, and spread over any number of computers. Tasks and results are plain values: Apache Beam
pickles them.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import threading
from dataclasses import dataclass
from typing import NamedTuple

import cv2

from animecolor_jax.errors import InputError
from animecolor_jax.media import IMAGE_SUFFIXES, open_video
from data_pipeline import clip_video
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.curation import MEASURING, CurationConfig, curate_image, curate_video
from data_pipeline.shapes import Bucket, cover_box
from data_pipeline.storage import Storage, is_remote

MEASURE_VERSION = 1  # counts changes of what is measured and refused: all sources are looked at again
SOURCES, CLIPS = "work/sources", "work/clips"  # below the dataset's folder
LOCAL_RUNNER = ("--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=0")


@dataclass(frozen=True)
class Job:
    """What all tasks share."""

    videos: str  # folder or URL
    out: str
    curation: CurationConfig
    encoding: ClipEncoding


class Cut(NamedTuple):
    """A clip to be stored: frames start to end, cropped to (top, left, height, width)."""

    identity: str
    start: int
    end: int
    crop: tuple
    fps: float
    bucket: Bucket


def source_key(videos, name, config):
    """Name of a source's result: a hash of the file's name, size and time, and of how it is measured."""
    measuring = [getattr(config, field) for field in MEASURING]
    text = json.dumps([MEASURE_VERSION, name, videos.stamp(name), measuring])
    return f"{SOURCES}/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def clip_id(sha256, clip, bucket, encoding):
    """Content address of a stored clip: 32 hex digits from all that its bytes are made of."""
    parts = [sha256, clip.start, clip.end, list(clip.crop), str(bucket)]
    parts += [None] if bucket.is_image else [clip.fps, dataclasses.asdict(encoding)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def clip_name(identity, bucket):
    """Name of a stored clip below the dataset's folder."""
    return f"{CLIPS}/{identity[:2]}/{identity}.{'png' if bucket.is_image else 'mp4'}"


def curate_source(task, job):
    """Decodes a source once, finds its shots and scores them. `task` is its name and that of the result.

    Writes {"name", "sha256", "clips": [...], "error": None or [reason, sentence]}, come what may.
    """
    cv2.setNumThreads(1)  # every core has a worker of its own
    (name, result), clips, digest, problem = task, [], None, None
    try:
        with Storage(job.videos).local(name) as path:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            clips = _curate(path, name, job.curation)
    except Exception as error:  # whatever a broken file does to a decoder: it goes on record
        problem = _on_record(error)
    found = {
        "name": name,
        "sha256": digest,
        "clips": [dataclasses.asdict(clip) for clip in clips],
        "error": problem,
    }
    Storage(job.out).write(result, json.dumps(found, allow_nan=False).encode())


def _curate(path, name, config):
    with open_video(path) as stream:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            start = list(itertools.islice(stream.frames, 2))
            if len(start) == 1:
                return [curate_image(start[0], name, config)]
            stream.frames = itertools.chain(start, stream.frames)
        return curate_video(stream, name, config)


def store_clips(task, job):
    """Writes a file for every clip of a source, or `ID.json` in its place with the error.

    `task` is the source's name and its cuts in the order of their frames.
    """
    cv2.setNumThreads(1)
    (name, cuts), out = task, Storage(job.out)
    pending = list(cuts)
    try:
        with Storage(job.videos).local(name) as path, open_video(path) as stream:
            frames = enumerate(stream.frames)
            while pending:
                cut = pending[0]
                shown = (_fit(frame, cut) for _, frame in span(frames, cut.start, cut.end))
                if cut.bucket.is_image:
                    data = clip_video.encode_image(next(shown))
                else:
                    data = clip_video.encode(shown, cut.fps, job.encoding)
                pending.pop(0)
                _write(out, clip_name(cut.identity, cut.bucket), data)
    except _OutputError as error:
        raise error.__cause__ from None
    except Exception as error:
        for cut in pending:
            out.write(error_name(cut.identity, cut.bucket), json.dumps(_on_record(error)).encode())


class _OutputError(Exception):
    """Writing failed: a full disk stops the run, where a broken source does not."""


def _write(out, name, data):
    try:
        out.write(name, data)
    except OSError as error:
        raise _OutputError from error


def error_name(identity, bucket):
    """Name of the file that says why a clip could not be stored."""
    return clip_name(identity, bucket).rpartition(".")[0] + ".json"


def span(frames, start, end):
    """Of an iterator of (index, frame), those from start to end; the iterator stands at `end` afterwards."""
    for index, frame in frames:
        if index >= start:
            yield index, frame
        if index + 1 >= end:
            return


def _fit(frame, cut):
    """[H, W, 3] -> the bucket's size: the crop, resized to cover it, its middle."""
    (top, left, height, width), bucket = cut.crop, cut.bucket
    inner_top, inner_left, height, width = cover_box(height, width, *bucket.size)
    top, left = top + inner_top, left + inner_left
    part = frame[top : top + height, left : left + width]
    shrinks = height > bucket.height
    return cv2.resize(
        part, (bucket.width, bucket.height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _on_record(error):
    """(reason, sentence): "unreadable" for a bad file, "failed" for what must not happen."""
    if isinstance(error, InputError):
        return "unreadable", error.what
    return "failed", f"{type(error).__name__}: {error}"


def import_beam():
    """Apache Beam, imported where it is needed: that takes seconds, and warns of missing Google services."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam
        import apache_beam.options.pipeline_options
    except ImportError as error:
        raise InputError(
            "Apache Beam is not installed", where="data preparation", fix='pip install -e ".[data]"'
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def check_beam_flags(flags):
    """Raises InputError for flags that Beam does not know either; by itself it would pass over them."""
    PipelineOptions = import_beam().options.pipeline_options.PipelineOptions
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    try:
        _, unknown = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise InputError(str(error), where="arguments", expected="a value that Apache Beam takes") from error
    if unknown:
        raise InputError(
            f"unknown: {' '.join(unknown)}",
            where="arguments",
            expected="what --help lists, or a flag of Apache Beam",
            fix="see --help",
        )


def run_on_beam(function, tasks, job, flags, count_done, label, progress, total=None):
    """Runs `function(task, job)` for all tasks with Apache Beam.

    Args:
        function: importable by name; its result is ignored.
        tasks: small picklable values: they travel inside the pipeline.
        flags: Beam's own flags, such as ("--runner=FlinkRunner", ...); () is the direct runner on all cores.
        count_done: function -> how many results are there; drives the progress bar.
        progress: tqdm or the like, called with total= and desc=.
        total: number of results; default: of tasks.

    Raises:
        OSError: a task failed for reasons other than its input, such as a full disk.
    """
    if not tasks:
        return
    if not any(flag.startswith("--runner") for flag in flags):
        flags = (*LOCAL_RUNNER, *flags)
    beam = import_beam()
    quiet = logging.getLogger("apache_beam")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    flags = ["--default_sdk_harness_log_level=ERROR", *flags]
    options = beam.options.pipeline_options.PipelineOptions(flags)
    interval = 15 if is_remote(job.out) else 2  # listing 100,000 files takes a while
    try:
        with (
            _polling(count_done, total or len(tasks), interval, label, progress),
            beam.Pipeline(options=options) as pipeline,
        ):
            _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(function, job)
    except RuntimeError as error:  # Beam's, around whatever happened in a worker
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{label} stopped: {reason}; what was finished is kept") from error
    finally:
        quiet.setLevel(level)


@contextlib.contextmanager
def _polling(count_done, total, interval, label, progress):
    """A progress bar that counts finished files: workers may be on other computers."""
    before, stop = count_done(), threading.Event()
    with progress(total=total, desc=label) as bar:

        def poll():
            while not stop.wait(interval):
                bar.n = min(total, count_done() - before)
                bar.refresh()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.n = min(total, count_done() - before)
            bar.refresh()


