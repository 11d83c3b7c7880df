"""Outlines as control points, and the smooth curves through them.

A control point is (x, y, sway, corner): y points down, `sway` says how far hair and cloth swing sideways
there, and the curve has an edge where `corner` is 1. Everything else is smooth.
"""

import functools

import numpy as np


@functools.cache
def outline(text):
    """Points "x y" or "x y sway" in thousandths, "!" after a corner -> [N, 4] control points."""
    rows = []
    for point in text.split(","):
        x, y, *sway = (float(number) for number in point.replace("!", "").split())
        rows.append((x / 1000, y / 1000, *(sway or [0.0]), float("!" in point)))
    points = np.array(rows)
    points.flags.writeable = False  # it is cached
    return points


def control(rows, corner=False):
    """Rows (x, y) or (x, y, sway) -> [N, 4] control points; with `corner`, of a polygon."""
    rows = np.asarray(rows, float)
    points = np.full((len(rows), 4), float(corner))
    points[:, 2] = 0
    points[:, : rows.shape[1]] = rows
    return points


_CIRCLE = np.arange(8) * (np.pi / 4)
_CIRCLE = np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE), 0 * _CIRCLE, 0 * _CIRCLE], axis=1)


def ellipse(x, y, rx, ry):
    """Eight control points around (x, y)."""
    return _CIRCLE * (rx, ry, 0, 0) + (x, y, 0, 0)


def box(left, top, right, bottom):
    """A rectangle."""
    return np.array([(left, top, 0, 1), (right, top, 0, 1), (right, bottom, 0, 1), (left, bottom, 0, 1)])


def bumps(x, y, rx, ry, count, depth=0.16, turn=0.0):
    """An ellipse with round bumps: foliage, curls, clouds."""
    angle = turn + np.arange(3 * count) * (2 * np.pi / (3 * count))
    points = np.zeros((3 * count, 4))
    points[:, 0], points[:, 1] = np.cos(angle), np.sin(angle)
    points[::3, :2] *= 1 - depth
    points[::3, 3] = 1
    return points * (rx, ry, 1, 1) + (x, y, 0, 0)


def star(x, y, radius, count=5, inner=0.45):
    """A star of `count` points."""
    angle = np.arange(2 * count) * (np.pi / count) - np.pi / 2
    radii = radius * np.tile([1, inner], count)
    return control(np.stack([x + radii * np.cos(angle), y + radii * np.sin(angle)], axis=1), corner=True)


_ALONG = np.array([0, 0.38, 0.5, 0.62, 1])  # close together at the joint, where a limb bends


def tube(length, start, end, tip=0.8):
    """A limb that hangs down from the origin, rounded at the lower end.

    Args:
        start, end: half its thickness at both ends.
        tip: how far the rounding goes on below `length`, in units of `end`.
    """
    half = start + (end - start) * _ALONG
    points = np.zeros((12, 4))
    points[0, 1], points[6, 1] = -0.7 * start, length + tip * end
    points[1:6, 0], points[7:, 0] = half, -half[::-1]
    points[1:6, 1] = length * _ALONG
    points[7:, 1] = points[5:0:-1, 1]
    return points


def moved(points, x=0.0, y=0.0, scale=1.0, flip=False):
    """Control points, scaled and then shifted."""
    return points * (-scale if flip else scale, scale, 1, 1) + (x, y, 0, 0)


# ---------------------------------------------------------------- smooth curves

_MAX_STEPS = 8  # points of a curve between two control points
_TOLERANCE = 0.20  # pixels between a curve and the chords that stand for it


@functools.cache
def _basis(steps):
    """Weights of four neighbouring points along the span between the middle two: [steps, 4] (Catmull-Rom)."""
    t = np.arange(steps)[:, None] / steps
    powers = np.concatenate([np.ones_like(t), t, t**2, t**3], axis=1)
    return powers @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2


def curves(pieces):
    """Smooth curves through control points, with as many points as their size in pixels needs.

    Args:
        pieces: list of (control points [N, 4], closed, pixels per unit).

    Returns:
        all points [M, 3] (x, y, sway), and the row at which each piece begins, [P + 1].
    """
    counts = np.array([len(points) for points, _, _ in pieces])
    ends = np.cumsum(counts)
    first, last = ends - counts, ends - 1
    points = np.concatenate([points for points, _, _ in pieces])
    scale = np.repeat([scale for _, _, scale in pieces], counts)
    corner = points[:, 3] > 0
    is_open = ~np.array([closed for _, closed, _ in pieces])
    corner[first[is_open]] = corner[last[is_open]] = True
    b = np.arange(len(points))
    before, c = b - 1, b + 1
    before[first], c[last] = last, first
    a, d = np.where(corner, b, before), np.where(corner[c], c, c[c])
    points = points[:, :3]
    chord = points[c, :2] - points[b, :2]
    bend = points[a, :2] - points[b, :2] - points[c, :2] + points[d, :2]  # about span length times its turn
    steps = np.sqrt(np.hypot(*bend.T) * scale / (16 * _TOLERANCE))
    steps = np.clip(np.ceil(steps), 1, _MAX_STEPS).astype(int)
    steps[corner & corner[c] | ~chord.any(axis=1)] = 1
    steps[last[is_open]] = 1
    stops = np.cumsum(steps)
    starts = stops - steps
    result = np.empty((stops[-1], 3))
    windows = np.stack([a, b, c, d], axis=1)
    for count in set(steps.tolist()):
        rows = np.flatnonzero(steps == count)
        place = starts[rows, None] + np.arange(count)
        result[place] = _basis(count) @ points[windows[rows]]
    return result, np.concatenate([starts[first], stops[-1:]])


def crescent(points, light):
    """The part of a closed curve [M, 3] that is turned away from the light, as a curve, or None.

    Args:
        light: dx, dy: the direction towards the light times the shadow's greatest thickness.
    """
    around = np.concatenate([points[-1:], points, points[:1]])[:, :2]
    before, change = around[:-2], around[2:] - around[:-2]
    dx, dy = light
    if before[:, 0] @ points[:, 1] < points[:, 0] @ before[:, 1]:  # the way round
        dx, dy = -dx, -dy
    # the outward normal at a point is (change of y, minus change of x) around it
    first, count = _longest_run(change[:, 1] * dx < change[:, 0] * dy)
    if not 3 <= count < len(points):
        return None
    outer = np.concatenate([points, points])[first : first + count]
    inner = outer[-2:0:-1].copy()
    inner[:, :2] += _taper(count)[-2:0:-1] * light
    return np.concatenate([outer, inner])


@functools.cache
def _taper(count):
    return np.sin(np.linspace(0, np.pi, count))[:, None].clip(0) ** 0.6


def _longest_run(flags):
    """Start and length of the longest run of True in a closed row, bool [N]."""
    twice = flags.tobytes() * 2
    longest = max(twice.split(b"\0"), key=len)
    return twice.find(longest), min(len(longest), len(flags))
