"""What `tools/benchmark.py data` measures: reading, decoding, line art, cartoons; on datasets made for it.

Files come from the page cache, as they do in training from the second epoch on where memory suffices; a disk
or network that is slower than the figures here is the limit.
"""

import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import jax
import numpy as np

from animecolor_jax.config import preset
from animecolor_jax.encoded_records import PrecomputeConfig, array_specs
from animecolor_jax.media_writing import write_video
from animecolor_jax.sketch import xdog
from data_pipeline import clip_video, records
from data_pipeline.dataset import DataConfig, LoadConfig, training_batches
from data_pipeline.examples import EMPTY_TEXT
from data_pipeline.shapes import Bucket
from data_pipeline.sketch import XDoG
from data_pipeline.storage import Storage
from data_pipeline.toon import draw_clip

CLIP = Bucket(49, 320, 512)  # decoded against precomputed
SMALL = Bucket(17, 96, 160)  # the tiny preset's, of cartoons alone
FULL = Bucket(49, 480, 720)  # the size at which a 2B clip is published
CLIP_FRAMES, NUM_CLIPS = 145, 8  # 145 frames are a window of 49 at stride 3
BATCH = 4
NEED = 10.0  # full-size clips a second of a host with two cores


def data(repeats):
    """All results; each line's name says what stands against what, `repeats` rounds each."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"drawing and encoding {NUM_CLIPS} clips of {CLIP_FRAMES} frames ...")
        clips = write_clips(folder / "clips", CLIP)
        encoded = write_encoded(folder / "clips" / "encoded" / "plain", CLIP)
        full_clips = write_clips(folder / "full", FULL, drawn=False)
        full = write_encoded(folder / "full" / "encoded" / "plain", FULL)
        packed = write_encoded(folder / "packed", FULL, compress=True)
        return [
            *loading(clips, encoded, repeats),
            full_size(full_clips, full, repeats),
            *reading(full, packed, repeats),
            *sketches(repeats),
            *toons(repeats),
            *sizes(clips, encoded, full),
        ]


# ---------------------------------------------------------------- datasets


def write_clips(root, bucket, drawn=True):
    """A dataset of toon clips; undrawn ones hold no video, where only precomputed records are read."""
    storage, serialize = Storage(root), records.Serializer(records.clip_features())
    examples = []
    for index in range(NUM_CLIPS):
        video = b""
        if drawn:
            color = draw_clip(CLIP_FRAMES, *bucket.size, seed=index).color
            video = clip_video.encode(iter(color), 24, clip_video.ClipEncoding())
        frames = {"start": 0, "end": CLIP_FRAMES, "frames": CLIP_FRAMES, "video": video}
        examples.append(serialize({**_texts(index, bucket), **frames}))
    _write(storage, records.CLIPS, bucket, serialize.features, examples)
    records.close(storage, records.CLOSING, {"digest": "benchmark", "buckets": _counts(bucket)})
    return records.open_clips(root)


def write_encoded(root, bucket, compress=False):
    """Precomputed records of the 2B model's sizes, one reference each, filled with noise in bfloat16."""
    config, rng = PrecomputeConfig(references=1), np.random.default_rng(0)
    specs = array_specs(bucket, preset("animecolor-2b"), ("text", "image", "latents"), config)
    serialize, examples = records.Serializer(records.encoded_features(specs)), []
    for index in range(NUM_CLIPS):
        arrays = {"window": np.int32([0, 3]), "reference_frames": np.int32([index])}
        for name in specs.keys() - arrays.keys():
            values = rng.standard_normal(specs[name][0], np.float32)
            arrays[name] = (values.view(np.uint32) >> 16).astype(np.uint16)
        examples.append(serialize({**_texts(index, bucket), "weights": "{}", **arrays}))
    storage = Storage(root)
    _write(storage, records.ENCODED, bucket, serialize.features, examples, compress)
    with storage.writing(EMPTY_TEXT) as path, path.open("wb") as file:
        np.save(file, np.zeros(specs["text"][0], np.uint16))
    settings = {"sketch": config.sketch, "stride": config.stride}
    info = {"digest": "benchmark", "clips": "benchmark", "weights": {}, "config": settings}
    records.close(storage, records.ENCODED_CLOSING, {**info, "buckets": _counts(bucket)})
    return records.Records(storage, records.ENCODED, {**info, "buckets": _counts(bucket)})


def _texts(index, bucket):
    return {"id": f"{index:032x}", "source": "a", "fps": 24.0, "caption": "a cat", "bucket": str(bucket)}


def _counts(bucket):
    return {str(bucket): {"train": NUM_CLIPS}}


def _write(storage, dataset, bucket, features, examples, compress=False):
    name = records.shard_name(dataset, bucket, "train", 0, 1)
    size = records.write_shard(storage, name, examples, compress=compress)
    records.write_metadata(storage, dataset, bucket, features, {"train": ([len(examples)], size)})


# ---------------------------------------------------------------- results


def line(name, shape, unit, ours, theirs=None, dtype="uint8"):
    """One result; unlike seconds, more is better: the ratio is ours / theirs."""
    ratio = None if theirs is None else ours / theirs
    values = {"unit": unit, "ours": ours, "theirs": theirs, "ratio": ratio}
    return {"name": name, "shape": shape, "dtype": dtype, **values}


