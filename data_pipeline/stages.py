"""What runs on every core: one task looks at one source video, or stores the clips that were kept of it.

Each result is one file that appears whole, named by what it was made from, so that work can be stopped at any
moment, repeated, and spread over any number of computers. Tasks and results are plain values: Apache Beam
pickles them.
"""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import NamedTuple

import cv2

from animecolor_jax.errors import InputError
from animecolor_jax.media import IMAGE_SUFFIXES, open_video
from data_pipeline import clip_video
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.curation import MEASURING, CurationConfig, curate_image, curate_video
from data_pipeline.shapes import Bucket, cover_box
from data_pipeline.storage import Storage

MEASURE_VERSION = 1  # counts changes of what is measured and refused: all sources are looked at again
LOST = ("failed", "the process that worked on it died: a crash of the decoder, or not enough memory")
SOURCES, CLIPS = "work/sources", "work/clips"  # below the dataset's folder


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
    try:
        stamp = videos.stamp(name)
    except OSError:  # gone, or a link to nowhere: its worker will say so
        stamp = "missing"
    text = json.dumps([MEASURE_VERSION, name, stamp, measuring])
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


def lose_source(task, job):
    """What `curate_source` leaves where its process died."""
    name, result = task
    found = {"name": name, "sha256": None, "clips": [], "error": LOST}
    Storage(job.out).write(result, json.dumps(found).encode())


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


def lose_clips(task, job):
    """What `store_clips` leaves where its process died."""
    out = Storage(job.out)
    for cut in task[1]:
        if not out.exists(clip_name(cut.identity, cut.bucket)):
            out.write(error_name(cut.identity, cut.bucket), json.dumps(LOST).encode())


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
