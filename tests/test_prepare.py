"""From a folder of videos to a dataset: what is kept, what is dropped and why, and what a kill costs."""

import contextlib
import dataclasses
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.media import read_video
from animecolor_jax.media_writing import write_video
from data_pipeline import clip_video, records, stages
from data_pipeline.curation import CurationConfig
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.shapes import Bucket, BucketConfig
from data_pipeline.storage import Storage
from data_pipeline.toon import draw_clip

ONE_PROCESS = ("--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1")
CONFIG = PrepareConfig(
    curation=CurationConfig(min_side=48, max_text=None),
    buckets=BucketConfig(bases=(128,), image_base=128, stride=1),
    test_share=0.0,
    shard_bytes=60_000,
)
TOOL = [sys.executable, str(Path("tools/prepare_data.py").resolve()), "--json", "--test-share", "0"]
TOOL += ["--curation.min-side", "48", "--curation.max-text", "None", "--buckets.bases", "128"]
TOOL += ["--buckets.image-base", "128", "--buckets.stride", "1"]


@contextlib.contextmanager
def no_progress(total, desc):
    class Bar:
        n = 0

        def update(self, count=1):
            pass

        def refresh(self):
            pass

    yield Bar()


def run(videos, out, config=CONFIG, **options):
    return prepare(videos, out, config, beam_flags=ONE_PROCESS, progress=no_progress, **options)


def toon(path, seed, frames=20, size=(96, 160)):
    clip = draw_clip(frames, *size, seed=seed)
    write_video(path, clip.color, 24)
    path.with_suffix(".txt").write_text(clip.caption)
    return clip


def table_of(out):
    rows = pyarrow.parquet.read_table(Path(out) / "clips.parquet").to_pylist()
    return {(row["source"], row["start"]): row for row in rows}


