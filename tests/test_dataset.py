import itertools
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from small_datasets import (
    CANDIDATE_FRAMES,
    CANDIDATES,
    CLIPS,
    IMAGE,
    LONG,
    TEXT_SHAPE,
    WIDE,
    clip_id,
    clip_length,
    frame_numbers,
    write_clips,
    write_encoded,
)

from animecolor_jax.errors import InputError
from data_pipeline.dataset import DataConfig, LoadConfig, evaluation_batches, training_batches
from data_pipeline.shapes import latent_frames
from data_pipeline.sketch import XDoG
from data_pipeline.sketch_augment import SketchAugmentation, SketchMix
from data_pipeline.views import ViewConfig

CONFIG = DataConfig(
    batch_size=4,
    seed=7,
    view=ViewConfig(strides=(1, 2), full_length=0.5, flip=0.5, text_dropout=0.5),
    sketch=SketchMix(augmentation=SketchAugmentation(probability=1)),
)
VIDEOS = {bucket: splits for bucket, splits in CLIPS.items() if not bucket.is_image}
SMALL = 20  # batches: 16 clips in batches of 4, so several epochs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(clips, encoded) with latents, text and image features."""
    path = tmp_path_factory.mktemp("encoded")
    return write_clips(path), write_encoded(path)


def take(batches, count=SMALL):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(batch, other):
    assert batch.keys() == other.keys()
    return all(np.array_equal(batch[name], other[name]) for name in batch)


def shares(batch_size, hosts):
    """Every host's rows."""
    return np.split(np.arange(batch_size), hosts)


def join(parts):
    """The batch that hosts' slices make together."""
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(parts[0][name], np.ndarray)
        else sum((part[name] for part in parts), [])
        for name in parts[0]
    }


@pytest.fixture(scope="module")
def batches(clips):
    return take(training_batches(clips, CONFIG))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_slices_are_the_global_batch(clips, batches, hosts):
    parts = [take(training_batches(clips, CONFIG, rows=rows), 8) for rows in shares(4, hosts)]
    assert len(parts[0][0]["id"]) == 4 // hosts
    for step in range(8):
        assert same(join([part[step] for part in parts]), batches[step])


def test_rows_may_be_any_of_the_batch(clips, batches):
    for step, part in enumerate(take(training_batches(clips, CONFIG, rows=[0, 3]), 3)):
        whole = batches[step]
        assert part["id"] == [whole["id"][0], whole["id"][3]]
        np.testing.assert_array_equal(part["video"], whole["video"][[0, 3]])


def test_a_batch_has_one_bucket_and_buckets_their_share(clips, batches):
    buckets = [{name.rsplit("-", 2)[0] for name in batch["id"]} for batch in batches]
    assert all(len(names) == 1 for names in buckets)
    drawn = [names.pop() for names in buckets]  # 16 clips, 4 rows: 4 epochs are 16 batches
    assert {name: drawn[:16].count(name) for name in drawn} == {str(b): n["train"] for b, n in CLIPS.items()}


def test_every_clip_is_used_equally_often(batches):
    used = sum((batch["id"] for batch in batches[:16]), [])
    names = [clip_id(bucket, "train", n) for bucket, splits in CLIPS.items() for n in range(splits["train"])]
    assert {name: used.count(name) for name in names} == dict.fromkeys(names, 4)


def test_a_step_does_not_depend_on_where_the_iteration_started(clips, batches):
    assert same(take(training_batches(clips, CONFIG, start_step=13), 1)[0], batches[13])


def test_another_seed_gives_other_batches(clips, batches):
    other = take(training_batches(clips, replace(CONFIG, seed=8)), 8)
    assert [batch["id"] for batch in other] != [batch["id"] for batch in batches[:8]]


def test_threads_change_nothing(clips, batches):
    one = take(training_batches(clips, replace(CONFIG, load=LoadConfig(threads=1, buffer=1))), 6)
    many = take(training_batches(clips, replace(CONFIG, load=LoadConfig(threads=5, buffer=9))), 6)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(one, many, batches, strict=False))


