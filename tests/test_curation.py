import dataclasses
import json
import weakref

import numpy as np
import pytest
from cartoons import HEIGHT, WIDTH, cartoon, resized, stream

from animecolor_jax.errors import InputError
from data_pipeline.curation import MEASURING, CurationConfig, curate_image, curate_video, decide

CONFIG = CurationConfig(min_side=96)


def no_text(frames):
    return 0.0


def curate(frames, config=CONFIG, fps=24.0, text_score=no_text):
    return curate_video(stream(frames, fps), "a.mp4", config, text_score)


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize("held", [1, 2, 3])
def test_a_good_clip_is_kept(line_art, held):
    (clip,) = curate(np.repeat(cartoon(1, 12, line_art=line_art), held, axis=0))
    assert clip.kept and not clip.details


def faint(frames):
    return (128 + 0.05 * (frames.astype(int) - 128)).astype(np.uint8)


GOOD = cartoon(1, 12)
# reason -> (frames, config, frames per second, what the sentence must hold)
FAULTS = {
    "short": (GOOD[:8], {}, 24, "8 frames, at least 9 wanted"),
    "small": (resized(GOOD, 80, 142), {}, 24, "80 pixels, at least 96 wanted"),
    "large": (GOOD, {"max_side": 200}, 24, "256 pixels, at most 200 wanted"),
    "low-fps": (GOOD, {}, 4, "4 frames per second, at least 5 wanted"),
    "high-fps": (GOOD, {"max_fps": 30}, 59.94, "59.94 frames per second, at most 30 wanted"),
    "static": (np.repeat(GOOD[:1], 12, axis=0), {"min_motion": None}, 24, "100.0% of the steps"),
    "little-motion": (GOOD, {"min_motion": 50}, 24, "at least 50 wanted"),
    "much-motion": (GOOD, {"max_motion": 0.5}, 24, "at most 0.5 wanted"),
    "dark": (
        (GOOD * 0.06).astype(np.uint8),
        {"min_contrast": 0, "max_static_share": None, "min_motion": 0},
        24,
        "10",
    ),
    "bright": (GOOD, {"max_brightness": 60}, 24, "at most 60 wanted"),
    "low-contrast": (faint(GOOD), {"max_static_share": None, "min_motion": 0}, 24, "at least 8 wanted"),
}


@pytest.mark.parametrize("reason", list(FAULTS))
def test_each_fault_is_named_with_its_value_and_limit(reason):
    frames, changes, fps, sentence = FAULTS[reason]
    (clip,) = curate(frames, dataclasses.replace(CONFIG, **changes), fps)
    assert clip.reasons == (reason,) and list(clip.details) == [reason] and not clip.kept
    assert sentence in clip.details[reason] and "wanted" in clip.details[reason]


def test_text_is_asked_of_frames_inside_the_letterbox_and_all_over_the_clip():
    frames = np.zeros((70, HEIGHT + 40, WIDTH, 3), np.uint8)
    frames[:, 20:-20] = cartoon(2, 1)
    frames[:, 20:30, :10] = (3 * np.arange(70))[:, None, None, None]  # the frame's number
    seen = []

    def text_score(shown):
        seen.append(shown)
        return 0.9

    (clip,) = curate(frames, text_score=text_score)
    assert clip.reasons == ("text",) and clip.details["text"] == "text 0.9, at most 0.5 wanted"
    (shown,) = seen
    assert shown.shape == (8, HEIGHT, WIDTH, 3)
    numbers = shown[:, 2, 2, 0] // 3
    assert numbers[0] == 0 and numbers[-1] >= 60 and np.diff(numbers).max() <= 16


def test_all_faults_are_named():
    (clip,) = curate(np.zeros((5, 64, 64, 3), np.uint8), text_score=lambda frames: 1.0)
    assert clip.reasons == (*("short", "small", "static", "little-motion", "dark", "low-contrast", "text"),)


def test_an_aesthetic_score_counts_once_it_is_there():
    (clip,) = curate(GOOD)
    config = dataclasses.replace(CONFIG, min_aesthetic=5.0)
    assert decide(clip, config).kept
    assert decide(dataclasses.replace(clip, aesthetic=6.0), config).kept
    poor = decide(dataclasses.replace(clip, aesthetic=4.5), config)
    assert poor.details == {"aesthetic": "aesthetic score 4.5, at least 5 wanted"}


def test_thresholds_can_be_changed_afterwards():
    (clip,) = curate(GOOD)
    strict = decide(clip, dataclasses.replace(CONFIG, min_frames=100))
    assert strict.reasons == ("short",) and decide(strict, CONFIG) == clip