def contents(out):
    """{id: record} of all records of a dataset."""
    opened = records.open_clips(out)
    found = {}
    for split in records.SPLITS:
        for bucket in opened.buckets(split):
            source = opened.source(bucket, split)
            found |= {source[i]["id"].decode(): source[i] for i in range(len(source))}
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Good clips of several shapes, and every kind of file that must be refused."""
    folder = tmp_path_factory.mktemp("videos")
    toon(folder / "wide.mp4", 1)
    (folder / "sub folder").mkdir()
    toon(folder / "sub folder" / "tall.mp4", 2, size=(160, 96))
    toon(folder / "odd.mkv", 3, size=(97, 161))
    two = [draw_clip(14, 96, 160, seed=seed).color for seed in (4, 5)]
    write_video(folder / "two_shots.mp4", np.concatenate(two), 24)
    toon(folder / "short.mp4", 6, frames=5)
    write_video(folder / "still.mp4", draw_clip(1, 96, 160, seed=7).color.repeat(20, 0), 24)
    bars = np.pad(draw_clip(20, 96, 160, seed=8).color, ((0, 0), (20, 20), (0, 0), (0, 0)))
    write_video(folder / "letterbox.mp4", bars, 24)
    scaled = np.stack([cv2.resize(f, (192, 116)) for f in draw_clip(20, 96, 160, seed=1).color])
    write_video(folder / "wide_again.mp4", scaled, 24)
    Image.fromarray(draw_clip(1, 200, 300, seed=9).color[0]).save(folder / "picture.png")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    (folder / "truncated.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:9000])
    with av.open(str(folder / "sound.m4a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / ".hidden.mp4").write_bytes(b"not looked at")
    return folder


@pytest.fixture(scope="module")
def dataset(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    return out, run(videos, out)


def test_every_file_is_accounted_for(videos, dataset):
    out, report = dataset
    table = table_of(out)
    names = {path.relative_to(videos).as_posix() for path in videos.rglob("*.*") if path.suffix != ".txt"}
    assert {source for source, _ in table} == names - {".hidden.mp4"}
    assert report["clips"] + sum(report["dropped"].values()) == len(table)
    assert report["clips"] == sum(report["buckets"].values()) == len(contents(out))


def test_what_is_dropped_says_why(dataset):
    out, report = dataset
    reasons = {source: row["reasons"] for (source, _), row in table_of(out).items() if not row["kept"]}
    assert reasons == {
        "short.mp4": ["short"],
        "still.mp4": ["static", "little-motion"],
        "wide.mp4": ["duplicate"],
        "empty.mp4": ["unreadable"],
        "text.mp4": ["unreadable"],
        "truncated.mp4": ["unreadable"],
        "sound.m4a.mp4": ["unreadable"],
    }
    details = {source: row["details"] for (source, _), row in table_of(out).items()}
    assert "0 bytes" in details["empty.mp4"] and "no video stream" in details["sound.m4a.mp4"]
    assert "5 frames, at least 9 wanted" in details["short.mp4"]
    assert "wide_again.mp4" in details["wide.mp4"]


def test_shots_become_clips_of_their_own_and_bars_are_cut(dataset):
    out, _ = dataset
    table = table_of(out)
    assert ("two_shots.mp4", 0) in table and ("two_shots.mp4", 14) in table
    assert table["letterbox.mp4", 0]["crop"] == [20, 0, 96, 160]


def test_clips_go_to_the_bucket_of_their_shape(dataset):
    out, _ = dataset
    buckets = {source: row["bucket"] for (source, _), row in table_of(out).items() if row["kept"]}
    assert buckets["letterbox.mp4"] == "17x96x160" and buckets["sub folder/tall.mp4"] == "17x160x96"
    assert buckets["two_shots.mp4"] == "9x96x160" and buckets["picture.png"].startswith("1x")


def test_records_hold_the_clips_pixels_and_captions(videos, dataset):
    out, _ = dataset
    table, found = table_of(out), contents(out)
    row = table["sub folder/tall.mp4", 0]
    record = found[row["id"]]
    source = read_video(videos / "sub folder" / "tall.mp4").frames
    assert record["caption"].decode() == draw_clip(20, 160, 96, seed=2).caption == row["caption"] != ""
    assert (record["frames"], record["start"], record["end"], record["fps"]) == (20, 0, 20, 24)
    stored = clip_video.decode(record["video"], range(20))
    assert stored.shape == (20, 160, 96, 3)
    assert np.abs(stored.astype(int) - source).mean() < 2
    picture = found[table["picture.png", 0]["id"]]
    bucket = Bucket.parse(picture["bucket"].decode())
    assert clip_video.decode(picture["video"], [0]).shape == (1, *bucket.size, 3)


def test_the_contact_sheet_shows_something(dataset):
    sheet = np.asarray(Image.open(Path(dataset[0]) / "contact_sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 100 and sheet.std() > 20


def test_the_same_command_again_does_nothing(videos, dataset, monkeypatch):
    out, report = dataset
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*record*")}

    def again(stream, *_):
        list(stream.frames)  # a truncated file is found out here
        pytest.fail("a video was looked at again")

    monkeypatch.setattr(stages, "curate_video", again)
    monkeypatch.setattr(stages, "_fit", None)
    assert run(videos, out) == report
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*record*")} == before


def test_new_files_and_other_thresholds_redo_only_their_part(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("wide.mp4", "odd.mkv", "short.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    first = run(folder, tmp_path / "out")
    curated = set(Storage(tmp_path / "out").names(stages.SOURCES))
    (folder / "tall.mp4").write_bytes((videos / "sub folder" / "tall.mp4").read_bytes())
    looser = dataclasses.replace(CONFIG, curation=dataclasses.replace(CONFIG.curation, min_motion=1e6))
    second = run(folder, tmp_path / "out", looser)
    again = set(Storage(tmp_path / "out").names(stages.SOURCES))
    assert curated < again and len(again - curated) == 1, "thresholds need no second look at a video"
    assert first["clips"] == 2 and second["clips"] == 0
    assert second["dropped"] == {"little-motion": 3, "short": 1}
    third = run(folder, tmp_path / "out")
    assert third["clips"] == 3 and len(contents(tmp_path / "out")) == 3


def test_splits_never_share_a_source(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in range(12):
        toon(folder / f"{seed}.mp4", 20 + seed, frames=10)
    two = [draw_clip(10, 96, 160, seed=seed).color for seed in (40, 41)]
    write_video(folder / "two.mp4", np.concatenate(two), 24)
    run(folder, tmp_path / "out", dataclasses.replace(CONFIG, test_share=0.5))
    rows = [row for row in table_of(tmp_path / "out").values() if row["kept"]]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len({row["split"] for row in rows if row["source"] == "two.mp4"}) == 1
    opened = records.open_clips(tmp_path / "out")
    counts = {split: sum(opened.buckets(split).values()) for split in records.SPLITS}
    assert counts == {split: sum(row["split"] == split for row in rows) for split in records.SPLITS}
    shards = [path for path in (tmp_path / "out").rglob("*array_record*") if "train" in path.name]
    assert len(shards) > 1 or counts["train"] < 4, "shards are cut by their bytes"


def test_a_dataset_may_live_in_an_object_store(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("ANIMECOLOR_CACHE", str(tmp_path / "cache"))
    source = Storage(f"memory://{tmp_path.name}/videos")
    for name in ("wide.mp4", "wide.txt", "empty.mp4"):
        source.write(name, (videos / name).read_bytes())
    out = Storage(f"memory://{tmp_path.name}/set")
    report = run(source.root, out.root)
    assert report["clips"] == 1 and report["dropped"] == {"unreadable": 1}
    local = tmp_path / "local"
    local.mkdir()
    for name in ("wide.mp4", "wide.txt", "empty.mp4"):
        (local / name).write_bytes((videos / name).read_bytes())
    run(local, tmp_path / "set")
    assert contents(out.root) == contents(tmp_path / "set")


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(videos, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "wide.mp4").write_bytes((videos / "wide.mp4").read_bytes())

    write = Storage.write

    def full(self, name, data):
        if name.endswith(".mp4"):
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        with pytest.raises(Exception, match="No space left"):
            run(folder, tmp_path / "out")
    with pytest.raises(InputError, match="not finished"):
        records.open_clips(tmp_path / "out")
    assert run(folder, tmp_path / "out")["clips"] == 1


def test_strange_names_and_links_are_accounted_for(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    data = (videos / "wide.mp4").read_bytes()
    (folder / "-- #1 100% \u30ac\u30f3\u30c0\u30e0.mp4").write_bytes(data)
    (folder / "-- #1 100% \u30ac\u30f3\u30c0\u30e0.jpg").write_bytes(b"no picture")
    (folder / "-- #1 100% \u30ab\u3099\u30f3\u30bf\u3099\u30e0.txt").write_text("a caption")  # decomposed
    (folder / "readme.txt").write_bytes(b"caf\xe9")
    (folder / "lost.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "up").symlink_to(folder)
    report = run(folder, tmp_path / "out")
    assert report["clips"] == 1 and report["dropped"] == {"unreadable": 1, "failed": 1}
    assert {record["caption"] for record in contents(tmp_path / "out").values()} == {b"a caption"}
    assert "lost.mp4" in {source for source, _ in table_of(tmp_path / "out")}
    (folder / os.fsdecode(b"\x83K\x83\x93.mp4")).write_bytes(data)
    with pytest.raises(InputError, match="is not UTF-8"):
        run(folder, tmp_path / "out")


def test_a_clip_too_short_for_the_buckets_drops_no_longer_twin(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    clip = draw_clip(30, 96, 160, seed=1).color
    write_video(folder / "a.mp4", clip[:12], 24)
    write_video(folder / "b.mp4", np.stack([cv2.resize(frame, (156, 94)) for frame in clip]), 24)
    buckets = dataclasses.replace(CONFIG.buckets, frame_counts=(17, 25))
    report = run(folder, tmp_path / "out", dataclasses.replace(CONFIG, buckets=buckets))
    assert report["clips"] == 1 and report["dropped"] == {"short": 1}


def test_impossible_requests_are_refused_before_any_work(videos, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "link").symlink_to(videos)
    (tmp_path / "other" / "animecolor").mkdir(parents=True)
    for folder, out, said in (
        (tmp_path / "nowhere", tmp_path / "out", "does not exist"),
        (tmp_path / "none", tmp_path / "out", "holds no videos"),
        (videos, videos / "set", "lies inside the folder of videos"),
        (videos, tmp_path / "none" / ".." / "link" / "set", "lies inside the folder of videos"),
        (videos, tmp_path / "other", "not of a dataset"),
    ):
        with pytest.raises(InputError, match=said):
            run(folder, out)
    with pytest.raises(InputError, match="--vidoes"):
        prepare(videos, tmp_path / "out", CONFIG, beam_flags=("--vidoes", "x"), progress=no_progress)
    assert not (tmp_path / "out").exists()
    for fields in ({"test_share": 1.0}, {"shard_bytes": 0}):
        with pytest.raises(InputError, match=next(iter(fields))):
            PrepareConfig(**fields)


@pytest.mark.slow
def test_the_tool_survives_kill_9_and_then_equals_an_uninterrupted_run(videos, dataset, tmp_path):
    """Killed at three random moments, on all cores; the same command then makes the same dataset."""
    command = [*TOOL, "--videos", str(videos), "--out", str(tmp_path / "out")]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        finished = _wait_for_files(tmp_path / "out", rng.randint(1, 8), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not finished:
            with pytest.raises(InputError, match="not finished|no dataset"):
                records.open_clips(tmp_path / "out")
        halves = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert all(name.startswith(".") or not name.endswith(".tmp") for name in halves)
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(last.stdout.splitlines()[-1])
    assert {key: report[key] for key in ("clips", "dropped", "buckets")} == {
        key: dataset[1][key] for key in ("clips", "dropped", "buckets")
    }
    assert contents(tmp_path / "out") == contents(dataset[0])


def _wait_for_files(out, more, process):
    """Waits until so many more results are there; True if the process ended first."""
    there = len(list(out.rglob("*.json"))) + len(list(out.rglob("*.mp4"))) if out.exists() else 0
    while process.poll() is None:
        now = len(list(out.rglob("*.json"))) + len(list(out.rglob("*.mp4"))) if out.exists() else 0
        if now >= there + more:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--out"),
        (["--out", "x"], "neither is given"),
        (["--out", "x", "--videos", "nowhere"], "does not exist"),
        (["--out", "x", "--videos", ".", "--curation.min-frames", "0"], "min_frames"),
        (["--out", "x", "--precompute", "latents"], "--weights"),
    ],
)
def test_the_tool_refuses_bad_arguments_with_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [TOOL[1], "--json", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(TOOL[1], run_name="__main__")
    assert stop.value.code == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert said in error["what"] + error["where"]
