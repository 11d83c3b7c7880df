"""SA and EDMD: line art of generated frames against the input sketches."""

import numpy as np
import pytest

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.sketches import distance_map, distance_map_rmse, line_art, sketch_alignment
from data_pipeline.sketch import EXTRACTORS, XDoG, extractor
from data_pipeline.toon import draw_clip


@pytest.fixture(scope="module")
def clip():
    return draw_clip(3, 64, 96, seed=5).color


@pytest.fixture(scope="module")
def sketch(clip):
    return XDoG()(clip)


def vertical_line(column, height=20, width=40):
    """A sketch with one line."""
    frame = np.full((height, width), 255, np.uint8)
    frame[:, column] = 0
    return frame


def brute_distances(lines):
    places = np.argwhere(lines)
    pixels = np.argwhere(np.ones_like(lines))
    squares = np.square(pixels[:, None] - places).sum(-1)
    return np.sqrt(squares.min(1)).reshape(lines.shape)


# ---------------------------------------------------------------- line art


@pytest.mark.parametrize("name", EXTRACTORS)
def test_line_art_is_that_of_the_extractor(name, clip):
    batch = np.stack([clip, clip[::-1]])
    found = np.asarray(line_art(batch, name))
    assert found.dtype == np.uint8 and found.shape == (2, 3, 64, 96)
    np.testing.assert_array_equal(found, np.stack([extractor(name)(frames) for frames in batch]))
    np.testing.assert_array_equal(line_art(clip[1], name), found[0, 1])


def test_line_art_takes_an_extractor_of_ones_own(clip):
    np.testing.assert_array_equal(line_art(clip, lambda frames: 255 - frames[..., 0]), 255 - clip[..., 0])
    np.testing.assert_array_equal(line_art(clip, XDoG(sigma=1.4)), XDoG(sigma=1.4)(clip))


# ---------------------------------------------------------------- SA


def test_alignment_is_the_root_mean_square_difference(clip, sketch):
    other = np.roll(sketch, 1, axis=2)
    expected = np.sqrt(np.square(other / 255.0 - sketch / 255.0).mean((1, 2)))
    np.testing.assert_allclose(sketch_alignment(other, sketch), expected, rtol=1e-6)
    np.testing.assert_allclose(sketch_alignment(other / 255, sketch), expected, rtol=1e-6)
    assert sketch_alignment(other[0], sketch[0]).shape == ()


def test_alignment_is_0_for_the_same_lines_and_1_for_opposite_ones(sketch, clip):
    np.testing.assert_array_equal(sketch_alignment(line_art(clip), sketch), [0, 0, 0])
    np.testing.assert_array_equal(sketch_alignment(255 - sketch, sketch), [1, 1, 1])


def test_alignment_is_bit_equal_under_any_batch_split(sketch):
    other = np.roll(sketch, 2, axis=1)
    together = np.asarray(sketch_alignment(other, sketch))
    alone = [sketch_alignment(*pair) for pair in zip(other, sketch, strict=True)]
    np.testing.assert_array_equal(alone, together)


# ---------------------------------------------------------------- EDMD


def test_distance_map_equals_brute_force(sketch):
    rng = np.random.default_rng(0)
    for lines in (sketch[0] == 0, rng.uniform(size=(31, 47)) < 0.01, rng.uniform(size=(9, 200)) < 0.002):
        assert lines.any()
        np.testing.assert_allclose(distance_map(lines), brute_distances(lines), rtol=1e-6)


def test_edmd_of_shifted_lines_has_a_closed_form():
    near, far = vertical_line(10), vertical_line(13)
    columns = np.arange(40)
    expected = np.sqrt(np.mean((abs(columns - 10) - abs(columns - 13)) ** 2))
    assert distance_map_rmse(near, far) == pytest.approx(expected, rel=1e-6)


def test_edmd_grows_with_the_shift_and_is_symmetric(sketch):
    found = [distance_map_rmse(np.roll(sketch, shift, axis=2), sketch) for shift in (0, 1, 3, 8)]
    np.testing.assert_array_equal(found[0], [0, 0, 0])
    assert all((a < b).all() for a, b in zip(found, found[1:], strict=False))
    np.testing.assert_array_equal(found[2], distance_map_rmse(sketch, np.roll(sketch, 3, axis=2)))


def test_edmd_counts_as_line_what_is_darker_than_half():
    grey = np.full((20, 40), 255, np.uint8)
    grey[:, 10] = 127
    assert distance_map_rmse(grey, vertical_line(10)) == 0
    assert distance_map_rmse(grey / 255, vertical_line(10)) == 0
    grey[:, 10] = 128
    assert distance_map_rmse(grey, vertical_line(10)) > 20  # no line
    assert distance_map_rmse(grey, vertical_line(10), threshold=0.6) == 0


def test_a_frame_without_lines_is_a_diagonal_away():
    empty, line = np.full((30, 40), 255, np.uint8), vertical_line(20, 30, 40)
    assert distance_map_rmse(empty, empty) == 0
    np.testing.assert_array_equal(distance_map(empty == 0), np.full((30, 40), 50.0))
    expected = np.sqrt(np.mean((50 - abs(np.arange(40.0) - 20)) ** 2))
    found = distance_map_rmse(empty, line)
    assert found == distance_map_rmse(line, empty) == pytest.approx(expected, rel=1e-6)
    assert found > distance_map_rmse(vertical_line(0, 30, 40), line)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: sketch_alignment(a, a[:, 1:]), "the same shape"),
        (lambda a: sketch_alignment(a[0, 0], a[0, 0]), r"\[..., H, W\]"),
        (lambda a: distance_map_rmse(a, a[:, 1:]), "the same shape"),
        (lambda a: distance_map_rmse(a, a.astype(int)), "target: int64"),
        (lambda a: distance_map_rmse(a, a, threshold=0.0), "above 0"),
        (lambda a: line_art(a[..., None].repeat(3, -1), "pidinet"), "unknown extractor"),
        (lambda a: line_art(a[0], "canny"), r"\[..., H, W, 3\]"),
    ],
)
def test_bad_input_is_named(call, message, sketch):
    with pytest.raises(InputError, match=message):
        call(sketch)
