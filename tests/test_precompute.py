"""Precomputed records: what is in them, and that nothing finished is ever lost or mixed up."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from animecolor_jax import denoise, pipeline, safetensors_io
from animecolor_jax.config import preset
from animecolor_jax.earlier_results import ResultReader
from animecolor_jax.encoded_records import PrecomputeConfig, choose_frames
from animecolor_jax.encoding import Encoder, component_hash, local_mesh
from animecolor_jax.errors import InputError
from animecolor_jax.models.vae import posterior
from animecolor_jax.pipeline import NonFiniteError
from animecolor_jax.precompute import WHAT, precompute
from animecolor_jax.weights import Weights, write_initial
from data_pipeline import clip_video, records
from data_pipeline.shapes import Bucket, BucketConfig
from data_pipeline.sketch import extractor
from data_pipeline.storage import Storage
from data_pipeline.toon import draw_clip

ROOT = Path(__file__).parents[1]
VIDEO, IMAGE = Bucket(9, 32, 48), Bucket(1, 32, 48)
# The clips of every shard, by their numbers
SHARDS = {(VIDEO, "train"): [[0, 1, 2], [3, 4]], (VIDEO, "test"): [[5]], (IMAGE, "train"): [[6, 7]]}
ONE_DEVICE = {"batch_size": 2, "mesh": "data=1"}
ENCODING = clip_video.ClipEncoding()
COMPONENTS = ("vae", "text_encoder", "image_encoder")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny", seed=0)


def write_weights(folder, seed):
    config = preset("tiny")
    vae = dataclasses.replace(config.vae, block_out_channels=(8, 8, 8, 8))  # compiles faster
    write_initial(folder, dataclasses.replace(config, vae=vae, lcg=None, hce=None), seed)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips") / "data")


@pytest.fixture
def data(clips, tmp_path):
    """A dataset of the test's own."""
    return shutil.copytree(clips, tmp_path / "data")


def write_dataset(folder, shards=SHARDS, changes=None):
    """A finished dataset of drawn clips of 11 frames, and single images; one that is there is replaced.

    changes: {number: {name: value}} of records.
    """
    storage, changes = Storage(folder), changes or {}
    drawn = draw_clip(num_frames=20, height=32, width=48).color
    storage.remove(records.CLIPS)
    features = records.clip_features()
    serialize = records.Serializer(features)
    for bucket in (VIDEO, IMAGE):
        splits = {}
        for split, numbers in ((split, numbers) for (b, split), numbers in shards.items() if b == bucket):
            size = 0
            for index, shard in enumerate(numbers):
                examples = []
                for number in shard:
                    record = clip_record(number, bucket, drawn[number : number + 11])
                    examples.append(serialize({**record, **changes.get(number, {})}))
                name = records.shard_name(records.CLIPS, bucket, split, index, len(numbers))
                size += records.write_shard(storage, name, examples)
            splits[split] = list(map(len, numbers)), size
        records.write_metadata(storage, records.CLIPS, bucket, features, splits)
    buckets = {}
    for (bucket, split), numbers in shards.items():
        buckets.setdefault(str(bucket), {})[split] = sum(map(len, numbers))
    digest = f"{[*map(str, shards.items())]} {changes}"
    records.close(storage, records.CLOSING, {"digest": digest, "buckets": buckets})
    return folder


def clip_record(number, bucket, frames):
    image = bucket.is_image
    video = clip_video.encode_image(frames[0]) if image else clip_video.encode(frames, 24, ENCODING)
    return {
        "id": f"{number:032x}",
        "source": f"clip{number}.mp4",
        "start": 0,
        "end": 1 if image else 11,
        "fps": 24.0,
        "caption": f"caption {number}",
        "bucket": str(bucket),
        "frames": 1 if image else 11,
        "video": video,
    }


def run(data, weights, **options):
    return precompute(data, weights, **{**ONE_DEVICE, **options})


def files(report):
    """{name: bytes} of everything in the set."""
    root = Path(report["encoded"])
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def hashes(weights, components=COMPONENTS):
    return {name: component_hash(Weights(weights), name) for name in components}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clips, weights):
    """(dataset, report) of an uninterrupted run."""
    data = shutil.copytree(clips, tmp_path_factory.mktemp("finished") / "data")
    return data, run(data, weights)


