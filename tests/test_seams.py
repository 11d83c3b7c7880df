import itertools

import numpy as np
import pytest

from animecolor_jax import canvas
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.seams import border_pairs, measure_seams

WINDOW, OVERLAP, FRAMES = 17, 4, 41
STARTS = canvas.windows(FRAMES, WINDOW, OVERLAP)  # 0, 12, 24


def moving(num_frames=FRAMES, step=2):
    """A texture that moves evenly: [T, 24, 96, 3]."""
    texture = np.random.default_rng(0).integers(0, 200, (24, 96, 3), np.uint8)
    return np.stack([np.roll(texture, step * at, axis=1) for at in range(num_frames)])


def grainy():
    """A still picture under noise that differs between frames by 35 / 18 levels on average."""
    return np.random.default_rng(1).integers(0, 6, (FRAMES, 24, 96, 3), np.uint8) + moving(1)


def jumping(frames, at, by=50):
    """The same, but all frames from `at` on are brighter: another window's colours."""
    return np.concatenate([frames[:at], frames[at:] + np.uint8(by)])


def test_even_motion_has_a_ratio_of_one():
    found = measure_seams(moving(), STARTS, WINDOW)
    assert found.border > 0.1 and found.ratio == pytest.approx(1, abs=1e-12)
    assert measure_seams(np.repeat(moving(1), FRAMES, axis=0), STARTS, WINDOW).ratio == 1  # a still clip


@pytest.mark.parametrize("at", [13, 15, 17, 27])
def test_a_jump_where_windows_meet_raises_the_ratio(at):
    even, jump = (measure_seams(clip, STARTS, WINDOW) for clip in (grainy(), jumping(grainy(), at)))
    assert even.ratio == pytest.approx(1, abs=0.01)
    assert jump.inside == even.inside
    # One of ten pairs at the borders changes by 50 levels on average, the others by the noise alone.
    assert jump.ratio == pytest.approx((0.9 * 35 / 18 + 0.1 * 50) / (35 / 18), rel=0.02)


@pytest.mark.parametrize("at", [5, 12, 20, 38])
def test_a_jump_within_a_window_lowers_it(at):
    assert measure_seams(jumping(moving(), at), STARTS, WINDOW).ratio < 1


def test_borders_are_where_the_blend_passes_from_window_to_window():
    for window, overlap, num_frames in ((17, 4, 41), (17, 8, 73), (49, 16, 145), (33, 12, 57)):
        starts, latents = canvas.windows(num_frames, window, overlap), (window - 1) // 4 + 1
        total = (num_frames - 1) // 4 + 1
        weights = canvas.blend_weights(starts, latents, total)
        index = canvas.latent_index(starts, latents)
        of_clip = np.zeros((len(starts), total))  # each window's weight in each latent
        for row, places, values in zip(of_clip, index, weights, strict=True):
            row[places[places >= 0]] = values[places >= 0]
        latent = (np.arange(num_frames) + 3) // 4
        shared = np.array([(of_clip[:, one] < 1).all() for one in latent])
        changes = np.array([(of_clip[:, a] != of_clip[:, b]).any() for a, b in itertools.pairwise(latent)])
        expected = changes | shared[1:] | shared[:-1]
        assert np.array_equal(border_pairs(num_frames, starts, window), expected)


def test_windows_that_only_touch_have_one_border_each():
    assert np.flatnonzero(border_pairs(12, [0, 4, 8], 4)).tolist() == [3, 7]


def test_a_clip_may_be_shorter_than_its_padded_windows():
    pairs = border_pairs(FRAMES, STARTS, WINDOW)
    assert np.array_equal(border_pairs(36, STARTS, WINDOW), pairs[:35])
    assert measure_seams(moving(36), STARTS, WINDOW).ratio == pytest.approx(1, abs=1e-12)


def test_the_target_says_how_much_motion_there_is():
    target = jumping(grainy(), 13)  # a lamp goes on in the clip itself, where windows happen to meet
    alone, fair = (measure_seams(target, STARTS, WINDOW, of) for of in (None, target))
    assert alone.ratio > 3 and fair.ratio == pytest.approx(1, abs=1e-12)
    worse = measure_seams(target, STARTS, WINDOW, moving())  # the lamp is the model's own
    assert worse.target.ratio == pytest.approx(1, abs=1e-12)
    assert worse.ratio == pytest.approx(alone.ratio, abs=1e-9)


def test_ratios_without_motion_inside_are_undefined():
    still = np.repeat(moving(1), FRAMES, axis=0)
    assert measure_seams(jumping(still, 13), STARTS, WINDOW).ratio is None
    assert measure_seams(moving(), STARTS, WINDOW, jumping(still, 13)).ratio is None
    assert measure_seams(moving(), STARTS, WINDOW, jumping(still, 5)).ratio is None
    assert measure_seams(moving(), STARTS, WINDOW, still).ratio == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("frames", "starts", "target", "what"),
    [
        (moving(17), [0], None, "no two windows"), (moving(12), STARTS, None, "no two windows"),
        (moving(), [0, 12], None, "end of the clip"), (moving(), [4, 12, 24], None, "the first 0"),
        (moving(), [0, 24, 12, 24], None, "rising"), (moving(), [], None, "the first 0"),
        (moving(), STARTS, moving(40), "same shape"), (moving() / 255, STARTS, None, "uint8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(frames, starts, target, what):
    with pytest.raises(InputError, match=what):
        measure_seams(frames, starts, WINDOW, target)
