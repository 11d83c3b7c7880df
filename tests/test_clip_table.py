"""The table of clips says what the records say, and is believed only if it is theirs."""

import pyarrow.parquet
import pytest
from PIL import Image

from animecolor_jax.media_writing import write_video
from data_pipeline import records
from data_pipeline.clip_table import read_facts
from data_pipeline.curation import CurationConfig
from data_pipeline.prepare import TABLE, PrepareConfig, prepare
from data_pipeline.shapes import BucketConfig
from data_pipeline.toon import draw_clip

CONFIG = PrepareConfig(
    curation=CurationConfig(min_side=48, max_text=None),
    buckets=BucketConfig(bases=(128,), image_base=128, stride=1),
    test_share=0.5,
    shard_bytes=60_000,
)
BEAM = ("--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A dataset of several clips, some of them dropped, in both splits."""
    videos, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("out")
    for seed in range(6):
        frames = 5 if seed == 5 else 20  # too short
        clip = draw_clip(frames, 96, 160, seed=seed)
        write_video(videos / f"{seed}.mp4", clip.color, 24)
        (videos / f"{seed}.txt").write_text(f"caption {seed}")
    Image.fromarray(draw_clip(1, 200, 300, seed=9).color[0]).save(videos / "picture.png")
    (videos / "broken.mp4").write_bytes(b"no video")
    assert prepare(videos, out, CONFIG, beam_flags=BEAM)["clips"] == 6
    return records.open_clips(out)


@pytest.fixture
def table(clips):
    """The path of the table, which is put back after the test."""
    path = clips.storage.path(TABLE)
    before = clips.storage.read(TABLE)
    yield path
    clips.storage.write(TABLE, before)


@pytest.fixture
def reads(monkeypatch):
    """The buckets whose records are read."""
    reads, source = [], records.Records.source

    def counted(self, bucket, split):
        reads.append(bucket)
        return source(self, bucket, split)

    monkeypatch.setattr(records.Records, "source", counted)
    return reads


def of_records(clips):
    facts = {}
    for split in records.SPLITS:
        for bucket in clips.buckets(split):
            source = clips.source(bucket, split)
            facts[bucket, split] = [
                (r["id"].decode(), r["source"].decode(), r["fps"], r["caption"].decode(), r["frames"])
                for r in (source[i] for i in range(len(source)))
            ]
            assert all(source[i]["bucket"].decode() == str(bucket) for i in range(len(source)))
    return facts


def told(facts):
    names = ("id", "source", "fps", "caption", "frames")
    assert all(row["bucket"] == str(bucket) for (bucket, _), rows in facts.items() for row in rows)
    return {place: [tuple(row[name] for name in names) for row in rows] for place, rows in facts.items()}


def test_the_table_tells_what_the_records_hold_without_their_videos_being_read(clips, reads):
    facts = read_facts(clips)
    assert not reads
    assert {split for _, split in facts} == set(records.SPLITS)
    assert told(facts) == of_records(clips)


@pytest.mark.parametrize("change", ["missing", "a clip less", "another caption", "another split"])
def test_a_table_of_another_state_is_not_believed(clips, table, reads, change):
    expected = of_records(clips)
    rows = pyarrow.parquet.read_table(table).to_pylist()
    kept = next(row for row in rows if row["kept"])
    reads.clear()
    if change == "missing":
        clips.storage.remove(TABLE)
    else:
        if change == "a clip less":
            rows.remove(kept)
        elif change == "another caption":
            kept["caption"] = "else"
        else:
            kept["split"] = "test" if kept["split"] == "train" else "train"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert told(read_facts(clips)) == expected
    assert reads