def read(data, weights, bucket, split):
    source = records.open_encoded(data, hashes(weights)).source(bucket, split)
    return [source[i] for i in range(len(source))]


def test_every_clip_has_its_record_in_the_same_place(finished, weights):
    data, report = finished
    assert report["finished"] and report["clips"] == 8
    assert report["buckets"] == {"9x32x48": 6, "1x32x48": 2}
    clips, encoded = records.open_clips(data), records.open_encoded(data, hashes(weights))
    assert encoded.buckets("train") == clips.buckets("train") == {IMAGE: 2, VIDEO: 5}
    shards = [name for name in files(report) if "array_record" in name]
    assert report["bytes"] == sum((Path(report["encoded"]) / name).stat().st_size for name in shards)
    assert sorted(map(os.path.basename, shards)) == [
        "animecolor_encoded-test.array_record-00000-of-00001",
        "animecolor_encoded-train.array_record-00000-of-00001",
        "animecolor_encoded-train.array_record-00000-of-00002",
        "animecolor_encoded-train.array_record-00001-of-00002",
    ]
    for bucket, split in SHARDS:
        source = clips.source(bucket, split)
        for clip, record in zip(source, read(data, weights, bucket, split), strict=True):
            for name in ("id", "source", "fps", "caption", "bucket"):
                assert clip[name] == record[name]
            assert json.loads(record["weights"]) == hashes(weights)
    assert {path.name for path in Path(report["encoded"]).iterdir()} == {
        "animecolor_encoded",
        "empty_text.npy",
        "index.json",
        "encoded.json",
    }


@pytest.mark.parametrize(("bucket", "split", "index"), [(VIDEO, "train", 4), (IMAGE, "train", 0)])
def test_arrays_are_what_the_pipeline_computes(finished, weights, bucket, split, index):
    data, _ = finished
    record = read(data, weights, bucket, split)[index]
    clip = records.open_clips(data).source(bucket, split)[index]
    start, stride = record["window"].tolist()
    frames = clip_video.decode(clip["video"], [start + i * stride for i in range(bucket.frames)])
    references = clip_video.decode(clip["video"], record["reference_frames"].tolist())
    sketch = extractor("xdog")(frames)[..., None].repeat(3, axis=-1)
    loaded = Weights(weights)
    vae, t5, radio = (loaded.load(name, dtype="bfloat16") for name in COMPONENTS)

    def encode(frames):  # [T, H, W, 3] -> [t, h, w, 2C]
        pixels = jnp.asarray([frames, frames], jnp.float32) / 255 * 2 - 1
        moments, cache = denoise.encode_chunk(vae, pixels[:, :5], None)
        if frames.shape[0] == 1:
            return moments[0]
        return jnp.concatenate([moments, denoise.encode_chunk(vae, pixels[:, 5:], cache)[0]], axis=1)[0]

    ids = pipeline.tokenize(loaded.config, Encoder(loaded).tokenizer, [clip["caption"].decode()] * 2)
    images = [denoise.encode_image(radio, jnp.asarray([image, image]) / 255) for image in references]
    video, colors = encode(frames), [encode(image[None])[0] for image in references]
    expected = {
        "video_mean": video[..., :4],
        "video_logvar": video[..., 4:],
        "sketch": posterior(encode(sketch))[0],
        "reference_mean": jnp.stack([moments[..., :4] for moments in colors]),
        "reference_logvar": jnp.stack([moments[..., 4:] for moments in colors]),
        "text": denoise.encode_text(t5, jnp.asarray(ids))[0],
        "image_summary": jnp.stack([summary[0] for summary, _ in images]),
        "image_features": jnp.stack([features[0] for _, features in images]),
    }
    for name, array in expected.items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(records.decode_bits(record[name]), np.asarray(array), name)


def test_the_empty_text_is_kept_for_text_dropout(finished, weights):
    _, report = finished
    bits = np.load(Path(report["encoded"]) / "empty_text.npy")
    empty = Encoder(Weights(weights)).text(["", "else"])["text"]
    np.testing.assert_array_equal(bits.view(ml_dtypes.bfloat16), np.asarray(empty[0]))
    assert bits.shape == (192, 32) and (empty[0] != empty[1]).any()


# ---------------------------------------------------------------- going on where a run stopped


class Stopped(Exception):
    pass


