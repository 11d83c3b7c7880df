import numpy as np
import pytest

from animecolor_jax.toon_clip import draw_toon_clip


@pytest.fixture(scope="module")
def clip():
    return draw_toon_clip()


def luma(frames):
    return frames @ np.array([0.299, 0.587, 0.114])


def test_default_clip_has_the_size_of_the_tiny_preset(clip):
    assert clip.sketch.shape == clip.color.shape == (17, 96, 160, 3)
    assert clip.sketch.dtype == clip.color.dtype == clip.reference.dtype == np.uint8
    np.testing.assert_array_equal(clip.reference, clip.color[0])


def test_same_seed_draws_the_same_pixels(clip):
    again = draw_toon_clip()
    np.testing.assert_array_equal(clip.sketch, again.sketch)
    np.testing.assert_array_equal(clip.color, again.color)


def test_seeds_have_their_own_colours():
    colors = [draw_toon_clip(1, 48, 80, seed=seed).color for seed in range(4)]
    for index, color in enumerate(colors):
        for other in colors[index + 1 :]:
            assert np.abs(color.astype(int) - other).mean() > 5


def test_sketch_is_dark_lines_on_white_without_colour(clip):
    assert (clip.sketch[..., 0] == clip.sketch[..., 1]).all() and (
        clip.sketch[..., 0] == clip.sketch[..., 2]
    ).all()
    assert np.median(clip.sketch) == 255
    assert clip.sketch.min() < 80
    assert 0.03 < (clip.sketch[..., 0] < 128).mean() < 0.25


def test_lines_lie_where_the_painted_frame_is_darkest(clip):
    """Sketch and colour show the same drawing: pixels of the line are darker than those around them."""
    lines = clip.sketch[..., 0] < 100
    around = np.zeros_like(lines)
    for axis in (1, 2):
        for step in (-3, 3):
            around |= np.roll(lines, step, axis)
    around &= clip.sketch[..., 0] > 250
    painted = luma(clip.color)
    assert painted[lines].mean() < painted[around].mean() - 50


def test_figures_move_in_every_frame_and_the_movement_closes_after_16(clip):
    for frames in (clip.sketch, clip.color):
        changes = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
        assert (changes > 0.5).all()
    below_the_clouds = slice(48, None)
    np.testing.assert_allclose(clip.color[16, below_the_clouds], clip.color[0, below_the_clouds], atol=8)


@pytest.mark.parametrize("height, width", [(33, 71), (64, 64), (120, 48)])
def test_any_size_and_length_can_be_drawn(height, width):
    clip = draw_toon_clip(2, height, width)
    assert clip.sketch.shape == clip.color.shape == (2, height, width, 3)
    assert clip.sketch.min() < 128
