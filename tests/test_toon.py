"""The cartoon generator: seeds, palettes, sizes, line art, captions."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from animecolor_jax import media
from animecolor_jax.errors import InputError
from data_pipeline.toon import ToonConfig, draw_clip, draw_subtitle, render
from data_pipeline.toon.palette import Palette
from data_pipeline.toon.shapes import box, crescent, curves, ellipse

TOOL = Path(__file__).parents[1] / "tools" / "draw_toons.py"
COLOR_WORDS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|gold(en)?|silver|blonde?|dark"
    r"|bright|pale|colou?r(ed|ful|s)?)\b"
)


@pytest.fixture(scope="module")
def clips():
    """Forty seeds, small and short."""
    return [draw_clip(num_frames=9, height=64, width=96, seed=seed) for seed in range(40)]


def luma(frames):
    return frames @ np.array([0.299, 0.587, 0.114])


def test_default_clip_has_the_size_of_the_tiny_preset():
    clip = draw_clip()
    assert clip.color.shape == (17, 96, 160, 3) and clip.color.dtype == np.uint8
    assert clip.sketch.shape == (17, 96, 160) and clip.sketch.dtype == np.uint8
    np.testing.assert_array_equal(clip.reference, clip.color[0])
    np.testing.assert_array_equal(clip.line_art, np.stack([clip.sketch] * 3, axis=-1))


def test_same_seed_draws_the_same_pixels(clips):
    for seed in (0, 7, 23):
        again = draw_clip(num_frames=9, height=64, width=96, seed=seed)
        np.testing.assert_array_equal(again.color, clips[seed].color)
        np.testing.assert_array_equal(again.sketch, clips[seed].sketch)
        assert again.caption == clips[seed].caption and again.entries == clips[seed].entries


def test_seeds_draw_different_clips(clips):
    assert len({clip.sketch.tobytes() for clip in clips}) == len(clips)
    assert len({clip.caption for clip in clips}) == len(clips)


def test_a_palette_changes_all_colours_and_nothing_else():
    for seed in range(8):
        one, other = (draw_clip(4, 64, 96, seed=seed, palette_seed=palette) for palette in (1, 2))
        np.testing.assert_array_equal(one.sketch, other.sketch)
        assert one.caption == other.caption and one.entries == other.entries
        assert np.abs(one.color.astype(int) - other.color).mean() > 10


def test_colours_do_not_follow_from_the_shapes():
    """A name's colour depends on the palette's seed alone, and varies widely with it."""
    palettes = [Palette(seed) for seed in range(200)]
    hair = np.array([palette.color("figure0/hair") for palette in palettes])
    again = np.array([Palette(seed).color("figure0/hair") for seed in range(200)])
    np.testing.assert_array_equal(hair, again)
    assert len(np.unique(hair // 32, axis=0)) > 60, "hair has any colour"
    sky = luma(np.array([palette.color("place/sky") for palette in palettes]))
    assert sky.min() < 90 and sky.max() > 220, "by day and by night"


@pytest.mark.parametrize(
    "height, width", [(16, 16), (33, 71), (64, 96), (120, 48), (40, 400), (1080, 1920), (1920, 1080)]
)
def test_any_size_can_be_drawn(height, width):
    clip = draw_clip(2, height, width, seed=3)
    assert clip.color.shape == (2, height, width, 3) and clip.sketch.shape == (2, height, width)
    assert clip.sketch.min() < 100


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 100])
def test_any_length_can_be_drawn(frames):
    assert draw_clip(frames, 32, 48, seed=frames).color.shape == (frames, 32, 48, 3)


def test_frames_are_drawn_in_chunks_without_a_seam(monkeypatch):
    whole = draw_clip(9, 48, 80, seed=5)
    monkeypatch.setattr(render, "_CHUNK", 4)
    chunked = draw_clip(9, 48, 80, seed=5)
    np.testing.assert_array_equal(whole.color, chunked.color)
    np.testing.assert_array_equal(whole.sketch, chunked.sketch)
    assert whole.entries == chunked.entries


def test_frames_drawn_together_are_the_same_as_one_by_one(monkeypatch):
    together = [draw_clip(9, 48, 80, seed=seed) for seed in range(12)]
    monkeypatch.setattr(render, "_STRIP", 1)
    for seed, clip in enumerate(together):
        alone = draw_clip(9, 48, 80, seed=seed)
        np.testing.assert_array_equal(alone.color, clip.color)
        np.testing.assert_array_equal(alone.sketch, clip.sketch)


def test_a_larger_frame_shows_the_same_drawing():
    small, large = draw_clip(1, 96, 160, seed=2), draw_clip(1, 384, 640, seed=2)
    shrunk = cv2.resize(large.color[0], (160, 96), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - small.color[0]).mean() < 8


def test_every_clip_moves(clips):
    for clip in clips:
        changes = np.abs(np.diff(clip.color.astype(int), axis=0)).max(axis=(1, 2, 3))
        assert (changes > 20).mean() > 0.5


def test_more_motion_moves_more(clips):
    def amount(motion):
        config = ToonConfig(motion=motion, lighting=0)
        clips = [draw_clip(9, 64, 96, seed=seed, config=config) for seed in range(10)]
        return np.mean([np.abs(np.diff(clip.color.astype(int), axis=0)).mean() for clip in clips])

    still, usual, wild = (amount(motion) for motion in (0.2, 1.0, 3.0))
    assert still < 0.8 * usual and usual < 0.8 * wild


def test_characters_enter_late_when_asked_to(clips):
    assert all(clip.entries[0] == 0 for clip in clips), "the reference shows somebody"
    assert 3 < sum(max(clip.entries) > 0 for clip in clips) < 30
    late = [draw_clip(17, 64, 96, seed=seed, config=ToonConfig(late_entry=1.0)) for seed in range(20)]
    for clip in late:
        assert all(0 < entry < 17 for entry in clip.entries[1:])
        assert clip.caption.count(" in from the ") == len(clip.entries) - 1
    never = [draw_clip(9, 64, 96, seed=seed, config=ToonConfig(late_entry=0.0)) for seed in range(10)]
    assert not any("in from the" in clip.caption for clip in never)


def test_numbers_of_characters_are_as_asked(clips):
    assert {len(clip.entries) for clip in clips} == {1, 2, 3}
    one = ToonConfig(max_characters=1)
    assert all(len(draw_clip(1, 32, 48, seed=seed, config=one).entries) == 1 for seed in range(10))


def test_changes_of_light_are_not_in_the_line_art():
    dusk = 0
    for seed in range(30):
        lit = draw_clip(9, 48, 80, seed=seed, config=ToonConfig(lighting=1.0))
        assert re.search("The light fades|The light changes suddenly|A shadow passes", lit.caption)
        if "fades" in lit.caption:
            dusk += 1
            level = luma(lit.color).mean(axis=(1, 2))
            assert level[-1] < 0.95 * level[0]
    assert dusk > 3


def test_sketch_is_dark_lines_on_white():
    sketches = [draw_clip(1, 192, 320, seed=seed).sketch for seed in range(20)]
    assert all(np.median(sketch) == 255 and sketch.min() == 0 for sketch in sketches)
    covered = [(sketch < 128).mean() for sketch in sketches]
    assert 0.04 < np.mean(covered) < 0.15 and max(covered) < 0.25


def test_lines_lie_on_the_painted_outlines(clips):
    """Where the sketch has a line, the painted frame is darker than the flat colours beside it."""
    darker = []
    for seed in range(12):
        clip = draw_clip(2, 192, 320, seed=seed, config=ToonConfig(lighting=0))
        lines = clip.sketch < 60
        beside = np.zeros_like(lines)
        for axis in (1, 2):
            for step in (-3, 3):
                beside |= np.roll(lines, step, axis)
        beside &= clip.sketch > 250
        painted = luma(clip.color)
        darker.append(painted[lines].mean() / painted[beside].mean())
    assert max(darker) < 0.8 and np.mean(darker) < 0.6


def test_outside_the_lines_colours_are_flat():
    """A hundred colours cover nearly all of it: fills and their shadows."""
    for seed in range(6):
        clip = draw_clip(1, 192, 320, seed=seed, config=ToonConfig(lighting=0))
        _, counts = np.unique(clip.color[clip.sketch == 255], axis=0, return_counts=True)
        assert np.sort(counts)[::-1][:100].sum() > 0.97 * counts.sum()


def test_captions_say_what_is_shown_without_colours(clips):
    for clip in clips:
        words = re.findall("[a-z]+", clip.caption.lower())
        assert len(words) >= 5 and clip.caption[0].isupper() and clip.caption.endswith(".")
        assert not COLOR_WORDS.search(clip.caption.lower())
    words = " ".join(clip.caption for clip in clips)
    for word in ("girl", "boy", "walks", "runs", "hair", "room", "street", "camera"):
        assert word in words


@pytest.mark.parametrize(
    "arguments, where",
    [
        ({"num_frames": 0}, "num_frames"), ({"height": -1}, "height"), ({"width": 0}, "width"),
        ({"fps": float("nan")}, "fps"), ({"seed": -1}, "seed"), ({"palette_seed": -3}, "palette_seed"),
    ],
)
def test_impossible_clips_are_refused(arguments, where):
    with pytest.raises(InputError) as caught:
        draw_clip(**arguments)
    assert caught.value.where == where


@pytest.mark.parametrize("values", [{"max_characters": 0}, {"late_entry": 1.5}, {"motion": -1}])
def test_impossible_configs_are_refused(values):
    with pytest.raises(InputError, match=f"ToonConfig.{next(iter(values))}"):
        ToonConfig(**values)


def test_curves_pass_through_their_control_points():
    points, bounds = curves([(ellipse(3, 4, 2, 1), True, 50.0), (box(0, 0, 2, 1), True, 50.0)])
    round_, square = (points[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
    for x, y, *_ in ellipse(3, 4, 2, 1):
        assert np.hypot(round_[:, 0] - x, round_[:, 1] - y).min() < 1e-12
    radius = np.hypot((round_[:, 0] - 3) / 2, round_[:, 1] - 4)
    assert np.abs(radius - 1).max() < 0.03 and len(round_) > 16
    np.testing.assert_array_equal(square[:, :2], box(0, 0, 2, 1)[:, :2])


def test_the_shadow_of_a_disc_lies_inside_and_away_from_the_light():
    points, _ = curves([(ellipse(0, 0, 1, 1), True, 100.0)])
    for light in ((0.3, 0.0), (-0.2, -0.2)):
        for way in (points, points[::-1]):
            dark = crescent(way, light)
            assert np.hypot(dark[:, 0], dark[:, 1]).max() < 1.03
            assert dark[:, :2].mean(axis=0) @ light < -0.1


def test_subtitles_change_a_strip_and_leave_the_rest():
    frames = draw_clip(3, 192, 320, seed=1).color
    for seed in range(8):
        titled = draw_subtitle(frames, "I told you not to open that door.", np.random.default_rng(seed))
        assert titled.shape == frames.shape and titled.dtype == np.uint8
        changed = (titled != frames).any(axis=(0, 2, 3))
        rows = np.flatnonzero(changed)
        assert 8 < len(rows) < 80 and (rows.max() < 90 or rows.min() > 100)
    again = draw_subtitle(frames, "I told you not to open that door.", np.random.default_rng(7))
    np.testing.assert_array_equal(titled, again)


def test_long_words_are_shrunk_into_the_frame():
    frames = np.full((1, 48, 64, 3), 128, np.uint8)
    titled = draw_subtitle(frames, "Incomprehensibilities everywhere", np.random.default_rng(0))
    assert (titled[:, :, :1] == frames[:, :, :1]).all() and (titled != frames).any()


def test_empty_subtitles_are_refused():
    with pytest.raises(InputError, match="text: is empty"):
        draw_subtitle(np.zeros((1, 32, 32, 3), np.uint8), " ", np.random.default_rng(0))


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("tools_draw_toons", TOOL)
    module = sys.modules["tools_draw_toons"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_writes_clips_captions_and_line_art_and_skips_what_is_there(tool, tmp_path):
    lines = tmp_path / "lines"
    args = tool.Arguments(tmp_path / "toons", clips=2, size="64x96", frames=5, sketch=lines, seed=8)
    report, holds = tool.run(args)
    assert holds and report["drawn"] == 2 and report["skipped"] == 0
    json.dumps(report, allow_nan=False)
    names = [path.name for path in sorted(args.out.iterdir())]
    assert names == [f"toon0000{seed}{end}" for seed in (8, 9) for end in (".mp4", ".txt")]
    clip = draw_clip(5, 64, 96, seed=9)
    video = media.read_video(args.out / "toon00009.mp4")
    assert video.frames.shape == clip.color.shape and video.fps == 24
    assert np.abs(luma(video.frames) - luma(clip.color)).mean() < 3  # colours are halved in size
    np.testing.assert_array_equal(media.read_video(lines / "toon00009.mkv").frames, clip.line_art)
    assert (args.out / "toon00009.txt").read_text().strip() == clip.caption
    (args.out / "toon00008.txt").unlink()
    assert tool.run(args)[0] == {**report, "drawn": 1, "skipped": 1}


def test_tool_refuses_impossible_arguments(tool, tmp_path):
    usual = {"clips": 1, "size": "16x16", "frames": 1}
    for change in (
        {"clips": 0}, {"size": "64"}, {"frames": 0}, {"seed": -1}, {"late_entry": 2.0}, {"fps": 0.0},
        {"sketch": tmp_path / "toons" / "lines"},
    ):
        with pytest.raises(InputError):
            tool.run(tool.Arguments(tmp_path / "toons", **{**usual, **change}))
    assert not (tmp_path / "toons").exists()