@pytest.fixture
def calls(monkeypatch):
    """The networks of every batch that is computed; `calls.limit` of them, then the run stops."""

    class Calls(list):
        limit = None

    calls = Calls()
    for name in WHAT:
        encode = getattr(Encoder, name)

        def counted(self, *args, encode=encode, name=name, **kwargs):
            if len(calls) == calls.limit:
                raise Stopped
            calls.append(name)
            return encode(self, *args, **kwargs)

        monkeypatch.setattr(Encoder, name, counted)
    return calls


@pytest.mark.parametrize("limit", [0, 8, 14])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(finished, weights, data, calls, limit):
    calls.limit = limit
    with pytest.raises(Stopped):
        run(data, weights)
    with pytest.raises(InputError, match="is not finished|holds no precomputed records"):
        records.open_encoded(data, hashes(weights))
    calls.limit = None
    assert files(run(data, weights)) == files(finished[1])
    assert calls == ["text"] * 6 + ["image"] * 5 + ["latents"] * 5  # nothing is computed twice
    assert run(data, weights) == {**finished[1], "encoded": str(next((data / "encoded").iterdir()))}
    assert len(calls) == 16


def test_processes_share_the_work_and_leave_the_files_of_one(finished, weights, data, calls):
    first = run(data, weights, process_index=1, process_count=2)
    assert not first["finished"] and first["bytes"] is None
    some = len(calls)
    second = run(data, weights, process_index=0, process_count=2)
    assert 0 < some < len(calls) == 16
    assert second["finished"] and files(second) == files(finished[1])


KILLED = """
import os, signal, sys
from animecolor_jax.encoding import Encoder
from animecolor_jax.precompute import precompute
encode, calls = Encoder.image, []
def image(self, references):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, references)
Encoder.image = image
precompute(*sys.argv[1:], batch_size=2, mesh="data=1")
"""


