import io
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from animecolor_jax.errors import InputError
from data_pipeline import clip_video, records
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.shapes import Bucket
from data_pipeline.storage import Storage

BUCKET = Bucket(9, 32, 48)


def frames_of(count, seed=0, size=(32, 48)):
    """Smooth moving colours, so that H.264 keeps them well."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    phases = rng.uniform(0, 6, 3)
    waves = [np.sin(rows / 25 + columns / 31 + phase + 0.3 * t) for t in range(count) for phase in phases]
    return (127 + 100 * np.stack(waves).reshape(count, 3, *size).transpose(0, 2, 3, 1)).astype(np.uint8)


def record(identity, video=b"video", bucket=BUCKET):
    return {
        "id": identity,
        "source": f"folder/{identity}.mp4",
        "start": 3,
        "end": 20,
        "fps": 23.976,
        "caption": "a cat – naïve",
        "bucket": str(bucket),
        "frames": 17,
        "video": video,
    }


def write_dataset(storage, videos=(b"one", b"two", b"three"), *, close=True, compress=False):
    """Two shards of the split "train" in one bucket."""
    serialize = records.Serializer(records.clip_features())
    examples = [serialize(record(f"{index:032x}", video)) for index, video in enumerate(videos)]
    groups, size = [examples[:2], examples[2:]], 0
    for index, group in enumerate(groups):
        name = records.shard_name(records.CLIPS, BUCKET, "train", index, 2)
        size += records.write_shard(storage, name, group, compress=compress)
    splits = {"train": (list(map(len, groups)), size)}
    records.write_metadata(storage, records.CLIPS, BUCKET, serialize.features, splits)
    if close:
        info = {"digest": "0123", "buckets": {str(BUCKET): {"train": len(examples)}}, "bytes": size}
        records.close(storage, records.CLOSING, info)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_records_come_back_as_they_were_written(kind, compress, tmp_path, monkeypatch):
    monkeypatch.setenv("ANIMECOLOR_CACHE", str(tmp_path / "cache"))
    storage = Storage(tmp_path / "data" if kind == "local" else f"memory://{tmp_path.name}{compress}/data")
    write_dataset(storage, compress=compress)
    opened = records.open_clips(storage.root)
    assert opened.buckets("train") == {BUCKET: 3} and opened.buckets("test") == {}
    source = opened.source(BUCKET, "train")
    assert len(source) == 3
    got = source[2]
    assert got["video"] == b"three" and got["frames"] == 17 and got["caption"] == "a cat – naïve".encode()
    np.testing.assert_allclose(got["fps"], 23.976, rtol=1e-6)


def test_tfds_finds_the_bucket_as_a_builder_config(tmp_path):
    import tensorflow_datasets as tfds

    write_dataset(Storage(tmp_path))
    builder = tfds.builder(f"animecolor/{BUCKET}", data_dir=tmp_path)
    assert builder.info.splits["train"].num_examples == 3
    assert builder.info.splits["train"].shard_lengths == [2, 1]


def test_nothing_imports_tensorflow_or_jax(tmp_path):
    write_dataset(Storage(tmp_path))
    code = f"""
import sys
from data_pipeline import records
from data_pipeline.shapes import Bucket
print(len(records.open_clips({str(tmp_path)!r}).source(Bucket(9, 32, 48), "train")[0]["video"]))
print([name for name in ("tensorflow", "jax", "flax", "torch") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[:2] == ["3", "[]"]


def test_arrays_keep_their_bits(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 4, 6, 16)).astype(ml_dtypes.bfloat16)
    features = records.encoded_features({"video_mean": (values.shape, values.dtype), "start": ((), np.int32)})
    texts = {"id": "a", "source": "b", "fps": 24.0, "caption": "", "bucket": str(BUCKET), "weights": "{}"}
    data = records.Serializer(features)({**texts, "video_mean": values.view(np.uint16), "start": 5})
    storage = Storage(tmp_path)
    size = records.write_shard(storage, records.shard_name(records.ENCODED, BUCKET, "train", 0, 1), [data])
    records.write_metadata(storage, records.ENCODED, BUCKET, features, {"train": ([1], size)})
    opened = records.Records(storage, records.ENCODED, {"digest": "0", "buckets": {}})
    got = opened.source(BUCKET, "train")[0]
    np.testing.assert_array_equal(records.decode_bits(got["video_mean"]), values)
    assert got["start"] == 5


def test_a_dataset_without_its_closing_metadata_is_refused(tmp_path):
    write_dataset(Storage(tmp_path), close=False)
    with pytest.raises(InputError, match="not finished"):
        records.open_clips(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 99}'])
def test_closing_metadata_of_another_kind_is_refused(text, tmp_path):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match="dataset.json"):
        records.open_clips(tmp_path)