def test_worker_processes_restore_and_give_the_same_batches(clips, batches):
    iterator = training_batches(clips, replace(CONFIG, load=LoadConfig(workers=2)))
    iterator.set_state({**iterator.get_state(), "step": 3})
    try:
        for step in (3, 4, 5):
            assert same(next(iterator), batches[step])
        assert iterator.get_state()["step"] == 6
    finally:
        iterator.close()


def test_state_is_restored_exactly_in_the_middle_of_an_epoch_on_other_hosts(clips, batches):
    iterator = training_batches(clips, CONFIG)
    for _ in range(6):
        next(iterator)
    state = iterator.get_state()
    assert state["step"] == 6
    parts = []
    for rows in shares(4, 2):
        restored = training_batches(clips, replace(CONFIG, load=LoadConfig(threads=3)), rows=rows)
        next(restored)
        restored.set_state(state)
        parts.append(take(restored, 3))
    for step in range(3):
        assert same(join([part[step] for part in parts]), batches[6 + step])
    assert same(next(iterator), batches[6]), "the first iterator goes on as well"
    iterator.close()


def test_a_state_of_other_data_is_refused(clips):
    state = training_batches(clips, CONFIG).get_state()
    for name, value in (
        ("seed", 1),
        ("batch_size", 8),
        ("clips", "other"),
        ("split", "test"),
        ("image_weight", 2.0),
    ):
        with pytest.raises(InputError, match=name):
            training_batches(clips, CONFIG).set_state({**state, name: value})


def test_batches_can_be_sent_to_another_process_before_they_are_started(clips, batches):
    examples = training_batches(clips, CONFIG).examples
    examples(0)
    again = pickle.loads(pickle.dumps(examples))
    assert np.array_equal(again(5)["video"], batches[1]["video"][1])


# ---------------------------------------------------------------- pixels


def test_pixels_are_those_of_the_numbered_frames(batches):
    for batch in batches:
        count, length = batch["frame_numbers"].shape
        height, width = batch["video"].shape[2:4]
        assert batch["video"].shape == (count, length, height, width, 3) and batch["video"].dtype == np.uint8
        assert batch["sketch"].shape == batch["video"].shape[:4] and batch["sketch"].dtype == np.uint8
        assert batch["reference"].shape == (count, 1, height, width, 3)
        assert np.array_equal(frame_numbers(batch["video"]), batch["frame_numbers"])
        assert np.array_equal(frame_numbers(batch["reference"]), batch["reference_numbers"])
        assert batch["valid"].all() and (batch["fps"] == 24).all()


def test_frame_crop_gives_all_rows_of_a_batch_the_same_fewer_frames(batches):
    lengths = {}
    for batch in batches:
        lengths.setdefault(batch["id"][0].split("-")[0], set()).add(batch["video"].shape[1])
    assert lengths[str(WIDE)] == {5, 9} and lengths[str(IMAGE)] == {1}
    assert lengths[str(LONG)] <= {5, 9, 13, 17} and len(lengths[str(LONG)]) > 1


def test_a_mirrored_row_mirrors_video_sketch_and_reference_alike(clips):
    def batches(flip):
        view = replace(CONFIG.view, flip=flip, full_length=1)
        return take(training_batches(clips, replace(CONFIG, view=view, sketch=SketchMix())), 4)

    for plain, mirrored in zip(batches(0), batches(1), strict=True):
        assert np.array_equal(mirrored["video"], plain["video"][:, :, :, ::-1])
        assert np.array_equal(mirrored["reference"], plain["reference"][:, :, :, ::-1])
        for video, sketch in zip(mirrored["video"], mirrored["sketch"], strict=True):
            assert np.array_equal(sketch, XDoG()(video))
        left = plain["video"][:, :, 8:16, 4:12]
        assert (left < 40).all() and (mirrored["video"][:, :, 8:16, -12:-4] < 40).all()


