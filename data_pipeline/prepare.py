"""From a folder of videos to a dataset: curate every source, choose, store the clips, caption, pack.

Everything is a file below DATASET/work named by what it was made from. Running the same command again goes on
where the last run stopped, and redoes only what new files or other settings ask for.
"""

import dataclasses
import io
import itertools
import json
import os
from dataclasses import dataclass, field

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from animecolor_jax.errors import InputError
from animecolor_jax.media import open_video
from data_pipeline import beam_runner, clip_video, records, stages
from data_pipeline.aesthetics import ClipAestheticScorer
from data_pipeline.captions import Captioner, read_captions
from data_pipeline.clip_table import TABLE, clips_digest
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.contact_sheet import clip_entry, draw_contact_sheet
from data_pipeline.curation import Clip, CurationConfig, decide
from data_pipeline.duplicates import mark_duplicates
from data_pipeline.model_stages import Models
from data_pipeline.shapes import BucketConfig
from data_pipeline.sketch import extractor
from data_pipeline.storage import Storage, is_remote
from data_pipeline.text_detection import ModelTextDetector

CONTACT_SHEET = "contact_sheet.png"
# Companions of videos, which are passed over; every other file is taken for a video and accounted for.
SIDECARS = (
    *(".txt", ".json", ".jsonl", ".csv", ".parquet", ".srt", ".ass"),
    *(".vtt", ".md", ".xml", ".nfo", ".log"),
)


