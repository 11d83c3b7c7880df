"""Turns a drawing into frames with OpenCV.

Paint and line art go into one image of four channels, red, green, blue and sketch, so that every stroke is
drawn once and both show exactly the same shapes.
"""

import cv2
import numpy as np

from data_pipeline.toon.drawing import FILL, LOOP, SPOT

_SHIFT = 4  # fractional bits of OpenCV's coordinates: sixteenths of a pixel
_CHUNK = 32  # frames whose points are computed together
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
    image, backdrop = np.full((2, height, width, 4), 255, np.uint8)
    for start in range(0, frames, _CHUNK):
        stop = min(start + _CHUNK, frames)
        places = curves.vertices(start, stop)
        low, high = _bounds(curves.spans, places)  # [T, P, 2]
        touches = ((high > -4) & (low < (width + 4, height + 4))).all(axis=2)
        touches &= (high - low > _SMALLEST).any(axis=2)
        shown = _shown(strokes, touches, start, stop)
        for group, (first, last) in enumerate(groups):
            hit = (high[:, first:last] > 0) & (low[:, first:last] < (width, height))
            inside[start:stop, group] = hit.all(axis=2).any(axis=1)
        places = (places * 2**_SHIFT).round().astype(np.int32)
        if start == 0:
            _draw(backdrop, places[0], [calls[k] for k in range(still) if shown[0, k]])
        shown[:, :still] = False
        for index in range(start, stop):
            np.copyto(image, backdrop)
            now = shown[index - start].nonzero()[0].tolist()
            _draw(image, places[index - start], [calls[k] for k in now])
            cv2.cvtColor(image, cv2.COLOR_RGBA2RGB, dst=color[index])
            cv2.extractChannel(image, 3, dst=sketch[index])
            if tint is not None:
                color[index] = _dimmed(color[index], tint[index])
            if shadow is not None:
                _shade(color[index], shadow[index])
    return color, sketch, inside


def _calls(drawing, curves, palette, unit):
    """What is drawn.

    Returns:
        the strokes of which anything is left, their calls (kind, spans, colour, thickness), and how many of
        them, from the first on, are the same in all frames.
    """
    strokes, calls, colors, still = [], [], {}, 0
    count_still = drawing.count_still()
    for index, stroke in enumerate(drawing.strokes):
        spans = [curves.spans[piece] for piece in stroke.pieces if curves.spans[piece] is not None]
        if spans:
            still += index < count_still
            if stroke.paint not in colors:
                colors[stroke.paint] = palette.color(*stroke.paint)
            color = (*colors[stroke.paint], 0 if stroke.in_sketch else 255)
            kind = stroke.kind
            if kind == SPOT and stroke.paint[1] in ("shade", "deep") and unit < 1.5:
                kind = FILL  # in small frames nobody sees how smooth the edge of a shadow is
            strokes.append(stroke)
            calls.append((kind, spans, color, max(1, round(unit * stroke.weight))))
    return strokes, calls, still


def _draw(image, places, calls):
    fill, lines, smooth = cv2.fillPoly, cv2.polylines, cv2.LINE_AA
    for kind, spans, color, thickness in calls:
        points = [places[start:stop] for start, stop in spans]
        if kind == FILL:
            fill(image, points, color, cv2.LINE_8, _SHIFT)
        elif kind == SPOT:
            fill(image, points, color, smooth, _SHIFT)
        else:
            lines(image, points, kind == LOOP, color, thickness, smooth, _SHIFT)


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


def _shown(strokes, touches, start, stop):
    """Which strokes [T, S] are visible and touch the frame with any of their pieces."""
    first = touches[:, [stroke.pieces[0] for stroke in strokes]]
    for index, stroke in enumerate(strokes):
        if len(stroke.pieces) > 1:
            first[:, index] = touches[:, stroke.pieces].any(axis=1)
        if stroke.visible is not None:
            first[:, index] &= stroke.visible[start:stop]
    return first


def _dimmed(color, factors):
    table = np.arange(256)[:, None] * np.asarray(factors)
    return cv2.LUT(color, table.clip(0, 255).round().astype(np.uint8)[None])


def _shade(color, corners):
    """A cel shadow over the painted frame, in place."""
    mask = np.zeros(color.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(corners * 2**_SHIFT).astype(np.int32)], 1, cv2.LINE_8, _SHIFT)
    cv2.copyTo(_dimmed(color, _SHADOW), mask, color)