def test_sketches_are_drawn_with_all_extractors_of_the_mix(clips):
    extractors = XDoG(), XDoG(light_lines=True)
    mix = SketchMix(extractors, weights=(0.5, 0.5))
    drawn = set()
    for batch in take(training_batches(clips, replace(CONFIG, sketch=mix)), 6):
        for video, sketch in zip(batch["video"], batch["sketch"], strict=True):
            made_by = [np.array_equal(extractor(video), sketch) for extractor in extractors]
            assert sum(made_by) == 1
            drawn.add(made_by.index(True))
    assert drawn == {0, 1}


def test_the_sketch_can_be_left_to_the_device(clips, batches):
    batch = take(training_batches(clips, replace(CONFIG, sketch=None)), 1)[0]
    assert "sketch" not in batch
    assert np.array_equal(batch["video"], batches[0]["video"]), "nothing else changes"


def test_captions_are_left_out_at_the_rate_asked_for(clips):
    view = replace(CONFIG.view, text_dropout=0.25)
    examples = training_batches(clips, replace(CONFIG, view=view, sketch=None)).examples
    captions = [(row["id"], row["caption"]) for row in map(examples, range(240))]
    assert all(caption in ("", f"caption of {name}") for name, caption in captions)
    assert 40 <= sum(caption == "" for _, caption in captions) <= 80  # 60, standard deviation 6.7


def test_dropped_captions_are_tokenized_as_empty(clips):
    def tokenize(captions):
        return np.array([[len(caption), 1] for caption in captions], np.int32)

    for batch in take(training_batches(clips, CONFIG, tokenize=tokenize), 3):
        assert batch["tokens"].tolist() == [[len(caption), 1] for caption in batch["caption"]]


# ---------------------------------------------------------------- precomputed


def test_precomputed_rows_keep_references_text_and_frames_together(encoded):
    view = ViewConfig(full_length=0.5, num_references=2, text_dropout=0.5)
    config = replace(CONFIG, view=view, sketch=SketchMix())
    seen, lengths = set(), set()
    for batch in take(training_batches(encoded[0], config, encoded=encoded[1])):
        bucket = next(b for b in CLIPS if str(b) == batch["id"][0].split("-")[0])
        assert "video" not in batch
        others = {"frame_numbers", "reference_numbers", "id", "caption", "fps", "valid"}
        assert len(batch.keys() - others) == 8
        assert all(batch[name].dtype == ml_dtypes.bfloat16 for name in batch.keys() - others)
        frames = batch["video_mean"].shape[1]
        lengths.add((bucket, frames))
        assert batch["video_mean"].shape == (4, frames, *bucket.latents[1:], 16)
        for name, expected in (("video_mean", range(frames)), ("sketch", range(100, 100 + frames))):
            assert (batch[name] == np.reshape(expected, (1, -1, 1, 1, 1))).all()
        assert batch["reference_mean"].shape == (4, 2, *bucket.latents[1:], 16)
        chosen = batch["reference_mean"][..., 0, 0, 0].astype(int)
        assert chosen.shape == (4, 2) and (chosen[:, 0] != chosen[:, 1]).all()
        assert np.array_equal(batch["image_summary"][..., 0].astype(int), chosen)
        assert np.array_equal(batch["image_features"][..., 2, 4].astype(int), chosen)
        assert np.array_equal(batch["reference_numbers"], np.array(CANDIDATE_FRAMES)[chosen])
        assert (batch["frame_numbers"] == 1 + 3 * np.arange(batch["frame_numbers"].shape[1])).all()
        assert frames == latent_frames(batch["frame_numbers"].shape[1])
        seen.update(chosen.ravel().tolist())
        assert batch["text"].shape == (4, *TEXT_SHAPE)
        for name, caption, text in zip(batch["id"], batch["caption"], batch["text"], strict=True):
            assert (text == (int(name.rsplit("-")[-1]) + 1 if caption else 0)).all()
    assert seen == set(range(CANDIDATES))
    assert {frames for bucket, frames in lengths if bucket == WIDE} == {latent_frames(5), latent_frames(9)}


