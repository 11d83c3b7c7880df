"""The paper's figures: temporal profiles (its Fig. 5) and grids of frames, methods below each other."""

import math

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from animecolor_jax.replacing import replacing

_PAPER, _INK, _EDGE, _MARK = (255, 255, 255), (34, 38, 46), (205, 210, 217), (222, 45, 38)
_MARGIN, _GAP = 12, 6
_TEXT_SIZE = 15
_LINE = 24  # pixels that a line of text takes
_STRIP = 200  # pixels that a temporal profile is long, at least
_LABEL_WIDTH = 170  # pixels at most, for the labels of a grid's rows


def temporal_profile(frames, *, row=None, column=None):
    """One row or column of pixels of every frame, side by side in time: flicker shows as stripes.

    Args:
        frames: [T, H, W, 3] uint8.
        row, column: exactly one of them, in pixels from the top or the left.

    Returns:
        [T, W, 3] of a row, time downwards; [H, T, 3] of a column, time to the right.

    Raises:
        ValueError: both or neither are given, or the frames have no such row or column.
    """
    if (row is None) == (column is None):
        raise ValueError(f"row {row} and column {column}: exactly one of them is expected")
    axis, position = (1, row) if column is None else (2, column)
    if not 0 <= position < frames.shape[axis]:
        name = "row" if column is None else "column"
        raise ValueError(f"{name} {position}, expected one of 0 to {frames.shape[axis] - 1}")
    lines = np.take(frames, position, axis=axis)  # [T, W, 3] or [T, H, 3]
    return lines if column is None else lines.swapaxes(0, 1)


