"""TC: the warping error of a clip over that of its target, with OpenCV's DIS flow."""

import math
import multiprocessing

import cv2
import numpy as np
import pytest

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.temporal import Bilinear, FlowConfig, WarpingError, tc_dis, warping_errors
from data_pipeline.toon import draw_clip

FRAMES, HEIGHT, WIDTH = 5, 64, 96


@pytest.fixture(scope="module")
def clip():
    return draw_clip(FRAMES, HEIGHT, WIDTH, seed=5).color


@pytest.fixture(scope="module")
def moving():
    """A texture that moves by (2, 3) pixels a frame."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT + 32, WIDTH + 32, 3), np.uint8), (0, 0), 2.0)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    return np.stack([texture[2 * t : 2 * t + HEIGHT, 3 * t : 3 * t + WIDTH] for t in range(FRAMES)])


def flickered(clip, amplitude):
    """Every second frame brighter by `amplitude`."""
    change = amplitude * (np.arange(len(clip)) % 2)[:, None, None, None]
    return np.clip(clip.astype(int) + change, 0, 255).astype(np.uint8)


def test_identical_clips_have_ratio_1(clip, moving):
    for frames in (clip, moving):
        errors = warping_errors(frames, frames)
        assert errors.ratio == 1 and errors.generated == errors.target > 0 and errors.pairs == FRAMES - 1


def test_flicker_raises_the_ratio_with_its_strength(clip):
    ratios = [tc_dis(flickered(clip, amplitude), clip) for amplitude in (0, 4, 12, 40)]
    assert ratios[0] == 1
    assert all(a < b for a, b in zip(ratios, ratios[1:], strict=False))


def test_a_recoloured_clip_that_moves_alike_stays_consistent(clip):
    assert tc_dis(clip[..., ::-1], clip) == pytest.approx(1, abs=1e-9)  # channels in another order
    pale = (128 + (clip.astype(float) - 128) / 2).round().astype(np.uint8)
    assert 0.15 < tc_dis(pale, clip) < 0.4  # half the contrast is a quarter of the error


def test_motion_is_compensated(moving):
    error = warping_errors(moving, moving).target
    plain = np.square(np.diff(moving / 255.0, axis=0)).mean()
    assert error < 0.002 * plain  # also where pixels leave the frame, which are not compared


def test_a_clip_that_stands_still_where_the_target_moves_is_inconsistent(moving):
    still = np.repeat(moving[:1], FRAMES, axis=0)
    assert tc_dis(still, moving) > 3


def test_still_targets_have_no_ratio_unless_both_are_still(clip):
    still = np.repeat(clip[:1], FRAMES, axis=0)
    assert warping_errors(still, still) == (0, 0, FRAMES - 1) and tc_dis(still, still) == 1
    errors = warping_errors(flickered(still, 10), still)
    assert errors.ratio == math.inf and errors.target == 0 and errors.pairs == FRAMES - 1
    changed = flickered(still, 10)[:2] / 255.0
    assert errors.generated == pytest.approx(np.square(changed[1] - changed[0]).mean(), rel=1e-12)


def test_one_frame_is_no_pair(clip):
    error = WarpingError()
    error.add(clip[0], clip[0])
    result = error.result()
    assert result.pairs == 0 and math.isnan(result.generated) and math.isnan(result.ratio)


def test_hidden_pixels_are_not_compared(moving):
    """A white disc moves over a texture that stands still: what it covers and uncovers has no counterpart."""
    frames = np.repeat(moving[:1], FRAMES, axis=0)
    for t, frame in enumerate(frames):
        cv2.circle(frame, (20 + 12 * t, 32), 14, (255, 255, 255), -1)
    everything = FlowConfig(relative=1e9)
    assert warping_errors(frames, frames).target < 0.8 * warping_errors(frames, frames, everything).target


def test_pairs_without_visible_pixels_are_left_out(moving):
    nothing = FlowConfig(relative=0, absolute=0)  # forward and backward flow never cancel to the last bit
    found = warping_errors(moving, moving, nothing)
    assert found.pairs == 0 and math.isnan(found.ratio)


def test_clips_stream_frame_by_frame(clip):
    generated = flickered(clip, 7)
    error = WarpingError()
    partial = []
    for pair in zip(generated, clip, strict=True):
        error.add(*pair)
        partial.append(error.result())
    assert partial[-1] == warping_errors(generated, clip)
    assert partial[2] == warping_errors(generated[:3], clip[:3])


def test_floats_and_8_bit_frames_agree(clip):
    generated = flickered(clip, 7)
    mixed = warping_errors((generated / 255).astype(np.float64), clip)
    np.testing.assert_allclose(mixed, warping_errors(generated, clip), rtol=1e-12)


def measured(clip, threads=1):
    cv2.setNumThreads(threads)
    return warping_errors(flickered(clip, 7), clip)


def test_the_number_of_threads_does_not_matter_and_stays(clip):
    before = cv2.getNumThreads()
    try:
        found = {measured(clip, threads) for threads in (1, 2, 4)}
        assert len(found) == 1 and cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(before)


def test_processes_agree(clip):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(measured, (clip,)) == warping_errors(flickered(clip, 7), clip)


def test_bilinear_lookup_is_exact_for_planes_and_whole_pixels():
    y, x = np.mgrid[:20, :30].astype(float)
    plane = np.stack([2 * x - y, x * 0 + 3], axis=-1)
    flow = np.random.default_rng(0).uniform(-4, 4, (20, 30, 2))
    warp = Bilinear(flow)
    expected = np.stack([2 * (x + flow[..., 0]) - (y + flow[..., 1]), x * 0 + 3], axis=-1)
    np.testing.assert_allclose(warp(plane)[warp.inside], expected[warp.inside], atol=1e-12)
    assert 0.6 < warp.inside.mean() < 0.95
    image = np.random.default_rng(1).uniform(size=(20, 30, 3))
    shift = Bilinear(np.broadcast_to([3.0, -2.0], (20, 30, 2)))
    np.testing.assert_array_equal(shift(image)[2:, :-3], image[:-2, 3:])
    assert shift.inside.sum() == 18 * 27 and shift.inside[2:, :-3].all()
    np.testing.assert_array_equal(Bilinear(np.zeros((20, 30, 2)))(image), image)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: warping_errors(a, a[:-1]), "5 and 4 frames"),
        (lambda a: warping_errors(a[:1], a[:1]), "2 or more"),
        (lambda a: tc_dis(a, a[:, :-8]), "one size"),
        (lambda a: tc_dis(a[:, :31], a[:, :31]), "32 pixels"),
        (lambda a: tc_dis(a[..., 0], a[..., 0]), "generated"),
        (lambda a: tc_dis(a, a.astype(int)), "target"),
        (lambda a: FlowConfig(preset="slow"), "ultrafast, fast, medium"),
        (lambda a: FlowConfig(absolute=-1.0), "not negative"),
    ],
)
def test_bad_input_is_named(call, message, clip):
    with pytest.raises(InputError, match=message):
        call(clip)