@pytest.mark.slow
def test_a_killed_process_loses_the_batch_in_hand_only(finished, weights, data, calls):
    code = "import jax; jax.config.update('jax_default_matmul_precision', 'float32')\n" + KILLED
    killed = subprocess.run([sys.executable, "-c", code, data, weights], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert files(run(data, weights)) == files(finished[1])
    assert calls == ["image"] * 2 + ["latents"] * 5


# ---------------------------------------------------------------- taking over what other sets hold


@pytest.fixture
def earlier(finished, tmp_path):
    """A dataset of the test's own with its finished set."""
    return shutil.copytree(finished[0], tmp_path / "data")


def by_id(data, weights, shards):
    """{number: record} of the newest state's set."""
    found = [record for place in shards for record in read(data, weights, *place)]
    assert len(found) == sum(len(numbers) for shard in shards.values() for numbers in shard)
    return {int(record["id"], 16): record for record in found}


def assert_same(records, expected, numbers):
    for number in numbers:
        assert records[number].keys() == expected[number].keys()
        for name, value in expected[number].items():
            np.testing.assert_array_equal(records[number][name], value, f"{name} of {number}")


@pytest.mark.parametrize(
    "shards", [[[0, 8, 1], [2, 3], [4]], [[8, 0, 1], [2, 3, 9], [4]]], ids=["one", "two"]
)
def test_only_added_clips_are_computed_and_in_common_batches(finished, weights, earlier, calls, shards):
    old, after = by_id(earlier, weights, SHARDS), {**SHARDS, (VIDEO, "train"): shards}
    before = files({"encoded": next((earlier / "encoded").iterdir())})
    report = run(write_dataset(earlier, after), weights)
    assert calls == list(WHAT)  # not even that of the empty text
    assert report["reused"] == 8 and report["clips"] == sum(map(len, shards)) + 3
    assert files(finished[1]) == before and report["encoded"] != finished[1]["encoded"]
    assert files(report)["empty_text.npy"] == before["empty_text.npy"]
    new = by_id(earlier, weights, after)
    assert_same(new, old, range(8))
    if len(new) == 10:
        fresh = write_dataset(earlier.parent / "fresh", after)
        assert run(fresh, weights)["reused"] == 0
        assert_same(new, by_id(fresh, weights, after), new)  # on a CPU bits do not depend on the batch
    there = {"animecolor_encoded", "empty_text.npy", "index.json", "encoded.json"}
    assert {path.name for path in Path(report["encoded"]).iterdir()} == there  # and no parts


def test_the_set_taken_over_from_may_be_deleted(weights, earlier, calls, monkeypatch):
    monkeypatch.setattr(ResultReader, "read", None)  # records that stay the same are not taken apart
    old, after = by_id(earlier, weights, SHARDS), {**SHARDS, (IMAGE, "train"): [[7]]}
    first = next((earlier / "encoded").iterdir())
    report = run(write_dataset(earlier, after), weights)
    assert calls == [] and report["reused"] == report["clips"] == 7
    shutil.rmtree(first)
    assert run(earlier, weights) == {**report, "reused": 0}
    assert_same(by_id(earlier, weights, after), old, {*range(6), 7})
    run(write_dataset(earlier, SHARDS), weights)
    assert calls == list(WHAT)


@pytest.mark.parametrize(("limit", "left"), [(8, (1, 3, 5)), (14, (1, 1, 3))])
def test_an_unfinished_set_is_taken_over_too_by_a_run_that_is_stopped_itself(
    finished, weights, data, calls, limit, left
):
    after = {**SHARDS, (VIDEO, "train"): [[0, 1], [2, 8], [3, 4]]}
    calls.limit = limit
    with pytest.raises(Stopped):
        run(data, weights)
    write_dataset(data, after)
    calls.limit += 1
    with pytest.raises(Stopped):
        run(data, weights)
    calls.limit = None
    report = run(data, weights)
    assert calls[limit:] == [network for network, n in zip(WHAT, left, strict=True) for _ in range(n)]
    assert report["finished"] and report["reused"] == 8
    assert_same(by_id(data, weights, after), by_id(finished[0], weights, SHARDS), range(8))


def test_a_clip_of_another_split_is_computed_anew(weights, earlier, calls):
    old, after = by_id(earlier, weights, SHARDS), {**SHARDS, (VIDEO, "train"): [[0, 1, 2], [5, 3, 4]]}
    del after[VIDEO, "test"]
    assert run(write_dataset(earlier, after), weights)["reused"] == 7
    assert calls == list(WHAT)
    new = by_id(earlier, weights, after)
    assert_same(new, old, {*range(8)} - {5})
    choice = choose_frames(f"{5:032x}", 11, VIDEO, "train", PrecomputeConfig())
    assert (*new[5]["window"], *new[5]["reference_frames"]) == (*choice[:2], *choice.references)
    assert old[5]["reference_frames"][0] == 0 != new[5]["reference_frames"][0]


def test_another_caption_costs_its_text_and_another_file_name_nothing(weights, earlier, calls):
    old = by_id(earlier, weights, SHARDS)
    changes = {2: {"caption": "another"}, 3: {"source": "renamed.mp4"}}
    assert run(write_dataset(earlier, changes=changes), weights)["reused"] == 8
    assert calls == ["text"]
    new = by_id(earlier, weights, SHARDS)
    assert new[2]["caption"] == b"another" and (new[2]["text"] != old[2]["text"]).any()
    assert new[3]["source"] == b"renamed.mp4"
    for name, number in (("caption", 2), ("text", 2), ("source", 3)):
        del old[number][name], new[number][name]
    assert_same(new, old, range(8))


def test_a_set_of_some_networks_serves_one_of_more_and_the_other_way_round(finished, weights, data, calls):
    run(data, weights, what=["image"])
    run(data, weights, what=["text"])
    calls.clear()
    report = run(data, weights)
    assert calls == ["latents"] * 5 and report["reused"] == 8
    assert_same(by_id(data, weights, SHARDS), by_id(finished[0], weights, SHARDS), range(8))
    run(data, weights, what=["image", "latents"])
    assert calls == ["latents"] * 5


def test_other_weights_and_configs_reuse_nothing(weights, earlier, calls, tmp_path):
    other = write_weights(tmp_path / "other", seed=1)
    assert run(earlier, other, what=["text", "image"])["reused"] == 0
    assert calls == ["text"] * 6 + ["image"] * 5
    calls.clear()
    assert run(earlier, weights, what=["text"], config=PrecomputeConfig(seed=1))["reused"] == 0
    assert calls == ["text"] * 6
    calls.clear()
    shutil.copy(other / "vae.safetensors", weights := shutil.copytree(weights, tmp_path / "mixed"))
    assert run(earlier, weights)["reused"] == 8
    assert calls == ["latents"] * 5


# ---------------------------------------------------------------- what is refused


def test_other_weights_are_refused_by_name(finished, weights, tmp_path):
    data, _ = finished
    mine = hashes(weights)
    assert records.open_encoded(data, mine).info["weights"] == mine
    for name in COMPONENTS:
        with pytest.raises(InputError, match=f"made with another {name}"):
            records.open_encoded(data, {**mine, name: "0" * 32})


def test_the_hash_tells_parameters_config_and_tokenizer_but_not_the_dtype(weights, tmp_path):
    mine = hashes(weights)
    other = hashes(write_weights(tmp_path / "other", seed=1))
    assert all(mine[name] != other[name] for name in COMPONENTS)

    def changed(component, **values):
        copy = shutil.copytree(weights, tmp_path / f"{component}-{'-'.join(values)}")
        content = json.loads((copy / "config.json").read_text())
        content["components"][component].update(values)
        (copy / "config.json").write_text(json.dumps(content))
        found = hashes(copy)
        return {name for name in COMPONENTS if found[name] != mine[name]}

    assert changed("vae", dtype="bfloat16") == set()
    assert changed("vae", encode_chunk=8) == {"vae"}
    assert changed("denoiser", text_length=100) == {"text_encoder"}
    copy = shutil.copytree(weights, tmp_path / "tokenizer")
    (copy / "tokenizer" / "byte_level.json").write_text("{}")
    assert hashes(copy) == {**mine, "text_encoder": component_hash(Weights(copy), "text_encoder")} != mine


def test_another_config_or_state_of_the_clips_makes_another_set(weights, data):
    def made(**options):
        report = run(data, weights, what=["text"], **options)
        return records.open_encoded(data, hashes(weights)), report["encoded"]

    first, folder = made()
    assert first.info["what"] == ["text"] and set(first.info["weights"]) == {"text_encoder"}
    features = set(first.source(VIDEO, "train")[0])
    assert features == {"id", "source", "fps", "caption", "bucket", "weights", "text"}
    assert made(config=PrecomputeConfig(seed=1))[1] != folder
    closing = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**closing, "digest": "another"}))
    with pytest.raises(InputError, match="earlier state of the clips"):
        records.open_encoded(data, hashes(weights))
    assert made()[1] != folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ["text", "video"]}, "'text,video'"),
        ({"what": []}, "''"),
        ({"batch_size": 0}, "1 clip or more"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"mesh": "tensor=2"}, "axes data and fsdp only"),
        ({"mesh": "data=99"}, "needs 99 devices"),
    ],
)
def test_impossible_arguments_are_refused(weights, clips, options, message):
    with pytest.raises(InputError, match=message):
        run(clips, weights, **options)
    assert not (clips / "encoded").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("references", 0), ("stride", 0), ("seed", -1), ("dtype", "int8")]
)
def test_impossible_configs_are_refused(field, value):
    with pytest.raises(InputError, match=f"encoded.{field}"):
        PrecomputeConfig(**{field: value})


