import numpy as np
import pytest
from PIL import Image

from animecolor_jax.evaluation import figures
from animecolor_jax.evaluation.figures import (
    draw_comparison_grid,
    draw_temporal_profiles,
    evenly_spaced,
    temporal_profile,
    tile_clips,
    write_png,
)


def noise(seed=0, shape=(5, 24, 40, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def flat(color, shape=(5, 24, 40)):
    return np.full((*shape, 3), color, np.uint8)


def holds(sheet, picture):
    """Whether the picture stands in the sheet, pixel for pixel."""
    height, width = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (height, width))
    tops, lefts = np.nonzero(windows[..., 0, 0] == picture[0, 0, 0])
    views = (sheet[t : t + height, x : x + width] for t, x in zip(tops, lefts, strict=True))
    return any(np.array_equal(view, picture) for view in views)


def place(picture, color):
    """(row, column) of the middle of what has this colour."""
    return np.argwhere((picture == color).all(axis=-1)).mean(axis=0)


def test_a_profile_is_the_line_of_every_frame():
    frames = noise()
    assert np.array_equal(temporal_profile(frames, row=7)[3], frames[3, 7])
    assert np.array_equal(temporal_profile(frames, column=9)[:, 3], frames[3, :, 9])
    assert temporal_profile(frames, row=0).shape == (5, 40, 3)
    assert temporal_profile(frames, column=0).shape == (24, 5, 3)


def test_a_still_clip_has_a_profile_that_does_not_change():
    still = np.repeat(noise()[:1], 6, axis=0)
    profile = temporal_profile(still, column=11)
    assert (profile == profile[:, :1]).all()


@pytest.mark.parametrize("line", [{}, {"row": 1, "column": 1}, {"row": 24}, {"column": 40}, {"row": -1}])
def test_a_line_that_is_not_there_is_refused(line):
    with pytest.raises(ValueError, match="expected"):
        temporal_profile(noise(), **line)


@pytest.mark.parametrize(("line", "axis"), [({"row": 5}, 0), ({"column": 8}, 1)])
def test_the_profile_figure_holds_every_strip_and_the_marked_frame(line, axis):
    clips = {"ours": noise(1), "Target": noise(2)}
    sheet = draw_temporal_profiles(clips, frame_pixels=3, **line)
    for clip in clips.values():
        assert holds(sheet, np.repeat(temporal_profile(clip, **line), 3, axis=axis))
    marked = noise(2)[2]
    np.moveaxis(marked, axis, 0)[line.get("row", line.get("column")) - 1 :][:2] = figures._MARK
    assert holds(sheet, marked)


def test_clips_of_other_shapes_have_no_common_profile():
    with pytest.raises(ValueError, match="one shape"):
        draw_temporal_profiles({"a": noise(), "b": noise(shape=(5, 24, 41, 3))}, row=1)
    with pytest.raises(ValueError, match="'c'"):
        draw_temporal_profiles({"a": noise()}, row=1, shown="c")


def test_the_grid_has_a_row_per_method_and_a_column_per_frame():
    ours, theirs = noise(1), noise(2)
    sheet = draw_comparison_grid({"ours": ours, "theirs": theirs}, frames=(0, 3), height=24)
    for clip in (ours, theirs):
        assert holds(sheet, clip[0]) and holds(sheet, clip[3]) and not holds(sheet, clip[1])
    more = draw_comparison_grid({"ours": ours, "theirs": theirs}, frames=(0, 3, 4), height=24)
    assert more.shape[0] == sheet.shape[0] and more.shape[1] == sheet.shape[1] + 40 + figures._GAP


def test_the_grid_goes_from_sketch_to_target_with_the_reference_beside():
    sheet = draw_comparison_grid(
        {"ours": flat((10, 200, 10)), "theirs": flat((10, 10, 200))},
        sketch=np.full((5, 24, 40), 90, np.uint8),
        target=flat((200, 10, 10)),
        reference=flat((200, 200, 10))[0],
        frames=3,
    )
    places = [place(sheet, c) for c in ((90, 90, 90), (10, 200, 10), (10, 10, 200), (200, 10, 10))]
    rows, columns = np.transpose(places)
    assert (np.diff(rows) > 160).all() and np.ptp(columns) == 0
    reference = place(sheet, (200, 200, 10))
    assert reference[0] == rows[0] and reference[1] < columns[0]


def test_frames_keep_their_shape_at_the_grids_height():
    sheet = draw_comparison_grid({"ours": flat((10, 200, 10), (2, 60, 90))}, frames=(1,), height=120)
    rows, columns = np.nonzero((sheet == (10, 200, 10)).all(axis=-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (120, 180)


@pytest.mark.parametrize("name", ["", "x" * 200, "名前", "a\nb", "$x_1$"])
def test_any_name_fits(name):
    sheet = draw_comparison_grid({name: noise()}, frames=(0,), height=24)
    assert sheet.shape[1] < 300 and holds(sheet, noise()[0])


def test_frames_that_are_not_there_and_clips_that_differ_are_refused():
    with pytest.raises(ValueError, match="0 to 4"):
        draw_comparison_grid({"ours": noise()}, frames=(5,))
    with pytest.raises(ValueError, match="'ours': 5, 'Target': 4"):
        draw_comparison_grid({"ours": noise()}, target=noise()[:4])
    with pytest.raises(ValueError, match="float32"):
        draw_comparison_grid({"ours": noise().astype(np.float32)})


SPACED = [(49, 4, [0, 16, 32, 48]), (3, 6, [0, 1, 2]), (5, 1, [0])]


@pytest.mark.parametrize(("length", "count", "numbers"), SPACED)
def test_frames_are_spaced_evenly(length, count, numbers):
    assert evenly_spaced(length, count) == numbers


def test_tiled_clips_play_at_once():
    clips = {"ours": noise(1), "Target": noise(2), "Sketch": noise(3, (5, 24, 40))}
    tiled = tile_clips(clips, height=24, columns=2)
    assert len(tiled) == 5 and tiled.shape[1] % 2 == tiled.shape[2] % 2 == 0
    for number in (0, 4):
        assert all(holds(tiled[number], clip) for clip in (noise(1)[number], noise(2)[number]))
    with pytest.raises(ValueError, match="one number"):
        tile_clips({"a": noise(), "b": noise()[:2]}, height=24, columns=2)


def test_a_png_is_what_was_drawn(tmp_path):
    sheet = draw_temporal_profiles({"ours": noise()}, row=3)
    write_png(tmp_path / "figures" / "profile.png", sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "figures" / "profile.png")), sheet)
