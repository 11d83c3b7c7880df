import numpy as np
import pytest

from animecolor_jax.errors import InputError
from data_pipeline.clip_video import ClipEncoding, encode
from data_pipeline.shapes import Bucket, BucketConfig
from data_pipeline.views import (
    SEEK_FRAMES,
    View,
    ViewConfig,
    draw_candidates,
    draw_length,
    draw_view,
    read_view,
)

LONG = Bucket(49, 320, 512)


def views(config, clip_frames, length, count=200):
    return [draw_view(config, clip_frames, length, np.random.default_rng(seed)) for seed in range(count)]


def distance(view):
    """Least distance of each reference from the window's frames, from its first to its last."""
    before, after = view.frames[0] - view.references, view.references - view.frames[-1]
    return np.maximum(before, after)


@pytest.mark.parametrize("policy", ["any", "first", "outside"])
@pytest.mark.parametrize("clip_frames, length", [(9, 9), (10, 9), (30, 9), (100, 17), (1, 1)])
def test_windows_are_evenly_spaced_frames_of_the_clip(policy, clip_frames, length):
    config = ViewConfig(strides=(1, 3), reference=policy, num_references=2)
    for view in views(config, clip_frames, length):
        assert len(view.frames) == length and len(set(np.diff(view.frames))) <= 1
        assert view.frames.dtype == view.references.dtype == np.int32 and len(view.references) == 2
        for numbers in view:
            assert numbers.min() >= 0 and numbers.max() < clip_frames
        if length > 1:
            assert view.frames[1] > view.frames[0]


def test_all_starts_and_strides_occur():
    found = views(ViewConfig(strides=(1, 2, 5)), 20, 9, 400)
    assert {view.frames[1] - view.frames[0] for view in found} == {1, 2}, "5 does not fit"
    for stride in (1, 2):
        starts = {view.frames[0] for view in found if view.frames[1] - view.frames[0] == stride}
        assert starts == set(range(20 - 8 * stride))


@pytest.mark.parametrize("clip_frames", [9, 16, 17, 24, 25, 60, 145, 200])
def test_short_clips_have_the_stride_that_gave_them_their_bucket(clip_frames):
    buckets = BucketConfig()
    bucket = buckets.video_bucket(clip_frames, 512, 512)
    for view in views(ViewConfig(), clip_frames, bucket.frames, 20):
        assert view.frames[1] - view.frames[0] == buckets.window_stride(clip_frames)


def test_any_reference_is_any_frame_of_the_clip():
    references = {int(view.references[0]) for view in views(ViewConfig(), 40, 9, 600)}
    assert references == set(range(40))


def test_the_first_reference_is_the_first_frame_of_the_window():
    found = views(ViewConfig(reference="first", num_references=3), 60, 9)
    assert all(view.references[0] == view.frames[0] for view in found)
    assert len({int(view.frames[0]) for view in found}) > 10


@pytest.mark.parametrize("gap", [1, 5, 12])
@pytest.mark.parametrize("clip_frames", [21, 33, 40, 90])
def test_outside_references_keep_the_gap(gap, clip_frames):
    config = ViewConfig(strides=(3,), reference="outside", reference_gap=gap, num_references=2)
    found = views(config, clip_frames, 9)
    assert min(distance(view).min() for view in found) == gap
    sides = {bool((view.references < view.frames[0]).any()) for view in found}
    assert sides == {True, False}, "both before and after the window"


def test_a_clip_too_short_for_the_gap_has_window_and_reference_at_opposite_ends():
    config = ViewConfig(reference="outside", reference_gap=12)
    found = views(config, 15, 9)
    assert {(*view.frames[[0, -1]], *view.references) for view in found} == {(0, 8, 14), (6, 14, 0)}
    found = views(config, 9, 9)
    assert {(*view.frames[[0, -1]], *view.references) for view in found} == {(0, 8, 8), (0, 8, 0)}


