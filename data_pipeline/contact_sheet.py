"""A picture of what was kept and what was dropped: every clip's frame, its line art and its scores."""

from bisect import bisect_right
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
_PICTURE_HEIGHT, _PICTURE_WIDTH = 150, 240  # pixels that a frame or a sketch may fill
_MARGIN, _GAP = 24, 18
_TEXT_SIZE, _TITLE_SIZE = 14, 24
_LINE = 18  # pixels from one line of text to the next
_TEXT_LINES = 6  # of a cell at most
_BACK, _CARD, _TEXT, _FAINT = (238, 240, 243), (255, 255, 255), (38, 42, 50), (112, 118, 128)
_KEPT, _DROPPED = (38, 140, 84), (190, 62, 58)


class Entry(NamedTuple):
    """A cell of the sheet."""

    lines: tuple
    """Caption, the first line is the title; long lines are wrapped."""
    frame: np.ndarray
    """[H, W, 3] uint8 RGB."""
    sketch: np.ndarray | None
    """[h, w] uint8, 255 paper; or None."""
    kept: bool


def clip_entry(clip, frame, sketch=None):
    """The `Entry` of a `Clip` with its scores, or with the reasons why it is dropped."""
    height, width = clip.crop[2:]
    length = "image" if clip.is_image else f"{clip.num_frames} frames, {clip.fps:.4g} fps"
    lines = [clip.name, f"{length}, {height} x {width}"]
    if clip.kept:
        lines.append(f"motion {clip.motion:.2f} %/s, static {clip.static_share:.0%}, text {clip.text:.2f}")
        lines.append(f"brightness {clip.brightness:.0f}, contrast {clip.contrast:.0f}")
        if clip.aesthetic is not None:
            lines[-1] += f", aesthetic {clip.aesthetic:.2f}"
    else:
        lines += [f"{reason}: {clip.details.get(reason, '')}" for reason in clip.reasons]
    return Entry(tuple(lines), frame, sketch, clip.kept)


def draw_contact_sheet(entries, path, totals=None):
    """Draws the clips in a grid, kept ones first, and writes it as a PNG.

    Args:
        entries: `Entry`s in any order; some 48 make a sheet of about 2100 x 3300 pixels.
        path: file to write, or a binary file object.
        totals: {"kept": n, "dropped": n}, the clips that the entries stand for; default: the entries alone.
    """
    groups = [
        ("kept", _KEPT, [e for e in entries if e.kept]),
        ("dropped", _DROPPED, [e for e in entries if not e.kept]),
    ]
    text = ImageFont.load_default(_TEXT_SIZE)
    cell_width = 2 * _PICTURE_WIDTH + 2 * 8
    cell_height = _PICTURE_HEIGHT + _TEXT_LINES * _LINE + 20
    rows = [-(-len(group) // COLUMNS) for _, _, group in groups]
    width = 2 * _MARGIN + COLUMNS * (cell_width + _GAP) - _GAP
    height = 2 * _MARGIN + sum((_TITLE_SIZE + 20 + n * (cell_height + _GAP)) for n in rows)
    sheet = Image.new("RGB", (width, height), _BACK)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (name, color, group), count in zip(groups, rows, strict=True):
        total = len(group) if totals is None else totals[name]
        title = f"{len(group)} of {total} {name}" if total > len(group) else f"{total} {name}"
        draw.text((_MARGIN, top), title, color, ImageFont.load_default(_TITLE_SIZE))
        top += _TITLE_SIZE + 20
        for index, entry in enumerate(group):
            row, column = divmod(index, COLUMNS)
            corner = _MARGIN + column * (cell_width + _GAP), top + row * (cell_height + _GAP)
            _draw_cell(sheet, draw, corner, (cell_width, cell_height), entry, color, text)
        top += count * (cell_height + _GAP)
    sheet.save(path, format="PNG")


def _draw_cell(sheet, draw, corner, size, entry, color, font):
    (left, top), (width, height) = corner, size
    draw.rectangle((left, top, left + width, top + height), _CARD)
    draw.rectangle((left, top, left + width, top + 3), color)
    pictures = (
        [entry.frame] if entry.sketch is None else [entry.frame, np.repeat(entry.sketch[..., None], 3, -1)]
    )
    for index, picture in enumerate(pictures):
        small = _fit(picture)
        room = (_PICTURE_WIDTH - small.shape[1]) // 2, (_PICTURE_HEIGHT - small.shape[0]) // 2
        place = left + 6 + index * (_PICTURE_WIDTH + 4) + room[0], top + 9 + room[1]
        sheet.paste(Image.fromarray(small), place)
        edge = (place[0] - 1, place[1] - 1, place[0] + small.shape[1], place[1] + small.shape[0])
        draw.rectangle(edge, outline=(214, 218, 224))  # white paper on a white card
    wrapped = []
    for number, line in enumerate(entry.lines):
        fill = _TEXT if number == 0 else _FAINT if entry.kept or number == 1 else color
        wrapped += [(part, fill) for part in _wrap(line, font, width - 16)]
    if len(wrapped) > _TEXT_LINES:
        wrapped = [*wrapped[: _TEXT_LINES - 1], ("...", wrapped[-1][1])]
    for number, (part, fill) in enumerate(wrapped):
        draw.text((left + 8, top + _PICTURE_HEIGHT + 14 + number * _LINE), part, fill, font)


def _fit(picture):
    """[H, W, 3] -> the same inside the picture area, its shape kept."""
    height, width = picture.shape[:2]
    scale = min(_PICTURE_HEIGHT / height, _PICTURE_WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(picture), size, interpolation=shrink)


def _wrap(line, font, width):
    """Splits a line at spaces, and inside long words, so that it fits `width` pixels."""
    parts, rest = [], line
    while font.getlength(rest) > width:
        lengths = range(len(rest) + 1)
        end = max(1, bisect_right(lengths, width, key=lambda n, text=rest: font.getlength(text[:n])) - 1)
        space = rest.rfind(" ", 1, end + 1)
        end = space if space > 0 else end
        parts.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*parts, rest]
