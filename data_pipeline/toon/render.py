"""Turns a drawing into frames with OpenCV.

Paint and line art go into one image of four channels, red, green, blue and sketch, so that every stroke is
drawn once and both show exactly the same shapes.
"""

import cv2
import numpy as np

from data_pipeline.toon.drawing import FILL, LOOP, SPOT

_SHIFT = 4  # fractional bits of OpenCV's coordinates: sixteenths of a pixel
_CHUNK = 32  # frames whose points are computed together
_STRIP = 2**23  # bytes of the frames that are drawn together: they are to stay in the processor's cache
_LINE_WIDTH = 0.0062  # of the shorter side: one pixel up to 240, two at 320, three at 480
_SMALLEST = 1.6  # pixels: what is smaller is left out
_SHADOW = (0.68, 0.66, 0.80)  # what a shadow leaves of red, green and blue


def render(drawing, frames, height, width, palette, tint=None, shadow=None, groups=()):
    """Draws all frames.

    Args:
        drawing: `Drawing`.
        frames: how many.
        palette: has `color(slot, tone)` -> three levels.
        tint: [T, 3] factors of the paint's red, green and blue, or None.
        shadow: [T, K, 2] corners, in pixels, of a shadow that passes over everything, or None.
        groups: (start, stop) numbers of curves.

    Returns:
        color [T, H, W, 3] uint8, sketch [T, H, W] uint8, and bool [T, G]: in which frames a point of each
        group lies inside the frame.
    """
    curves = drawing.finish()
    strokes, calls, still = _calls(drawing, curves, palette, _LINE_WIDTH * min(height, width))
    color = np.empty((frames, height, width, 3), np.uint8)
    sketch = np.empty((frames, height, width), np.uint8)
    inside = np.empty((frames, len(groups)), bool)
    together = min(frames, _CHUNK, max(1, _STRIP // (4 * height * width)))
    strip = np.empty((together, height, width, 4), np.uint8)
    backdrop = np.full((1, height, width, 4), 255, np.uint8)
    for start in range(0, frames, _CHUNK):
        stop = min(start + _CHUNK, frames)
        places = curves.vertices(start, stop)
        low, high = _bounds(curves.spans, places)  # [T, P, 2]
        shown, within = _shown(strokes, calls, low, high, (height, width), start, stop)
        for group, (first, last) in enumerate(groups):
            hit = (high[:, first:last] > 0) & (low[:, first:last] < (width, height))
            inside[start:stop, group] = hit.all(axis=2).any(axis=1)
        places *= 2**_SHIFT
        places = places.round(out=places).astype(np.int32)
        if start == 0:
            _draw(backdrop, places[:1], calls[:still], shown[:1, :still], within[:1, :still])
        for first in range(start, stop, together):
            part = slice(first - start, min(first + together, stop) - start)
            image = strip[: part.stop - part.start]
            image[:] = backdrop
            _draw(image, places[part], calls[still:], shown[part, still:], within[part, still:])
            tall, done = image.reshape(-1, width, 4), slice(first, first + len(image))
            cv2.cvtColor(tall, cv2.COLOR_RGBA2RGB, dst=color[done].reshape(-1, width, 3))
            cv2.extractChannel(tall, 3, dst=sketch[done].reshape(-1, width))
    if tint is not None:
        _dim(color, tint)
    if shadow is not None:
        table = _tables(_SHADOW)[None]
        for frame, corners in zip(color, shadow, strict=True):
            _shade(frame, corners, table)
    return color, sketch, inside


def _calls(drawing, curves, palette, unit):
    """What is drawn.

    Returns:
        the strokes of which anything is left, their calls (kind, spans, colour, thickness), and how many of
        them, from the first on, are the same in all frames.
    """
    strokes, calls, colors, still = [], [], {}, 0
    count_still = drawing.count_still(curves.bones)
    for index, stroke in enumerate(drawing.strokes):
        spans = [curves.spans[piece] for piece in stroke.pieces if curves.spans[piece] is not None]
        if spans:
            still += index < count_still
            if stroke.paint not in colors:
                colors[stroke.paint] = [float(level) for level in palette.color(*stroke.paint)]
            color = (*colors[stroke.paint], 0.0 if stroke.in_sketch else 255.0)
            kind = stroke.kind
            if kind == SPOT and stroke.paint[1] in ("shade", "deep") and unit < 1.5:
                kind = FILL  # in small frames nobody sees how smooth the edge of a shadow is
            strokes.append(stroke)
            calls.append((kind, spans, color, max(1, round(unit * stroke.weight))))
    return strokes, calls, still


def _draw(frames, places, calls, shown, within):
    """Draws strokes into frames, each in all frames at once.

    The frames lie below one another, as one tall image: what is within the upper and lower edges of its
    frame cannot touch another one. The rest is drawn frame by frame.

    Args:
        frames: [T, H, W, 4].
        places: [T, N, 2] int32, in sixteenths of a pixel.
        shown, within: bool [T, S]: whether a stroke is to be drawn, and is within those edges.
    """
    count, height, width, _ = frames.shape
    tall = frames.reshape(count * height, width, 4)
    lower = places.copy()
    lower[..., 1] += (np.arange(count, dtype=np.int32) * (height << _SHIFT))[:, None]
    whole, together = (shown & within).all(axis=0).tolist(), (shown & within).any(axis=0).tolist()
    apart = [[] for _ in calls]
    for stroke, index in np.argwhere((shown & ~within).T).tolist():
        apart[stroke].append(index)
    for stroke, call in enumerate(calls):
        spans = call[1]
        if whole[stroke]:
            _paint(tall, [points for first, last in spans for points in lower[:, first:last]], call)
            continue
        if together[stroke]:
            part = lower[shown[:, stroke] & within[:, stroke]]
            _paint(tall, [points for first, last in spans for points in part[:, first:last]], call)
        for index in apart[stroke]:
            _paint(frames[index], [places[index, first:last] for first, last in spans], call)


def _paint(image, points, call):
    kind, _, color, thickness = call
    if kind == FILL:
        cv2.fillPoly(image, points, color, cv2.LINE_8, _SHIFT)
    elif kind == SPOT:
        cv2.fillPoly(image, points, color, cv2.LINE_AA, _SHIFT)
    else:
        cv2.polylines(image, points, kind == LOOP, color, thickness, cv2.LINE_AA, _SHIFT)


def _bounds(spans, places):
    """The lowest and the highest coordinates [T, P, 2] of every piece; of nothing, infinity."""
    order = sorted((span[0], piece) for piece, span in enumerate(spans) if span is not None)
    starts, pieces = (list(column) for column in zip(*order, strict=True))
    bounds = []
    for reduce, nothing in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        bound = np.full((len(places), len(spans), 2), nothing, np.float32)
        bound[:, pieces] = reduce.reduceat(places, starts, axis=1)
        bounds.append(bound)
    return bounds


def _shown(strokes, calls, low, high, size, start, stop):
    """Which strokes are to be drawn, and lie within the upper and lower edges of the frame: bool [T, S] each.

    Drawn is what is visible and touches the frame with any of its pieces.
    """
    height, width = size
    (left, top), (right, bottom) = np.moveaxis(low, 2, 0), np.moveaxis(high, 2, 0)
    touches = (right > -4) & (left < width + 4) & (bottom > -4) & (top < height + 4)
    touches &= (right - left > _SMALLEST) | (bottom - top > _SMALLEST)
    edge = 2 + max(thickness for _, _, _, thickness in calls)  # what a line adds on either side, and more
    fits = (top >= edge) & (bottom <= height - edge)
    pieces = [piece for stroke in strokes for piece in stroke.pieces]
    first = np.cumsum([0] + [len(stroke.pieces) for stroke in strokes[:-1]])
    shown = np.logical_or.reduceat(touches[:, pieces], first, axis=1)
    within = np.logical_and.reduceat(fits[:, pieces], first, axis=1)
    for index, stroke in enumerate(strokes):
        if stroke.visible is not None:
            shown[:, index] &= stroke.visible[start:stop]
    return shown, within


def _tables(factors):
    """What becomes of every level [..., 256, 3] with factors [..., 3] of red, green and blue."""
    levels = np.arange(256)[:, None] * np.asarray(factors)[..., None, :]
    return levels.clip(0, 255).round().astype(np.uint8)


def _dim(color, tint):
    """Multiplies frames [T, H, W, 3] by factors [T, 3], in place."""
    for frame, table in zip(color, _tables(tint), strict=True):
        cv2.LUT(frame, table[None], dst=frame)


def _shade(color, corners, table):
    """A cel shadow over the painted frame, in place; `table` as by `_tables`."""
    mask = np.zeros(color.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(corners * 2**_SHIFT).astype(np.int32)], 1, cv2.LINE_8, _SHIFT)
    cv2.copyTo(cv2.LUT(color, table), mask, color)