def test_precomputed_and_decoded_rows_are_of_the_same_clips_and_captions(encoded):
    config = replace(CONFIG, view=ViewConfig(text_dropout=0.5), sketch=SketchMix())
    decoded = take(training_batches(encoded[0], config), 6)
    precomputed = take(training_batches(encoded[0], config, encoded=encoded[1]), 6)
    for a, b in zip(decoded, precomputed, strict=True):
        assert (a["id"], a["caption"]) == (b["id"], b["caption"])


def test_what_was_not_precomputed_is_made_from_the_clip(tmp_path):
    clips, encoded = write_clips(tmp_path), write_encoded(tmp_path, groups=("text",))
    plain = take(training_batches(clips, CONFIG), 3)
    for batch, without in zip(take(training_batches(clips, CONFIG, encoded=encoded), 3), plain, strict=True):
        assert batch.pop("text").dtype == ml_dtypes.bfloat16
        assert same(batch, without)


def test_precomputed_evaluation_refers_to_the_first_frame(encoded):
    for batch in evaluation_batches(encoded[0], 2, encoded=encoded[1]):
        assert (batch["reference_mean"] == 0).all() and (batch["image_features"] == 0).all()
        assert all(batch["caption"]) and (batch["text"] != 0).all()


def test_precomputed_image_features_are_those_of_the_reference_pixels(tmp_path):
    clips, encoded = write_clips(tmp_path, VIDEOS), write_encoded(tmp_path, ("image",), VIDEOS)
    config = replace(CONFIG, view=replace(CONFIG.view, flip=0))
    for batch in take(training_batches(clips, config, encoded=encoded), 6):
        chosen = batch["image_features"][:, :, 0, 0].astype(int)
        assert np.array_equal(batch["reference_numbers"], np.array(CANDIDATE_FRAMES)[chosen])
        assert np.array_equal(frame_numbers(batch["reference"]), batch["reference_numbers"])
        assert np.array_equal(frame_numbers(batch["video"]), batch["frame_numbers"])


@pytest.mark.parametrize(
    "where, change",
    [
        ("view.flip", {"view": ViewConfig(flip=0.5)}),
        ("view.strides", {"view": ViewConfig(strides=(1,))}),
        ("view.reference", {"view": ViewConfig(reference="outside")}),
        ("sketch", {"sketch": SketchMix(augmentation=SketchAugmentation())}),
    ],
)
def test_what_latents_cannot_follow_is_refused(encoded, where, change):
    config = replace(DataConfig(batch_size=4), **change)
    with pytest.raises(InputError) as error:
        training_batches(encoded[0], config, encoded=encoded[1])
    assert error.value.where == where


def test_image_features_of_an_unmirrored_reference_refuse_mirrored_clips(tmp_path):
    counts = {WIDE: {"train": 4, "test": 0}}
    clips, encoded = write_clips(tmp_path, counts), write_encoded(tmp_path, ("image",), counts)
    with pytest.raises(InputError, match="view.flip"):
        training_batches(clips, DataConfig(batch_size=4, view=ViewConfig(flip=0.5)), encoded=encoded)


def test_a_precomputed_reference_that_is_not_the_first_frame_is_refused(encoded):
    config = DataConfig(batch_size=4, view=ViewConfig(reference="first"))
    with pytest.raises(InputError, match="expected: the first frame of the window, 1"):
        next(training_batches(encoded[0], config, encoded=encoded[1]))


def test_precomputed_records_that_do_not_fit_the_clips_are_refused(tmp_path):
    clips = write_clips(tmp_path)
    encoded = write_encoded(tmp_path, ("text",), clips={WIDE: {"train": 2, "test": 1}})
    with pytest.raises(InputError, match="other buckets or numbers"):
        training_batches(clips, CONFIG, encoded=encoded)
    shuffled = write_encoded(tmp_path, ("text",), name_of=lambda *place: clip_id(*place) + "x")
    with pytest.raises(InputError, match="is of clip"):
        next(training_batches(clips, CONFIG, encoded=shuffled))


