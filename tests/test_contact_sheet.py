import dataclasses
import io

import numpy as np
import pytest
from cartoons import cartoon, stream
from PIL import Image, ImageFont

from data_pipeline import contact_sheet
from data_pipeline.contact_sheet import Entry, clip_entry, draw_contact_sheet
from data_pipeline.curation import CurationConfig, curate_video, decide

RED, BLUE = (200, 20, 30), (20, 30, 200)


def flat(color, height=90, width=160):
    return np.full((height, width, 3), color, np.uint8)


def place(picture, color):
    """(row, column) of the middle of what has this colour in the sheet."""
    return np.argwhere((picture == color).all(axis=-1)).mean(axis=0)


def test_kept_clips_stand_above_dropped_ones(tmp_path):
    entries = [Entry(("b",), flat(RED), None, False), Entry(("a",), flat(BLUE), None, True)]
    draw_contact_sheet(entries, tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert place(picture, BLUE)[0] < place(picture, contact_sheet._DROPPED)[0] < place(picture, RED)[0]


@pytest.mark.parametrize("shape", [(90, 160), (1080, 1920), (300, 100), (40, 400)])
def test_frame_and_sketch_stand_side_by_side_in_their_shape(shape):
    file = io.BytesIO()
    draw_contact_sheet([Entry(("a",), flat(BLUE, *shape), np.full(shape, 7, np.uint8), True)], file)
    picture = np.asarray(Image.open(file))
    frame, sketch = ((picture == color).all(axis=-1) for color in (BLUE, (7, 7, 7)))
    rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
    assert len(columns) / len(rows) == pytest.approx(shape[1] / shape[0], rel=0.02)
    assert np.array_equal(rows, np.flatnonzero(sketch.any(axis=1)))
    assert columns[-1] < np.flatnonzero(sketch.any(axis=0))[0]


@pytest.mark.parametrize("count", [0, 1, 5, 48])
def test_any_number_of_clips_fits(count):
    file = io.BytesIO()
    lines = ("a/very/long/" + "name" * 40, "words " * 60)
    draw_contact_sheet([Entry(lines, flat(BLUE), None, index % 3 > 0) for index in range(count)], file)
    picture = np.asarray(Image.open(file))
    assert (picture[-contact_sheet._MARGIN :] == contact_sheet._BACK).all()
    assert (picture[:, -contact_sheet._MARGIN + 1 :] == contact_sheet._BACK).all()
    assert (picture == BLUE).all(axis=-1).any() == (count > 0)


def test_long_lines_are_wrapped_without_loss():
    font = ImageFont.load_default(14)
    for line in ("words of a sentence " * 9, "x" * 300, "", "a " + "y" * 99):
        parts = contact_sheet._wrap(line, font, 200)
        assert "".join(parts).replace(" ", "") == line.replace(" ", "")
        assert all(font.getlength(part.rstrip()) <= 200 for part in parts)


def test_a_clip_shows_its_scores_or_why_it_is_dropped():
    config = CurationConfig(min_side=96, max_text=None)
    (clip,) = curate_video(stream(cartoon(1)), "a.mp4", config, lambda frames: 0.25)
    kept = clip_entry(dataclasses.replace(clip, aesthetic=5.5), flat(BLUE))
    assert kept.kept and kept.lines[0] == clip.name and "17 frames, 24 fps, 144 x 256" in kept.lines[1]
    for score in (f"{clip.motion:.2f}", "0.25", f"{clip.contrast:.0f}", "5.50"):
        assert score in " ".join(kept.lines[2:])
    gone = clip_entry(decide(clip, CurationConfig(min_frames=20)), flat(BLUE))
    assert not gone.kept and "short: 17 frames, at least 20 wanted" in gone.lines


def test_the_title_says_how_many_clips_the_entries_stand_for(tmp_path):
    sheets = []
    for totals in (None, {"kept": 1, "dropped": 0}, {"kept": 1234, "dropped": 0}):
        file = io.BytesIO()
        draw_contact_sheet([Entry(("a",), flat(BLUE), None, True)], file, totals)
        sheets.append(file.getvalue())
    assert sheets[0] == sheets[1] != sheets[2]