def encoded_set(root, name, *, close=True, clips="0123", weights=None, what=("latents",)):
    storage = Storage(root) / "encoded" / name
    storage.write("something", b"")
    if close:
        made = {"clips": clips, "weights": weights or {"vae": "aa"}, "what": what}
        info = {"digest": name, **made, "buckets": {}}
        records.close(storage, records.ENCODED_CLOSING, info)


def test_precomputed_records_are_found_by_the_weights_that_made_them(tmp_path):
    write_dataset(Storage(tmp_path))
    encoded_set(tmp_path, "first", weights={"vae": "aa"})
    encoded_set(tmp_path, "second", weights={"vae": "bb", "text_encoder": "cc"}, what=("latents", "text"))
    assert records.open_encoded(tmp_path, {"vae": "aa"}).info["digest"] == "first"
    both = {"vae": "bb", "text_encoder": "cc", "image_encoder": "dd"}
    assert records.open_encoded(tmp_path, both).info["digest"] == "second"
    with pytest.raises(InputError, match="second was made with another text_encoder"):
        records.open_encoded(tmp_path, {"vae": "bb", "text_encoder": "other"})
    encoded_set(tmp_path, "third", weights={"text_encoder": "cc"}, what=("text",))
    assert records.open_encoded(tmp_path, both).info["digest"] == "second", "the set that holds most"
    with pytest.raises(InputError, match="third holds only text"):
        records.open_encoded(tmp_path, {"text_encoder": "cc"}, what=("latents",))


@pytest.mark.parametrize(
    "made, said",
    [
        ({"close": False}, "first is not finished"),
        ({"clips": "older"}, "earlier state of the clips"),
        ({"weights": {"vae": "bb"}}, "another vae"),
        (None, "holds no precomputed records"),
    ],
)
def test_precomputed_records_that_do_not_fit_are_refused(made, said, tmp_path):
    write_dataset(Storage(tmp_path))
    if made is not None:
        encoded_set(tmp_path, "first", **made)
    with pytest.raises(InputError, match=said):
        records.open_encoded(tmp_path, {"vae": "aa"})


# ---------------------------------------------------------------- the video inside


def test_stored_video_is_close_and_its_bytes_repeat():
    frames = frames_of(30)
    data = clip_video.encode(iter(frames), 23.976, ClipEncoding())
    assert clip_video.encode(iter(frames), 23.976, ClipEncoding()) == data
    got = clip_video.decode(data, range(30))
    assert np.abs(got.astype(int) - frames).mean() < 2


def test_full_chroma_keeps_thin_coloured_lines():
    frames = np.full((9, 32, 48, 3), 255, np.uint8)
    frames[:, :, ::7] = (255, 0, 0)
    errors = []
    for chroma in ("420", "444"):
        data = clip_video.encode(iter(frames), 24, ClipEncoding(crf=4, chroma=chroma))
        errors.append(np.abs(clip_video.decode(data, range(9)).astype(int) - frames).mean())
    assert errors[1] < 3 < errors[0]


def test_chosen_frames_equal_those_of_a_whole_decode():
    data = clip_video.encode(iter(frames_of(40)), 24, ClipEncoding(keyframe_interval=8))
    whole = clip_video.decode(data, range(40))
    for chosen in ([0], [39], [17, 20, 23], [9, 3, 3, 30]):
        np.testing.assert_array_equal(clip_video.decode(data, chosen), whole[chosen])


def test_images_are_stored_exactly():
    image = frames_of(1)[0]
    np.testing.assert_array_equal(clip_video.decode(clip_video.encode_image(image), [0])[0], image)


def test_missing_frames_and_damage_are_named():
    data = clip_video.encode(iter(frames_of(9)), 24, ClipEncoding())
    with pytest.raises(InputError, match="clip 7: has no frame 9"):
        clip_video.decode(data, [8, 9], where="clip 7")
    with pytest.raises(InputError, match="clip 7"):
        clip_video.decode(data[:200], [0], where="clip 7")


@pytest.mark.parametrize("fields", [{"crf": 52}, {"crf": -1}, {"keyframe_interval": 0}, {"chroma": "422"}])
def test_impossible_encodings_are_refused(fields):
    with pytest.raises(InputError, match="encoding"):
        ClipEncoding(**fields)


def test_closing_metadata_is_strict_json(tmp_path):
    with pytest.raises(ValueError):
        records.close(Storage(tmp_path), records.CLOSING, {"digest": "0", "bytes": float("nan")})
    write_dataset(Storage(tmp_path))
    assert json.load(io.StringIO((tmp_path / "dataset.json").read_text()))["format_version"] == 1