def test_missing_networks_and_unfinished_datasets_are_refused(weights, data, tmp_path):
    copy = shutil.copytree(weights, tmp_path / "weights")
    (copy / "image_encoder.safetensors").unlink()
    with pytest.raises(InputError, match="lacks image_encoder"):
        run(data, copy)
    with pytest.raises(InputError, match="unknown extractor"):
        run(data, weights, config=PrecomputeConfig(sketch="none"))
    (data / "dataset.json").unlink()
    with pytest.raises(InputError, match="has no dataset.json"):
        run(data, weights)
    assert not (data / "encoded").exists()


def test_damaged_clips_and_weights_stop_the_run(weights, data, tmp_path):
    copy = shutil.copytree(weights, tmp_path / "weights")
    path = copy / "text_encoder.safetensors"
    with safetensors_io.Reader(path) as reader:
        leaves = {name: reader.read(name) for name in reader.specs}
        leaves["final_norm/scale"][3] = np.nan
        safetensors_io.write(path, reader.specs, leaves.items(), reader.metadata)
    with pytest.raises(NonFiniteError, match="text is not finite: the weights of text_encoder"):
        run(data, copy)
    shard = records.shard_name(records.CLIPS, IMAGE, "train", 0, 1)
    tall = clip_record(6, IMAGE, draw_clip(num_frames=1, height=48, width=32).color)
    serialize = records.Serializer(records.clip_features())
    records.write_shard(Storage(data), shard, [serialize(tall)] * 2)
    with pytest.raises(InputError, match=r"clip 0+6: is 48x32 pixels"):
        run(data, weights, what=["image"])