@dataclass(frozen=True)
class PrepareConfig:
    """How a dataset is made."""

    curation: CurationConfig = field(default_factory=CurationConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    encoding: ClipEncoding = field(default_factory=ClipEncoding)
    test_share: float = 0.02
    """Share of the sources whose clips become the split "test"; all clips of a source share its split."""
    shard_bytes: int = 256 * 2**20
    """Bytes of a shard, about."""
    compress: bool = False
    """Compress the shards (zstd); video hardly shrinks."""

    def __post_init__(self):
        if not 0 <= self.test_share < 1:
            raise InputError(f"{self.test_share}", where="test_share", expected="0 or more, less than 1")
        if self.shard_bytes < 1:
            raise InputError(f"{self.shard_bytes}", where="shard_bytes", expected="a number of bytes")


@dataclass
class Row:
    """One clip of the table, or a source that could not be read (then `clip` is None)."""

    source: str
    sha256: str | None
    clip: Clip | None
    reason: str = ""
    """Why there is no record although no score speaks against it: "unreadable" (the file is bad), "failed"
    (reading it failed for another reason) or "not-stored"."""
    problem: str = ""
    """The sentence to `reason`."""
    identity: str = ""
    bucket: object = None
    split: str = ""
    caption: str = ""

    @property
    def kept(self):
        """Whether its record is in the dataset."""
        return self.clip is not None and not self.reason and not self.clip.reasons


def prepare(videos, out, config, *, captions=None, models=None, beam_flags=(), progress=tqdm):
    """Makes or continues a dataset.

    Args:
        videos: folder of videos and images (searched with all its sub-folders), or a URL of one.
        out: folder or URL of the dataset.
        config: PrepareConfig.
        captions: what `captions.read_captions` reads; None: text files beside the videos.
        models: Models, loaded networks that score and caption.
        beam_flags: Beam's own flags; () is the direct runner on all cores.

    Returns:
        `summary`, with "bytes" (of all records), "table", "contact_sheet" (paths) and the counts of captions.

    Raises:
        InputError: there is nothing to read, or a setting is impossible; before any work.
    """
    videos, out, models = Storage(videos), Storage(out), models or Models()
    beam_runner.check_beam_flags(beam_flags)
    names = _sources(videos, out)
    texts = read_captions(captions, videos.root, names)
    _check_writable(out)
    out.sweep()

    rows = _curate(videos, out, names, config, beam_flags, progress)
    models.score(rows, videos, out, progress)
    _choose(rows, config)
    _store(rows, videos, out, config, beam_flags, progress)
    for row in rows:
        if row.kept:
            row.caption = texts.caption(row.source, row.clip.start, row.clip.end)
    models.caption(rows, out, progress)
    table = _table(rows)
    unchanged = out.exists(CONTACT_SHEET) and out.exists(TABLE) and out.read(TABLE) == table
    out.write(TABLE, table)
    total = _pack(rows, out, config, progress)
    if not unchanged:
        _draw(rows, videos, out)
    report = summary(rows)
    paths = {"table": out.path(TABLE), "contact_sheet": out.path(CONTACT_SHEET)}
    return {**report, "bytes": total, **texts.report(), **paths}


def _sources(videos, out):
    """Names of all files that must be accounted for."""
    if not is_remote(videos.root) and not videos.exists():
        raise InputError("does not exist", where=videos, expected="a folder of videos")
    if f"{_real(out)}/".startswith(f"{_real(videos)}/"):
        raise InputError(
            "lies inside the folder of videos",
            where=out,
            expected="a folder of its own",
            fix="choose another --out",
        )
    if out.exists(records.CLIPS) and not (out.exists("work") or out.exists(records.CLOSING)):
        raise InputError(
            f"holds {records.CLIPS!r}, which is not of a dataset",
            where=out,
            expected="a dataset of ours, or a folder without that name in it",
            fix="choose another --out",
        )
    names = [name for name in videos.names(recursive=True) if not name.lower().endswith(SIDECARS)]
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(
                f"the name {ascii(name)} is not UTF-8",
                where=videos,
                expected="names of files and folders in UTF-8",
                fix="rename them, for instance with: convmv -f cp932 -t utf8 -r --notest FOLDER",
            )
    if not names:
        raise InputError("holds no videos", where=videos, expected="a folder with videos or images in it")
    return names


def _real(storage):
    return storage.root if is_remote(storage.root) else os.path.realpath(storage.root)


def _check_writable(out):
    try:
        out.write("work/.probe", b"")
        out.remove("work/.probe")
    except OSError as error:
        raise InputError(
            f"cannot be written to: {error}", where=out, expected="a folder to write to"
        ) from error


def load_models(text_detector=None, aesthetic=(), captioner=None):
    """The networks that a user gives, loaded: wrong directories are refused before any long work.

    Args:
        text_detector: directory of a `ModelTextDetector`, or None.
        aesthetic: (directory of a CLIP model, file of the head), or ().
        captioner: directory of a `Captioner`'s model, or None.
    """
    models = Models()
    if text_detector:
        models.text_detector, models.text_files = ModelTextDetector(text_detector), (text_detector,)
    if aesthetic:
        if len(aesthetic) != 2:
            raise InputError(
                f"{len(aesthetic)} paths",
                where="--aesthetic",
                expected="two: a CLIP directory and the file of the head",
            )
        models.aesthetic, models.aesthetic_files = ClipAestheticScorer(*aesthetic), tuple(aesthetic)
    if captioner:
        models.captioner, models.caption_files = Captioner(captioner), (captioner,)
    return models


# ---------------------------------------------------------------- curation


def _curate(videos, out, names, config, beam_flags, progress):
    """Every source's clips as rows, in the order of the names."""
    results = {name: stages.source_key(videos, name, config.curation) for name in names}
    there = set(out.names(stages.SOURCES))
    beam_runner.run_on_beam(
        stages.curate_source,
        stages.lose_source,
        [task for task in results.items() if task[1] not in there],
        stages.Job(videos.root, out.root, config.curation, config.encoding),
        beam_flags,
        lambda: len(out.names(stages.SOURCES)),
        "curating",
        progress,
    )
    rows = []
    for name, result in results.items():
        found = json.loads(out.read(result))
        if found["error"]:
            out.remove(result)  # tried again by the next run: the cause may have been the computer's
            rows.append(Row(name, found["sha256"], None, *found["error"]))
        for values in found["clips"]:
            rows.append(Row(name, found["sha256"], Clip(**values)))
    return rows


def _choose(rows, config):
    """Decides about every clip, by its own scores and then by its twins; gives the kept ones a bucket."""
    read = [row for row in rows if row.clip is not None]
    for row in read:
        clip = decide(row.clip, config.curation)
        height, width = clip.crop[2:]
        if clip.is_image:
            row.bucket = config.buckets.image_bucket(height, width)
        else:
            row.bucket = config.buckets.video_bucket(clip.num_frames, height, width)
            if row.bucket is None and clip.kept:  # the buckets ask for more frames than the curation
                why = f"{clip.num_frames} frames, the smallest bucket has {config.buckets.frame_counts[0]}"
                clip = dataclasses.replace(clip, reasons=("short",), details={"short": why})
        row.clip = clip
    first = {}
    for row, clip in zip(read, mark_duplicates([row.clip for row in read], config.curation), strict=True):
        row.clip = clip
        if row.kept:
            row.identity = stages.clip_id(row.sha256, clip, row.bucket, config.encoding)
            twin = first.setdefault(row.identity, row)
            if twin is not row:  # a copy of the file, where duplicates are not looked for
                row.reason, row.problem = "duplicate", f"has the very pixels of {twin.clip.name}"
            row.split = "test" if int(row.sha256[:8], 16) / 2**32 < config.test_share else "train"


# ---------------------------------------------------------------- storing


def _store(rows, videos, out, config, beam_flags, progress):
    """Stores the kept clips; a clip that cannot be stored gets its problem on record."""
    there = set(out.names(stages.CLIPS, recursive=True))
    missing = {}
    for row in rows:
        if row.kept and stages.clip_name(row.identity, row.bucket) not in there:
            clip = row.clip
            cut = stages.Cut(row.identity, clip.start, clip.end, clip.crop, clip.fps, row.bucket)
            missing.setdefault(row.source, []).append(cut)
    beam_runner.run_on_beam(
        stages.store_clips,
        stages.lose_clips,
        [(name, sorted(cuts, key=lambda cut: cut.start)) for name, cuts in missing.items()],
        stages.Job(videos.root, out.root, config.curation, config.encoding),
        beam_flags,
        lambda: len(out.names(stages.CLIPS, recursive=True)),
        "storing",
        progress,
        total=sum(map(len, missing.values())),
    )
    there = set(out.names(stages.CLIPS, recursive=True))
    for row in rows:
        if row.kept and stages.clip_name(row.identity, row.bucket) not in there:
            name = stages.error_name(row.identity, row.bucket)
            row.reason, row.problem = "not-stored", json.loads(out.read(name))[1]
            out.remove(name)


# ---------------------------------------------------------------- packing


def _pack(rows, out, config, progress):
    """Packs the stored clips into shards, unless exactly that was done; returns the bytes of all records."""
    kept = sorted((row for row in rows if row.kept), key=lambda row: row.identity)
    said = [(row.identity, row.source, str(row.bucket), row.split, row.caption) for row in kept]
    digest = clips_digest(said, config.shard_bytes, config.compress)
    if out.exists(records.CLOSING) and json.loads(out.read(records.CLOSING)).get("digest") == digest:
        return json.loads(out.read(records.CLOSING))["bytes"]

    out.remove(records.CLOSING)
    out.remove(records.CLIPS)
    serialize = records.Serializer(records.clip_features())
    total, buckets = 0, {}
    with progress(total=len(kept), desc="packing") as bar:
        for bucket in sorted({row.bucket for row in kept}):
            splits = {}
            for split in records.SPLITS:
                chosen = [row for row in kept if row.bucket == bucket and row.split == split]
                shards = _shards(chosen, out, config.shard_bytes)
                lengths, size = [], 0
                for index, shard in enumerate(shards):
                    examples = (_example(row, out, serialize, bar) for row in shard)
                    name = records.shard_name(records.CLIPS, bucket, split, index, len(shards))
                    size += records.write_shard(out, name, examples, compress=config.compress)
                    lengths.append(len(shard))
                if lengths:
                    splits[split] = (lengths, size)
            records.write_metadata(out, records.CLIPS, bucket, serialize.features, splits)
            buckets[str(bucket)] = {split: sum(lengths) for split, (lengths, _) in splits.items()}
            total += sum(size for _, size in splits.values())
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    records.close(
        out,
        records.CLOSING,
        {"digest": digest, "clips": len(kept), "buckets": buckets, "bytes": total, "config": settings},
    )
    return total


def _shards(rows, out, limit):
    """Consecutive groups of rows whose clips have about `limit` bytes."""
    shards, size = [], 0
    for row in rows:
        clip_bytes = out.size(stages.clip_name(row.identity, row.bucket))
        if not shards or size + clip_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += clip_bytes
    return shards


def _example(row, out, serialize, bar):
    clip = row.clip
    bar.update()
    return serialize(
        {
            "id": row.identity,
            "source": row.source,
            "start": clip.start,
            "end": clip.end,
            "fps": clip.fps,
            "caption": row.caption,
            "bucket": str(row.bucket),
            "frames": clip.num_frames,
            "video": out.read(stages.clip_name(row.identity, row.bucket)),
        }
    )


# ---------------------------------------------------------------- what the user sees


def summary(rows):
    """{"clips": kept, "dropped": {first reason: n}, "buckets": {name: n}}; every row counts once."""
    dropped, buckets = {}, {}
    for row in rows:
        if row.kept:
            buckets[str(row.bucket)] = buckets.get(str(row.bucket), 0) + 1
        else:
            reason = _reasons(row)[0]
            dropped[reason] = dropped.get(reason, 0) + 1
    ordered = dict(sorted(dropped.items(), key=lambda entry: -entry[1]))
    return {"clips": sum(buckets.values()), "dropped": ordered, "buckets": dict(sorted(buckets.items()))}


def _reasons(row):
    return [row.reason] if row.reason else list(row.clip.reasons)


def _table(rows):
    """The rows as bytes of a Parquet file."""
    table = []
    for row in rows:
        details = {row.reason: row.problem} if row.reason else {}
        if row.clip is not None:
            details |= dict(row.clip.details)
        values = {
            "source": row.source,
            "sha256": row.sha256,
            "kept": row.kept,
            "reasons": [] if row.kept else _reasons(row),
            "details": "; ".join(f"{reason}: {text}" for reason, text in details.items()),
            "id": row.identity,
            "bucket": str(row.bucket or ""),
            "split": row.split,
            "caption": row.caption,
        }
        for score in dataclasses.fields(Clip):
            values.setdefault(score.name, getattr(row.clip, score.name) if row.clip else None)
        table.append(values)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
    return file.getvalue()


def _draw(rows, videos, out, most=24):
    """The contact sheet: up to `most` kept and `most` dropped clips, spread over buckets and reasons."""
    xdog, entries, totals = extractor("xdog"), [], {}
    for kept in (True, False):
        group = [row for row in rows if row.kept == kept and row.clip is not None]
        totals["kept" if kept else "dropped"] = sum(row.kept == kept for row in rows)
        for row in _spread(group, lambda row: str(row.bucket) if row.kept else _reasons(row)[0], most):
            frame = _middle_frame(row, videos, out)
            clip = row.clip
            if row.reason:
                clip = dataclasses.replace(clip, reasons=(row.reason,), details={row.reason: row.problem})
            entries.append(clip_entry(clip, frame, xdog(frame[None])[0]))
    with out.writing(CONTACT_SHEET) as path:
        draw_contact_sheet(entries, path, totals)


def _spread(rows, kind, most):
    """Up to `most` rows, as many of each kind as there are of the others; kinds stay together."""
    kinds = {}
    for row in rows:
        kinds.setdefault(kind(row), []).append(row)
    turns = itertools.chain(*itertools.zip_longest(*kinds.values()))
    chosen = list(itertools.islice(filter(None, turns), most))
    return sorted(chosen, key=lambda row: list(kinds).index(kind(row)))


def _middle_frame(row, videos, out):
    middle = (row.clip.start + row.clip.end) // 2
    if row.kept:
        data = out.read(stages.clip_name(row.identity, row.bucket))
        return clip_video.decode(data, [middle - row.clip.start])[0]
    try:
        with videos.local(row.source) as path, open_video(path) as stream:
            return next(frame for index, frame in enumerate(stream.frames) if index == middle)
    except (InputError, OSError, StopIteration):  # the source went away meanwhile: a grey picture
        return np.full((*row.clip.crop[2:], 3), 160, np.uint8)
