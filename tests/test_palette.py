import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.palette import palette, palette_distance, srgb_to_lab
from data_pipeline.toon import draw_clip

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (119, 119, 119)


def flat(*colors):
    """Frames [1, 4, 4 N, 3] of stripes, equally wide."""
    stripes = [np.full((1, 4, 4, 3), color, np.uint8) for color in colors]
    return np.concatenate(stripes, axis=2)


def random_palette(seed, size=5):
    rng = np.random.default_rng(seed)
    return rng.uniform((0, -80, -80), (100, 80, 80), (size, 3)), rng.dirichlet(np.ones(size))


@pytest.mark.parametrize(
    ("color", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), (GREY, (50.03, 0, 0)),
        (RED, (53.24, 80.09, 67.20)), ((0, 255, 0), (87.73, -86.18, 83.18)), (BLUE, (32.30, 79.19, -107.86)),
        ((1, 1, 1), (0.2742, 0, 0)),  # in the straight part of the curve
    ],
)  # fmt: skip
def test_lab_has_the_published_values(color, lab):
    assert srgb_to_lab(np.array(color, np.uint8)) == pytest.approx(lab, abs=0.006)


def test_lab_agrees_with_scikit_image():
    skimage = pytest.importorskip("skimage.color")
    colors = np.random.default_rng(0).integers(0, 256, (500, 3), np.uint8)
    # Its white point and matrix are rounded elsewhere, so that its greys are off by 0.005.
    assert np.abs(srgb_to_lab(colors) - skimage.rgb2lab(colors)).max() < 0.02


def test_distance_of_single_colours_is_their_delta_e():
    red, blue = palette(flat(RED)), palette(flat(BLUE))
    expected = np.linalg.norm(srgb_to_lab(np.uint8(RED)) - srgb_to_lab(np.uint8(BLUE)))
    assert palette_distance(red, blue) == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(176.3, abs=0.1)  # a published value, CIE76


def test_few_colours_are_found_exactly():
    centres, weights = palette(flat(RED, GREY, RED, BLUE))
    assert weights.tolist() == [0.5, 0.25, 0.25]
    wanted = srgb_to_lab(np.array([RED, BLUE, GREY], np.uint8))
    assert centres[0] == pytest.approx(wanted[0])
    assert centres[np.argsort(centres[:, 2])] == pytest.approx(wanted[[1, 2, 0]])  # by b*


def test_only_the_share_that_differs_moves():
    a, b = palette(flat(RED, GREY, GREY, BLUE)), palette(flat(RED, GREY, BLUE, BLUE))
    grey, blue = srgb_to_lab(np.array([GREY, BLUE], np.uint8))
    assert palette_distance(a, b) == pytest.approx(np.linalg.norm(grey - blue) / 4, abs=1e-9)


def test_k_means_finds_groups_that_lie_apart():
    rng = np.random.default_rng(0)
    middles = np.array([[40, 40, 40], [200, 60, 60], [60, 180, 90], [70, 80, 210], [220, 210, 120]])
    group = rng.choice(5, (3, 40, 50), p=[0.4, 0.3, 0.15, 0.1, 0.05])
    frames = (middles[group] + rng.integers(-6, 7, (3, 40, 50, 3))).astype(np.uint8)
    centres, weights = palette(frames, colors=5)
    assert weights == pytest.approx(np.bincount(group.ravel()) / group.size, abs=1e-12)
    means = [srgb_to_lab(frames[group == index]).mean(0) for index in range(5)]
    assert centres == pytest.approx(np.array(means), abs=1e-9)


def test_a_palette_is_of_pixels_wherever_they_stand():
    frames = draw_clip(3, 48, 64, seed=1).color
    shuffled = np.random.default_rng(0).permutation(frames.reshape(-1, 3)).reshape(frames.shape)
    for one, other in zip(palette(frames), palette(shuffled), strict=True):
        assert np.array_equal(one, other)
    assert palette_distance(palette(frames), palette(np.concatenate([frames] * 2))) < 1e-6


def test_seeds_choose_the_start_alone():
    frames = draw_clip(3, 48, 64, seed=2).color
    one, same, other = (palette(frames, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one[0], same[0]) and not np.array_equal(one[0], other[0])
    assert len(one[0]) == 16 and one[1].sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(one[1]) <= 0).all()
    assert palette_distance(one, other) < 8  # far below what another palette comes to


def test_colours_that_are_alike_may_be_fewer_than_asked_for():
    ramp = np.repeat(np.arange(16, 24, dtype=np.uint8), 3).reshape(1, 1, 8, 3)
    centres, weights = palette(ramp, colors=4)  # 8 distinct ones within one step of k-means' grid
    assert len(centres) == 1 and weights.tolist() == [1]
    assert len(palette(ramp, colors=8)[0]) == 8


@pytest.mark.parametrize("seeds", list(itertools.combinations(range(4), 3)))
def test_the_distance_is_a_metric(seeds):
    a, b, c = (random_palette(seed, size) for seed, size in zip(seeds, (5, 7, 3), strict=True))
    assert palette_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert palette_distance(a, b) == pytest.approx(palette_distance(b, a), abs=1e-7)
    assert 0 < palette_distance(a, b) <= palette_distance(a, c) + palette_distance(c, b) + 1e-7
    order = np.random.default_rng(0).permutation(5)
    assert palette_distance((a[0][order], a[1][order]), b) == pytest.approx(palette_distance(a, b), abs=1e-7)


def test_equal_weights_are_an_assignment():
    a, b = random_palette(0, 8)[0], random_palette(1, 8)[0]
    costs = np.linalg.norm(a[:, None] - b, axis=-1)
    expected = costs[linear_sum_assignment(costs)].mean()
    even = np.full(8, 1 / 8)
    assert palette_distance((a, even), (b, even)) == pytest.approx(expected, abs=1e-7)


def test_a_shift_of_all_colours_is_the_distance():
    centres, weights = random_palette(3)
    moved = centres + (3, 0, -4)
    assert palette_distance((centres, weights), (moved, weights)) == pytest.approx(5, abs=1e-7)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_what_are_no_frames_is_named(frames):
    with pytest.raises(InputError, match="frames"):
        palette(frames)


def test_bad_numbers_are_named():
    with pytest.raises(InputError, match="colors"):
        palette(flat(RED), colors=0)
    centres, weights = random_palette(0)
    for broken in (2 * weights, weights[:-1], weights - 2 * weights[0] * (np.arange(5) == 0)):
        with pytest.raises(ValueError, match="expected"):
            palette_distance((centres, weights), (centres, broken))