def test_text_dropout_needs_the_empty_text(tmp_path):
    clips, encoded = write_clips(tmp_path), write_encoded(tmp_path, ("text",))
    encoded.storage.remove("empty_text.npy")
    with pytest.raises(InputError, match="empty_text.npy"):
        training_batches(clips, CONFIG, encoded=encoded)
    evaluation_batches(clips, 2, encoded=encoded)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_has_every_clip_once_from_its_first_frame(clips, hosts):
    parts = [list(evaluation_batches(clips, 2, rows=rows)) for rows in shares(2, hosts)]
    seen = []
    for batch in map(join, zip(*parts, strict=True)):
        assert len(batch["id"]) == 2
        seen += [name for name, valid in zip(batch["id"], batch["valid"], strict=True) if valid]
        assert (batch["frame_numbers"][:, 0] == 0).all() and (batch["reference_numbers"] == 0).all()
        assert (np.diff(batch["frame_numbers"]) <= 3).all()
        assert batch["video"].shape[1] == int(batch["id"][0].split("x")[0])
        for row in range(2):
            assert np.array_equal(batch["reference"][row, 0], batch["video"][row, 0])
            assert batch["caption"][row] == f"caption of {batch['id'][row]}"
    assert seen == [clip_id(WIDE, "test", n) for n in range(3)] + [clip_id(LONG, "test", 0)]


def test_evaluation_is_restored_and_ends(clips):
    batches = evaluation_batches(clips, 2)
    assert batches.num_batches == 3
    every = list(batches)
    assert len(every) == 3 and next(batches, None) is None
    batches.set_state({**batches.get_state(), "step": 2})
    assert same(next(batches), every[2]) and next(batches, None) is None


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("rows", [[], [0, 4], [-1, 0], [1, 0], [2, 2]])
def test_rows_that_are_not_of_the_batch_are_refused(clips, rows):
    with pytest.raises(InputError, match="rows"):
        training_batches(clips, CONFIG, rows=rows)
    with pytest.raises(InputError, match="rows"):
        evaluation_batches(clips, 4, rows=rows)


def test_unknown_and_empty_splits_are_refused(clips, tmp_path):
    with pytest.raises(InputError, match="one of train, test"):
        training_batches(clips, replace(CONFIG, split="validation"))
    empty = write_clips(tmp_path, {WIDE: {"train": 1, "test": 0}})
    with pytest.raises(InputError, match="no clips in split 'test'"):
        evaluation_batches(empty, 1)


@pytest.mark.parametrize("field, value", [("workers", -1), ("threads", 0), ("buffer", 0)])
def test_impossible_loading_is_refused(field, value):
    with pytest.raises(InputError, match=f"load.{field}"):
        LoadConfig(**{field: value})


def test_a_damaged_record_is_named(tmp_path):
    clips = write_clips(tmp_path, {LONG: {"train": 2, "test": 0}})
    shard = next(tmp_path.glob("animecolor/*/*/*train*"))
    data = bytearray(shard.read_bytes())
    place = data.find(b"ftyp") + 200
    assert place >= 200
    data[place : place + 20] = bytes(20)
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"of {LONG} .train. is damaged"):
        take(training_batches(clips, CONFIG))


def test_a_clip_shorter_than_its_bucket_says_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("small_datasets.clip_length", lambda bucket, index: 12)
    clips = write_clips(tmp_path, {LONG: {"train": 1, "test": 0}})
    with pytest.raises(InputError, match=rf"clip {clip_id(LONG, 'train', 0)} of train.mp4: has 12 frames"):
        next(training_batches(clips, CONFIG))
    assert clip_length(LONG, 0) == 17
