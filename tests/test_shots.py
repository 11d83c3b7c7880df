import weakref

import cv2
import numpy as np
import pytest
from cartoons import cartoon, encoded

from data_pipeline.curation import CurationConfig
from data_pipeline.shots import analysis_frame, continuity, label_shots

CONFIG = CurationConfig()


def cuts(frames, config=CONFIG):
    """Index of the first frame of every shot but the first."""
    labels = [shot for _, shot, *_ in label_shots(iter(frames), config)]
    return (np.flatnonzero(np.diff(labels)) + 1).tolist()


def mixed(first, second, shares):
    return np.stack([(first * (1 - share) + second * share).astype(np.uint8) for share in shares])


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize("held", [1, 3])
def test_cuts_between_clips_are_found_exactly(line_art, held):
    lengths = [11, 5, 14, 1, 9]
    clips = [cartoon(seed, length, line_art=line_art) for seed, length in enumerate(lengths)]
    frames = np.repeat(np.concatenate(clips), held, axis=0)  # held 3 frames: drawn on threes
    assert cuts(frames, CurationConfig(flash_frames=2)) == (held * np.cumsum(lengths)[:-1]).tolist()


def test_cuts_survive_compression():
    frames = encoded(np.concatenate([cartoon(seed, 12) for seed in range(3)]), quality=32)
    assert cuts(frames) == [12, 24]


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize("move", ["pan", "zoom", "shake", "skip"])
def test_movement_is_no_cut(line_art, move):
    large = cartoon(3, 1, line_art=line_art, height=432, width=768)[0]
    if move == "pan":  # 5 percent of the width from frame to frame
        frames = [large[100:244, 13 * index :][:, :256] for index in range(30)]
    elif move == "zoom":
        boxes = [(round(216 / 1.06**index), round(384 / 1.06**index)) for index in range(16)]
        frames = [cv2.resize(large[216 - y : 216 + y, 384 - x : 384 + x], (256, 144)) for y, x in boxes]
    elif move == "shake":
        offsets = np.random.default_rng(0).integers(0, 18, (20, 2))
        frames = [large[100 + y : 244 + y, 200 + x : 456 + x] for y, x in offsets]
    else:
        frames = cartoon(3, 40, line_art=line_art)[::4]
    assert cuts(frames) == []


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize("level", [255, 0])
@pytest.mark.parametrize("length", [1, CONFIG.flash_frames])
def test_a_flash_is_no_cut(line_art, level, length):
    frames = cartoon(1, 16, line_art=line_art)
    frames[6 : 6 + length] = level
    assert cuts(frames) == []


def test_a_flash_that_fades_away_is_no_cut():
    frames = cartoon(1, 20)
    for index, share in enumerate(np.linspace(1, 0, 9)):
        frames[5 + index] = mixed(frames[5 + index], np.full_like(frames[0], 255), [share])[0]
    assert cuts(frames) == []


def test_what_lasts_longer_than_a_flash_is_a_shot():
    frames = cartoon(1, 20)
    frames[6 : 7 + CONFIG.flash_frames] = cartoon(2, 1)
    assert cuts(frames) == [6, 7 + CONFIG.flash_frames]


def test_a_cut_with_a_flash_behind_it_is_found():
    frames = np.concatenate([cartoon(1, 10), cartoon(2, 10)])
    frames[12] = 255
    assert cuts(frames) == [10]


def test_light_that_changes_for_good_is_no_cut():
    night = (cartoon(4, 20)[10:] * [0.4, 0.35, 0.6]).astype(np.uint8)
    assert cuts(np.concatenate([cartoon(4, 10), night])) == []
    assert cuts(np.concatenate([night, cartoon(4, 30)[20:]])) == []


def test_a_fade_through_black_leaves_the_black_frames_apart_and_a_slow_dissolve_is_not_seen():
    first, second = cartoon(1, 1)[0], cartoon(2, 1)[0]
    black = np.zeros_like(first)
    fade = np.concatenate(
        [mixed(first, black, np.linspace(0, 1, 12)), [black] * 8, mixed(black, second, np.linspace(0, 1, 12))]
    )
    labels = [shot for _, shot, *_ in label_shots(iter(fade), CONFIG)]
    assert labels[0] < labels[16] < labels[-1]
    assert cuts(mixed(first, second, np.linspace(0, 1, 24))) == []


def test_every_frame_comes_once_and_in_order():
    frames = cartoon(0, 12)
    got = list(label_shots(iter(frames), CONFIG))
    assert [index for index, *_ in got] == list(range(12))
    assert all(np.shares_memory(frame, frames[index]) for index, _, frame, _ in got)
    assert all(np.array_equal(small, analysis_frame(frame)) for *_, frame, small in got)
    assert list(label_shots(iter([]), CONFIG)) == []


def test_frames_around_cuts_can_be_trimmed():
    frames = np.concatenate([cartoon(1, 10), cartoon(2, 10)])
    got = [(index, shot) for index, shot, *_ in label_shots(iter(frames), CurationConfig(trim_frames=2))]
    assert got == [(index, 0) for index in range(8)] + [(index, 1) for index in range(12, 20)]


def test_few_frames_are_held():
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for index in range(60):
            frame = np.full((48, 64, 3), 4 * index, np.uint8).view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    for _ in label_shots(frames(), CONFIG):
        pass
    assert most <= CONFIG.flash_frames + 3


@pytest.mark.parametrize("size", [(8, 2000), (2000, 8), (16, 16), (720, 1280)])
def test_frames_of_any_shape_can_be_analysed(size):
    small = analysis_frame(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert max(small.shape[:2]) == 256 and min(small.shape[:2]) >= 32
    assert continuity(small, small) == pytest.approx(1)


def test_analysis_frames_are_averages():
    frame = cartoon(0, 1, height=1081, width=1921)[0]
    area = cv2.resize(frame, (256, 144), interpolation=cv2.INTER_AREA)
    assert np.abs(analysis_frame(frame).astype(int) - area).mean() < 2.5