def draw_temporal_profiles(clips, *, row=None, column=None, frame_pixels=None, shown=None):
    """The temporal profiles of several clips with their names, after a frame with the line marked.

    Profiles of a column stand side by side, those of a row below each other.

    Args:
        clips: {label: [T, H, W, 3] uint8} of one shape, such as the methods and the target.
        row, column: exactly one of them, in pixels.
        frame_pixels: width of each frame's line; default: such that a profile is at least 200 pixels long.
        shown: label of the clip whose middle frame is marked; default: the last one.

    Returns:
        [h, w, 3] uint8.

    Raises:
        ValueError: the shapes differ, `shown` is none of the labels, or as `temporal_profile` does.
    """
    shapes = {label: frames.shape for label, frames in clips.items()}
    if not shapes or len(set(shapes.values())) > 1:
        raise ValueError(f"clips are {shapes}, expected at least one, all of one shape")
    shown = list(clips)[-1] if shown is None else shown
    if shown not in clips:
        raise ValueError(f"shown {shown!r}, expected one of {list(clips)}")
    middle = len(clips[shown]) // 2
    frame_pixels = frame_pixels or -(-_STRIP // len(clips[shown]))
    cells = {f"{shown}, frame {middle}": _marked(clips[shown][middle], row, column)}
    for label, frames in clips.items():
        strip = temporal_profile(frames, row=row, column=column)
        cells[label] = np.repeat(strip, frame_pixels, axis=0 if column is None else 1)
    return tile(cells, 1 if column is None else len(cells))


def draw_comparison_grid(methods, *, frames=6, sketch=None, target=None, reference=None, height=160):
    """Frames of several clips: a row per method, a column per frame; sketch first, target last.

    Args:
        methods: {label: [T, H, W, 3] uint8}.
        frames: how many, evenly spaced from the first to the last; or their numbers.
        sketch, target: [T, H, W, 3] uint8, or None; the sketch also [T, H, W].
        reference: [H, W, 3] uint8 image, drawn to the left of the first row, or None.
        height: of each frame in pixels; sizes may differ, shapes are kept.

    Returns:
        [h, w, 3] uint8.

    Raises:
        ValueError: the clips differ in length, or lack one of the frames.
    """
    rows = {"Sketch": sketch, **methods, "Target": target}
    rows = {label: as_rgb(clip) for label, clip in rows.items() if clip is not None}
    lengths = {label: len(clip) for label, clip in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"clips have {lengths} frames, expected one number")
    length = next(iter(lengths.values()))
    numbers = evenly_spaced(length, frames) if isinstance(frames, int) else list(frames)
    if not numbers or not all(0 <= number < length for number in numbers):
        raise ValueError(f"frames {numbers}, expected numbers from 0 to {length - 1}")
    cells = {label: [_at_height(clip[n], height) for n in numbers] for label, clip in rows.items()}
    widths = [max(row[index].shape[1] for row in cells.values()) for index in range(len(numbers))]
    picture = None if reference is None else _at_height(as_rgb(reference[None])[0], height)
    font = ImageFont.load_default(_TEXT_SIZE)
    names = min(_LABEL_WIDTH, math.ceil(max(font.getlength(label) for label in rows))) + 2 * _GAP
    left = _MARGIN + (0 if picture is None else picture.shape[1] + 2 * _GAP)
    total = left + names + sum(widths) + _GAP * (len(widths) - 1) + _MARGIN
    sheet = Image.new("RGB", (total, 2 * _MARGIN + _LINE + len(rows) * (height + _GAP) - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if picture is not None:
        _write(draw, (_MARGIN, _MARGIN), "Reference", picture.shape[1])
        _paste(sheet, draw, picture, (_MARGIN, _MARGIN + _LINE))
    across = left + names
    for index, (number, width) in enumerate(zip(numbers, widths, strict=True)):
        _write(draw, (across, _MARGIN), f"frame {number}", width)
        for order, (label, pictures) in enumerate(cells.items()):
            top = _MARGIN + _LINE + order * (height + _GAP)
            if index == 0:
                _write(draw, (left, top + (height - _LINE) // 2), label, names - _GAP)
            _paste(sheet, draw, pictures[index], (across, top))
        across += width + _GAP
    return np.asarray(sheet)


def tile(pictures, columns):
    """Pictures with their labels above them, `columns` in a row.

    Args:
        pictures: {label: [H, W, 3] uint8}, of any sizes.

    Returns:
        [h, w, 3] uint8, even sides.
    """
    (width, height), places = _layout([picture.shape[:2] for picture in pictures.values()], columns)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (label, picture), (left, top) in zip(pictures.items(), places, strict=True):
        _write(draw, (left, top - _LINE), label, picture.shape[1])
        _paste(sheet, draw, picture, (left, top))
    return np.asarray(sheet)


def tile_clips(clips, *, height, columns):
    """Clips that play at once, with their labels: [T, h, w, 3] uint8.

    Args:
        clips: {label: [T, H, W, 3] or [T, H, W] uint8} of one length.
        height: of each in pixels.

    Raises:
        ValueError: the lengths differ.
    """
    lengths = {label: len(clip) for label, clip in clips.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"clips have {lengths} frames, expected one number")
    small = {label: [_at_height(frame, height) for frame in as_rgb(clip)] for label, clip in clips.items()}
    first = tile({label: frames[0] for label, frames in small.items()}, columns)
    _, places = _layout([frames[0].shape[:2] for frames in small.values()], columns)
    tiled = np.repeat(first[None], next(iter(lengths.values())), axis=0)
    for frames, (left, top) in zip(small.values(), places, strict=True):
        rows, width = frames[0].shape[:2]
        tiled[:, top : top + rows, left : left + width] = frames
    return tiled


def write_png(path, picture):
    """Writes [H, W, 3] uint8 as a PNG that appears only when it is complete."""
    with replacing(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def evenly_spaced(length, count):
    """Up to `count` frame numbers from 0 to length - 1, both among them if there are two."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def as_rgb(frames):
    """[..., H, W, 3] of the same or of [..., H, W], uint8.

    Raises:
        ValueError: anything else.
    """
    if frames.dtype == np.uint8 and frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        found = f"{frames.dtype} {frames.shape}"
        raise ValueError(f"frames are {found}, expected uint8 [T, H, W, 3] or [T, H, W]")
    return frames


def _layout(shapes, columns):
    """(width, height) of the sheet and (left, top) of each picture, row by row."""
    places, top, total = [], _MARGIN, 0
    for start in range(0, len(shapes), columns):
        row = shapes[start : start + columns]
        left, top = _MARGIN, top + _LINE
        for _, width in row:
            places.append((left, top))
            left += width + _GAP
        total, top = max(total, left - _GAP + _MARGIN), top + max(height for height, _ in row) + _GAP
    height = top - _GAP + _MARGIN
    return (total + total % 2, height + height % 2), places


def _marked(frame, row, column):
    """The frame with a line over its row or column."""
    frame = frame.copy()
    thickness = max(2, frame.shape[0] // 120)
    start = max(0, (row if column is None else column) - thickness // 2)
    view = frame if column is None else frame.swapaxes(0, 1)
    view[start : start + thickness] = _MARK
    return frame


def _at_height(picture, height):
    """[H, W, 3] -> [height, W', 3] of the same shape."""
    size = max(1, round(picture.shape[1] * height / picture.shape[0])), height
    shrink = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(picture), size, interpolation=shrink)


def _paste(sheet, draw, picture, place):
    """Pastes a picture, with an edge around it: a sketch is white, as the sheet is."""
    left, top = place
    draw.rectangle((left - 1, top - 1, left + picture.shape[1], top + picture.shape[0]), outline=_EDGE)
    sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), place)


def _write(draw, place, text, width):
    """Writes one line, cut to `width` pixels."""
    font = ImageFont.load_default(_TEXT_SIZE)
    short = text = " ".join(text.split())
    while short and font.getlength(short) > width:
        text = text[:-1]
        short = text.rstrip() + "…" if text else ""
    draw.text((place[0], place[1] + _LINE // 2), short, _INK, font, anchor="lm")