def test_references_are_different_frames_where_there_are_enough():
    for policy in ("any", "first", "outside"):
        for view in views(ViewConfig(reference=policy, num_references=3), 60, 9, 50):
            assert len(set(view.references.tolist())) == 3
    assert views(ViewConfig(num_references=3), 1, 1, 1)[0].references.tolist() == [0, 0, 0]


def test_candidates_are_different_and_begin_with_the_first_where_that_is_asked_for():
    rngs = [np.random.default_rng(seed) for seed in range(50)]
    drawn = [draw_candidates(ViewConfig(num_references=2), 4, rng) for rng in rngs]
    assert {number for pair in drawn for number in pair} == {0, 1, 2, 3}
    assert all(a != b for a, b in drawn)
    first = [draw_candidates(ViewConfig(reference="first", num_references=2), 4, rng) for rng in rngs]
    assert all(pair[0] == 0 != pair[1] for pair in first)
    assert draw_candidates(ViewConfig(reference="first"), 1, rngs[0]).tolist() == [0]


def test_frame_crop_keeps_the_full_length_in_nine_of_ten_batches():
    lengths = [draw_length(ViewConfig(), LONG, np.random.default_rng(seed)) for seed in range(3000)]
    full = lengths.count(49)
    assert 2630 <= full <= 2770  # 2700, standard deviation 16
    counts = [lengths.count(length) for length in range(5, 49, 4)]
    assert sum(counts) + full == 3000 and min(counts) >= 10  # 27 each


def test_frame_crop_in_larger_steps_has_fewer_lengths():
    config = ViewConfig(full_length=0, length_step=16)
    assert {draw_length(config, LONG, np.random.default_rng(seed)) for seed in range(50)} == {17, 33}
    assert draw_length(config, Bucket(9, 32, 32), np.random.default_rng(0)) == 9
    assert draw_length(config, Bucket(1, 32, 32), np.random.default_rng(0)) == 1


def test_evaluation_leaves_nothing_to_chance():
    found = views(ViewConfig.evaluation(), 60, 9, 20)
    assert all(view.frames.tolist() == list(range(0, 27, 3)) for view in found)
    assert all(view.references.tolist() == [0] for view in found)
    assert draw_length(ViewConfig.evaluation(), LONG, np.random.default_rng(0)) == 49


def test_frames_far_apart_are_read_in_any_order():
    noise = np.random.default_rng(0).integers(0, 256, (4 * SEEK_FRAMES, 1, 1, 3), np.uint8)
    frames = np.broadcast_to(noise, (len(noise), 32, 48, 3))
    clip = {"id": "1", "source": "a.mp4", "video": encode(frames, 24, ClipEncoding(crf=1))}
    view = View(np.int32([30, 33, 36]), np.int32([90, 0, 33]))
    for flip in (False, True):
        video, references = read_view(clip, view, flip)
        for pixels, numbers in ((video, view.frames), (references, view.references)):
            assert pixels.flags.c_contiguous and pixels.shape == (3, 32, 48, 3)
            assert np.abs(pixels.mean((1, 2)) - noise[numbers, 0, 0]).max() < 6
    with pytest.raises(InputError, match="clip 1 of a.mp4: has no frame 96"):
        read_view(clip, View(np.int32([0]), np.int32([96])), False)
    with pytest.raises(InputError, match="clip 1 of a.mp4"):
        read_view({**clip, "video": clip["video"][:2000]}, view, False)


@pytest.mark.parametrize(
    "field, value",
    [
        ("strides", ()),
        ("strides", (0,)),
        ("full_length", 1.5),
        ("length_step", 6),
        ("length_step", 0),
        ("reference", "last"),
        ("reference_gap", 0),
        ("num_references", 0),
        ("flip", -0.1),
        ("text_dropout", 2),
    ],
)
def test_impossible_views_are_refused(field, value):
    with pytest.raises(InputError) as error:
        ViewConfig(**{field: value})
    assert error.value.where == f"view.{field}"