def test_only_the_fields_named_so_change_what_is_measured():
    frames = np.concatenate([cartoon(1, 24), cartoon(2, 12)])
    assert set(MEASURING) < {entry.name for entry in dataclasses.fields(CurationConfig)}
    other = CurationConfig(
        **{"min_frames": 5, "min_side": 20, "min_fps": 30.0, "max_static_share": 0.1, "min_motion": 9.0},
        **{"min_brightness": 90.0, "min_contrast": 70.0, "max_text": 0.0, "duplicate_distance": 1.0},
    )
    assert [decide(clip, CONFIG) for clip in curate(frames, other)] == curate(frames)


# ---------------------------------------------------------------- clips


def test_a_video_is_split_at_cuts_and_long_shots_into_parts():
    frames = np.concatenate([cartoon(1, 30), cartoon(2, 12)])
    clips = curate(frames, dataclasses.replace(CONFIG, max_clip_frames=20))
    assert [(clip.start, clip.end, clip.shot) for clip in clips] == [(0, 20, 0), (20, 30, 0), (30, 42, 1)]
    assert [clip.name for clip in clips][1] == "a.mp4[20:30]"


def test_trimmed_frames_are_in_no_clip():
    frames = np.concatenate([cartoon(1, 15), cartoon(2, 15)])
    clips = curate(frames, dataclasses.replace(CONFIG, trim_frames=2))
    assert [(clip.start, clip.end) for clip in clips] == [(0, 13), (17, 30)]


@pytest.mark.parametrize("line_art", [False, True])
def test_scores_are_of_what_is_inside_the_letterbox(line_art):
    frames = cartoon(1, 12, line_art=line_art)
    (plain,), (boxed,) = curate(frames), curate(np.pad(frames, ((0, 0), (20, 20), (0, 0), (0, 0))))
    assert plain.crop == (0, 0, HEIGHT, WIDTH) and boxed.crop == (20, 0, HEIGHT, WIDTH)
    assert (boxed.height, boxed.width) == (HEIGHT + 40, WIDTH)
    for score in ("motion", "static_share", "brightness", "contrast"):
        assert getattr(boxed, score) == pytest.approx(getattr(plain, score), rel=0.03), score


def test_the_frame_rate_is_the_one_known_at_the_end():
    late = stream([], fps=24.0)

    def frames():
        yield from GOOD
        late.fps = 12.0

    late.frames = frames()
    (clip,) = curate_video(late, "a.mp4", CONFIG, no_text)
    assert clip.fps == 12.0
    assert clip.motion == pytest.approx(curate(GOOD, fps=24.0)[0].motion / 2)


def test_an_image_is_asked_for_no_length_and_no_movement():
    clip = curate_image(GOOD[0], "a.png", CONFIG, no_text)
    assert clip.kept and clip.is_image and clip.name == "a.png" and (clip.start, clip.end) == (0, 1)
    small = curate_image(GOOD[0, :50, :50], "a.png", CONFIG, no_text)
    assert small.reasons == ("small",)


def test_a_video_without_frames_has_no_clips():
    assert curate([]) == []


def test_damage_is_not_hidden():
    def frames():
        yield from GOOD
        raise InputError("is truncated")

    with pytest.raises(InputError, match="truncated"):
        curate(frames())


def test_a_clip_survives_json():
    for clip in curate(np.concatenate([GOOD, GOOD[:3, ::-1]])):
        assert type(clip)(**json.loads(json.dumps(dataclasses.asdict(clip), allow_nan=False))) == clip


def test_memory_does_not_grow_with_the_video():
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for index in range(150):
            frame = np.full((48, 64, 3), index % 40, np.uint8).view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    curate(frames(), dataclasses.replace(CONFIG, max_clip_frames=50))
    assert most <= 8


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"min_frames": 0}, "min_frames"),
        ({"min_frames": 9.5}, "min_frames"),
        ({"max_clip_frames": None}, "max_clip_frames"),
        ({"shot_structure": 1.5}, "shot_structure"),
        ({"shot_content": None}, "shot_content"),
        ({"flash_frames": -1}, "flash_frames"),
        ({"max_text": float("nan")}, "max_text"),
        ({"min_fps": True}, "min_fps"),
        ({"min_contrast": "8"}, "min_contrast"),
        ({"duplicate_distance": 12}, "duplicate_distance"),
        ({"min_side": 300, "max_side": 200}, "min_side"),
    ],
)
def test_impossible_settings_are_refused(changes, where):
    with pytest.raises(InputError) as error:
        CurationConfig(**changes)
    assert error.value.where == where and repr(next(iter(changes.values()))) in error.value.what