def test_an_object_store_serves_as_well_as_a_folder(weights, clips, tmp_path, monkeypatch):
    monkeypatch.setenv("ANIMECOLOR_CACHE", str(tmp_path / "cache"))
    remote = Storage("memory://precompute")
    for path in clips.rglob("*"):
        if path.is_file():
            remote.write(path.relative_to(clips).as_posix(), path.read_bytes())
    report = run(remote.root, weights, what=["text"])
    assert report["finished"]
    record = read(remote.root, weights, VIDEO, "test")[0]
    expected = Encoder(Weights(weights)).text([record["caption"].decode()] * 2)["text"][0]
    np.testing.assert_array_equal(records.decode_bits(record["text"]), np.asarray(expected))


def test_arrays_of_another_shape_or_dtype_are_refused(weights):
    encoder = Encoder(Weights(weights))
    frames, images = np.zeros((1, 9, 32, 48, 3), np.uint8), np.zeros((1, 1, 32, 48, 3), np.uint8)
    with pytest.raises(InputError, match="frames: float32"):
        encoder.latents(frames.astype(np.float32), frames[..., 0], images)
    with pytest.raises(InputError, match="sketches: uint8 of shape"):
        encoder.latents(frames, frames, images)
    with pytest.raises(InputError, match="references: uint8 of shape"):
        encoder.image(images[0])


# ---------------------------------------------------------------- frames, devices


def test_windows_have_the_stride_that_gave_the_clip_its_bucket():
    buckets, strides = BucketConfig(frame_counts=(5, 9, 17), stride=3), set()
    for frames in range(5, 60):
        bucket = buckets.video_bucket(frames, 320, 512)
        for split in records.SPLITS:
            start, stride, _ = choose_frames(f"{frames:x}", frames, bucket, split, PrecomputeConfig())
            assert stride == buckets.window_stride(frames)
            assert start >= 0 and start + (bucket.frames - 1) * stride < frames
            strides.add(stride)
    assert strides == {1, 2, 3}


def test_choices_are_random_in_training_and_fixed_in_testing():
    config, bucket = PrecomputeConfig(references=3), Bucket(9, 32, 48)

    def choose(split, config=config, bucket=bucket):
        return [choose_frames(f"{i:x}", 60, bucket, split, config) for i in range(100)]

    train, test = choose("train"), choose("test")
    assert train == choose("train") != choose("train", PrecomputeConfig(references=3, seed=1))
    assert {choice.start for choice in train} <= set(range(36)) and len({c.start for c in train}) > 25
    assert {choice.start for choice in test} == {0}
    assert {choice.references[0] for choice in test} == {0}
    for choice in (*train, *test):
        assert len(set(choice.references)) == 3 and set(choice.references) <= set(range(60))
    assert len({frame for choice in train for frame in choice.references}) == 60
    assert choose_frames("1", 1, IMAGE, "train", config) == (0, 1, [0])
    with pytest.raises(InputError, match="has 8 frames"):
        choose_frames("1", 8, bucket, "train", config)


def test_a_mesh_computes_what_one_device_does(weights):
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (4, 2, 32, 48, 3), np.uint8)
    one, many = (
        Encoder(Weights(weights), dtype="float32", mesh=local_mesh(text))
        for text in ("data=1", "data=2,fsdp=2")
    )
    assert one.mesh is None and (one.num_shares, many.num_shares) == (1, 4)
    captions = ["a", "b", "c", "d"]
    for name, inputs in (("text", captions), ("image", references)):
        expected, got = (getattr(encoder, name)(inputs) for encoder in (one, many))
        for key in expected:
            assert len(got[key].sharding.device_set) == 4
            np.testing.assert_allclose(got[key], expected[key], atol=2e-5, err_msg=key)
    kernel = many.image_encoder.blocks.attn.out.kernel[...]
    assert kernel.addressable_shards[0].data.shape[2] * 2 == kernel.shape[2]
