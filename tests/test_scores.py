import cv2
import numpy as np
import pytest
from cartoons import HEIGHT, WIDTH, cartoon, encoded

from data_pipeline import scores
from data_pipeline.shots import analysis_frame

DIAGONAL = np.hypot(HEIGHT, WIDTH)


def pan(step, count=16, line_art=False):
    """A camera move of `step` pixels a frame, over a picture."""
    large = cartoon(3, 1, line_art=line_art, height=288, width=512)[0]
    moves = [np.float32([[1, 0, -60 - step * index], [0, 1, -70]]) for index in range(count)]
    return np.stack([cv2.warpAffine(large, move, (WIDTH, HEIGHT)) for move in moves])


def box(frames):
    letterbox = scores.Letterbox()
    for frame in frames:
        letterbox.add(frame)
    return letterbox.box()


def bars(frames, rows, columns, color=0):
    padded = np.empty((len(frames), HEIGHT + 2 * rows, WIDTH + 2 * columns, 3), np.uint8)
    padded[:] = color
    padded[:, rows : rows + HEIGHT, columns : columns + WIDTH] = frames
    return padded


# ---------------------------------------------------------------- movement and light


@pytest.mark.parametrize("step", [1.0, 4.0])
def test_motion_is_the_speed_of_a_pan(step):
    motion, static_share = scores.movement(pan(step), fps=24)
    assert motion == pytest.approx(100 * step / DIAGONAL * 24, rel=0.12) and static_share == 0


def test_motion_counts_time_not_frames():
    smooth, held = cartoon(1, 12), np.repeat(cartoon(1, 12), 2, axis=0)
    motion, static_share = scores.movement(held, fps=24)
    assert motion == pytest.approx(scores.movement(smooth, fps=12)[0], rel=0.05)
    assert static_share == pytest.approx(12 / 23)


def test_a_pan_slower_than_grain_is_no_still():
    motion, static_share = scores.movement(pan(0.05, count=80), fps=24)
    assert static_share < 0.98 and motion == pytest.approx(100 * 0.05 / DIAGONAL * 24, rel=0.4)


@pytest.mark.parametrize("line_art", [False, True])
def test_a_still_with_grain_and_compression_does_not_move(line_art):
    still = np.repeat(cartoon(2, 1, line_art=line_art, height=288, width=512), 12, axis=0)
    assert scores.movement(still, fps=24) == (0, 1)
    grain = np.random.default_rng(0).normal(0, 3, (*still.shape[:3], 1))
    noisy = np.clip(still + grain, 0, 255).astype(np.uint8)
    shown = [analysis_frame(frame) for frame in encoded(noisy, 28)]
    assert scores.movement(shown, fps=24) == (0, 1)


def test_a_blink_is_a_new_drawing():
    frames = np.repeat(cartoon(2, 1), 12, axis=0)
    frames[5:7, 60:72, 100:124] = 255 - frames[5:7, 60:72, 100:124]
    motion, static_share = scores.movement(frames, fps=24)
    assert static_share == pytest.approx(9 / 11) and motion > 0


def test_dark_scenes_move_too():
    bright, dark = cartoon(1, 10), (cartoon(1, 10) * 0.15).astype(np.uint8)
    assert scores.movement(dark, 24)[0] == pytest.approx(scores.movement(bright, 24)[0], rel=0.35)


def test_one_frame_is_a_still():
    assert scores.movement(cartoon(0, 1), fps=24) == (0, 1)


def test_light_is_mean_and_deviation_of_luma():
    frames = np.zeros((3, 10, 20, 3), np.uint8)
    frames[:, :, 10:] = 255
    assert scores.light(frames) == pytest.approx((127.5, 127.5))
    assert scores.light(np.full_like(frames, 40)) == pytest.approx((40, 0))


# ---------------------------------------------------------------- letterbox


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize(
    "rows, columns, color", [(18, 0, 0), (0, 32, 0), (18, 32, 0), (17, 0, 0), (20, 0, (90, 20, 60))]
)
def test_letterbox_is_found_to_the_pixel(line_art, rows, columns, color):
    frames = bars(cartoon(5, 4, line_art=line_art), rows, columns, color)
    assert box(frames) == (rows, columns, HEIGHT, WIDTH)


@pytest.mark.parametrize("quality, slack", [(18, 0), (32, 1)])
def test_letterbox_is_found_in_compressed_video(quality, slack):
    for rows, columns in ((18, 0), (0, 32)):
        found = box(encoded(bars(cartoon(5, 6), rows, columns), quality))
        assert np.abs(np.subtract(found, (rows, columns, HEIGHT, WIDTH))).max() <= slack


def test_letterbox_is_found_around_a_fade_from_black():
    frames = cartoon(5, 8) * np.linspace(0, 1, 8)[:, None, None, None]
    assert box(bars(frames.astype(np.uint8), 18, 0)) == (18, 0, HEIGHT, WIDTH)


def picture(name):
    """Frames without bars that one could take for some."""
    frames = cartoon(5, 4)
    if name == "paper around a drawing":
        art = bars(cartoon(5, 4, line_art=True), 30, 40, 255)
        return art
    if name == "frame drawn on paper":
        art = np.full((4, 200, 300, 3), 255, np.uint8)
        art[:, 20:22, 20:280] = art[:, 178:180, 20:280] = 0
        return art
    if name == "horizon":
        frames[:, :70], frames[:, 70:] = (150, 200, 250), (90, 160, 80)
    elif name == "dark scene":
        frames[:] = 0
        for frame in frames:
            cv2.circle(frame, (128, 72), 50, (60, 50, 90), -1)
    elif name == "black floor":
        frames[:, 120:] = 0
    elif name == "black at first":
        frames = bars(frames, 18, 0)
        frames[2:] = cartoon(6, 2, height=HEIGHT + 36)
    elif name == "nothing":
        frames[:] = 0
    return frames


@pytest.mark.parametrize(
    "name",
    ["plain", "paper around a drawing", "frame drawn on paper", "horizon", "dark scene", "black floor"]
    + ["black at first", "nothing"],
)
def test_pictures_are_not_cropped(name):
    frames = picture(name)
    assert box(frames) == (0, 0, *frames.shape[1:3])


def test_crop_scales_the_box():
    frames = np.arange(2 * 20 * 40).reshape(2, 20, 40, 1) * np.ones(3, int)
    cut = scores.crop(frames, (16, 8, 48, 144), (80, 160))
    assert np.array_equal(cut, frames[:, 4:16, 2:38])
    assert scores.crop(frames, (17, 9, 46, 142), (80, 160)).shape == (2, 10, 34, 3)  # never a part of a bar