def rate(run, count, repeats):
    """Median of `count` / seconds over `repeats` calls of `run`, after one to warm up."""
    run()
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def loading(clips, encoded, repeats):
    """Clips a second, decoded and precomputed side by side, with one and two workers; what a worker costs."""
    found = {}
    sources = {"decoded": None, "precomputed": encoded}
    for workers in (0, 1, 2):
        runs, loaders = {}, []
        for name, records_of in sources.items():
            batches = _batches(clips, records_of, workers)
            loaders.append(batches)
            runs[name] = lambda batches=batches: list(itertools.islice(batches, 4))
        began = time.perf_counter()
        runs["decoded"]()
        started = time.perf_counter() - began
        memory = [_resident(process.pid) for process in multiprocessing.active_children()][:workers]
        for name, run in runs.items():
            found[workers, name] = rate(run, 4 * BATCH, repeats)
        if workers == 1:
            cost = started, max(memory, default=0.0)
        for batches in loaders:
            batches.close()
    shape = str(CLIP)
    results = [
        line(
            f"clips/s, precomputed against decoded, {workers} workers",
            shape,
            "clips/s",
            found[workers, "precomputed"],
            found[workers, "decoded"],
        )
        for workers in (0, 1, 2)
    ]
    for name in sources:
        scaling = found[2, name] / found[1, name]
        results.append(line(f"{name} clips/s, 2 workers over 1", shape, "times", scaling))
    results.append(line("a worker's start, with its first 4 batches", shape, "s", cost[0]))
    return [*results, line("a worker's resident memory", shape, "MiB", cost[1])]


def _batches(clips, encoded, workers):
    config = DataConfig(batch_size=BATCH, load=LoadConfig(workers=workers))
    return training_batches(clips, config, encoded=encoded)


def _resident(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def full_size(clips, encoded, repeats):
    """Precomputed 2B clips a second against the number that a host should read."""
    best = 0.0
    for workers in (0, 1, 2):
        batches = _batches(clips, encoded, workers)
        best = max(best, rate(lambda b=batches: list(itertools.islice(b, 4)), 4 * BATCH, repeats))
        batches.close()
    return line("2B clips/s against need", f"{FULL}, all precomputed", "clips/s", best, NEED, "bfloat16")


def reading(plain, packed, repeats):
    """MB/s of record contents from ArrayRecord, uncompressed against zstd."""
    found = []
    for source in (dataset.source(FULL, "train") for dataset in (plain, packed)):
        size = sum(value.nbytes for value in source[0].values() if isinstance(value, np.ndarray))
        read = lambda source=source: [source[i] for i in range(len(source))]  # noqa: E731
        found.append(rate(read, size * len(source) / 1e6, repeats))
    return [line("ArrayRecord, uncompressed against zstd", str(FULL), "MB/s", *found, "bfloat16")]


def sketches(repeats, count=16):
    """XDoG: the jitted batch against the official per-frame OpenCV and NumPy expression."""
    frames = draw_clip(count, CLIP.height, CLIP.width, seed=0).color
    batch = jax.device_put(frames)

    def per_frame():
        result = []
        for frame in frames:
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (1.0, 1.6))
            dog = fine - 0.98 * coarse
            response = 1 + np.tanh(50 * (dog / dog.max() + 1.3 / 255))
            result.append(np.minimum(response, 1).astype(np.uint8) * 255)
        return np.stack(result)

    def jitted():
        return jax.block_until_ready(xdog(batch))

    host = XDoG()
    np.testing.assert_array_equal(jitted(), per_frame())
    theirs = rate(per_frame, count, repeats)
    shape = f"{count}x{CLIP.height}x{CLIP.width}"
    return [
        line(
            "XDoG, jitted against per-frame OpenCV", shape, "sketches/s", rate(jitted, count, repeats), theirs
        ),
        line(
            "XDoG, host against per-frame OpenCV",
            shape,
            "sketches/s",
            rate(lambda: host(frames), count, repeats),
            theirs,
        ),
    ]


def toons(repeats, clips=12):
    """Cartoons: frames drawn against frames encoded as H.264, the best of `repeats` for each clip.

    By CPU time of all threads: the encoder has several.
    """
    results = []
    for bucket in (SMALL, CLIP):
        drawing = encoding = 0.0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            for seed in range(clips):
                draw = functools.partial(draw_clip, bucket.frames, *bucket.size, seed=seed)
                encode = functools.partial(write_video, path, draw().color, 24)
                drawing += min(cpu_seconds(draw) for _ in range(repeats))
                encoding += min(cpu_seconds(encode) for _ in range(repeats))
        rates = (clips * bucket.frames / seconds for seconds in (drawing, encoding))
        results.append(line("cartoons, drawn against encoded, CPU time", str(bucket), "frames/s", *rates))
    return results


def cpu_seconds(run):
    """CPU time of all threads in one call of `run`."""
    began = time.process_time()
    run()
    return time.process_time() - began


def sizes(clips, encoded, full):
    """Megabytes a clip on disk."""
    results = []
    for name, dataset, bucket in (
        ("encoded video", clips, CLIP),
        ("precomputed", encoded, CLIP),
        ("precomputed", full, FULL),
    ):
        size = dataset.builder(bucket).info.splits["train"].num_bytes
        results.append(line(f"{name}, a clip", str(bucket), "MB", size / NUM_CLIPS / 1e6))
    return results
