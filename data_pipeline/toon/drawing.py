"""What a clip is drawn from: points that hang on moving bones, and the strokes and fills between them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.toon import shapes

FILL, SPOT, LINE, LOOP = range(4)


class Stroke(NamedTuple):
    """One call of the rasteriser.

    Attributes:
        kind: FILL (an outline will cover its edge), SPOT (smooth edge), LINE or LOOP (closed line).
        pieces: numbers of its curves, a range; they must not overlap.
        bone: what they hang on.
        paint: (slot, tone) of its colour.
        in_sketch: whether it is part of the line art; what is not hides the lines behind it.
        weight: thickness of a line, in units of the usual one.
        visible: bool [T], or None for always.
    """

    kind: int
    pieces: range
    bone: object
    paint: tuple
    in_sketch: bool
    weight: float
    visible: np.ndarray | None


class Drawing:
    """Collects strokes from back to front; every stroke covers what came before.

    Args:
        light: (x, y) towards the light, y down.
    """

    def __init__(self, light):
        self.light = light
        self.strokes = []
        self._matrices, self._sways = [], {}
        self._pieces, self._piece_bones, self._shades = [], [], {}

    @property
    def count(self):
        """How many curves there are."""
        return len(self._pieces)

    def bone(self, matrix, sway=0.0):
        """A frame of reference for points.

        Args:
            matrix: [T, 3, 3], its coordinates to pixels.
            sway: [T] how far points with sway 1 are moved along its x axis, or 0.0.

        Returns:
            its index.
        """
        self._matrices.append(matrix)
        if not isinstance(sway, float):
            self._sways[len(self._matrices) - 1] = sway
        return len(self._matrices) - 1

    def shape(
        self, bone, points, slot, *, shade=0.0, weight=1.0, ink=("ink", "base"), tone="base", visible=None
    ):
        """A filled shape with its outline.

        Args:
            bone: index; or (upper, lower, joint, softness) of a limb whose points follow `upper` above
                y = joint and `lower` below it.
            points: [N, 4] control points, or a list of such for several shapes that do not overlap.
            slot: name of the colour.
            shade: thickness of the darker tone on the side that is turned from the light; 0 for none.
            ink: (slot, tone) of the outline, None for no outline.
        """
        strokes, pieces = self.strokes, self._add(bone, points, True)
        strokes.append(Stroke(FILL if ink else SPOT, pieces, bone, (slot, tone), False, weight, visible))
        if shade:
            dark = self._add(bone, [None] * len(pieces), True)
            self._shades.update(zip(dark, [(piece, shade) for piece in pieces], strict=True))
            darker = (slot, "shade" if tone == "base" else "deep")
            strokes.append(Stroke(SPOT, dark, bone, darker, False, 1.0, visible))
        if ink:
            strokes.append(Stroke(LOOP, pieces, bone, ink, True, weight, visible))

    def spot(self, bone, points, slot, *, tone="base", in_sketch=False, visible=None):
        """A patch (or a list of them) without outline; with `in_sketch` it is solid in the line art too."""
        pieces = self._add(bone, points, True)
        self.strokes.append(Stroke(SPOT, pieces, bone, (slot, tone), in_sketch, 1.0, visible))

    def line(self, bone, points, *, weight=1.0, ink=("ink", "base"), visible=None, closed=False):
        """A line, or a list of them."""
        pieces = self._add(bone, points, closed)
        self.strokes.append(Stroke(LOOP if closed else LINE, pieces, bone, ink, True, weight, visible))

    def _add(self, bone, points, closed):
        points = points if isinstance(points, list) else [points]
        first = len(self._pieces)
        self._pieces += [(outline, closed) for outline in points]
        self._piece_bones += [bone] * len(points)
        return range(first, first + len(points))

    def finish(self):
        """Computes all curves.

        Returns:
            `Curves`.
        """
        bones = self._bones()
        scales = np.abs(bones[:, :, 1]).sum(axis=2).max(axis=1).tolist()  # pixels per unit
        first_bones = [bone if isinstance(bone, int) else bone[0] for bone in self._piece_bones]
        drawn = [piece for piece in range(len(self._pieces)) if piece not in self._shades]
        drawn.sort(key=first_bones.__getitem__)  # so that what hangs on one bone is computed together
        pieces = [(*self._pieces[piece], scales[first_bones[piece]]) for piece in drawn]
        points, bounds = shapes.curves(pieces)
        bounds = bounds.tolist()
        spans = [None] * len(self._pieces)
        for index, piece in enumerate(drawn):
            spans[piece] = bounds[index], bounds[index + 1]
        extra, count = [points], len(points)
        for piece, (lit, shade) in self._shades.items():
            dark = self._shadow(points[slice(*spans[lit])], bones[first_bones[piece], 0], shade)
            if dark is not None:
                spans[piece] = count, count + len(dark)
                extra.append(dark)
                count += len(dark)
        points = np.concatenate(extra)
        homogeneous = np.ones((len(points), 4), np.float32)
        homogeneous[:, :3] = points
        return Curves(homogeneous, spans, self._runs(spans), bones)

    def _bones(self):
        """[B, T, 4, 2] float32: matrices, transposed because points are rows, with what sways third."""
        matrices = np.stack(self._matrices)
        sways = np.zeros((*matrices.shape[:2], 1))
        for bone, sway in self._sways.items():
            sways[bone, :, 0] = sway
        bones = np.empty((*matrices.shape[:2], 4, 2), np.float32)
        bones[:, :, :2] = matrices[:, :, :2, :2].swapaxes(2, 3)
        bones[:, :, 2] = bones[:, :, 0] * sways
        bones[:, :, 3] = matrices[:, :, :2, 2]
        return bones

    def _shadow(self, curve, bone, shade):
        (a, c), (b, d) = bone[:2].tolist()
        x, y = (d * self.light[0] - b * self.light[1]), (a * self.light[1] - c * self.light[0])
        length = math.hypot(x, y)
        if not length:
            return None
        length = math.copysign(length, a * d - b * c)  # the light, in the bone's coordinates
        return shapes.crescent(curve, (shade * x / length, shade * y / length))

    def _runs(self, spans):
        """Neighbouring pieces of one bone together: [bone, start, stop]."""
        runs = []
        for span, bone in sorted((span, index) for index, span in enumerate(spans) if span is not None):
            bone = self._piece_bones[bone]
            if runs and runs[-1][0] == bone:
                runs[-1][2] = span[1]
            else:
                runs.append([bone, *span])
        return runs

    def count_still(self, bones):
        """How many of the rearmost strokes are the same in all frames; `bones` as in `Curves`."""
        still = (bones == bones[:, :1]).all(axis=(1, 2, 3)).tolist()
        for index, stroke in enumerate(self.strokes):
            bones = (stroke.bone,) if isinstance(stroke.bone, int) else stroke.bone[:2]
            if stroke.visible is not None or not all(still[bone] for bone in bones):
                return index
        return len(self.strokes)


@dataclass(frozen=True)
class Curves:
    """The points of a drawing.

    Attributes:
        points: [N, 4] float32 (x, y, sway, 1) in the coordinates of their bones.
        spans: (start, stop) rows of each piece; None for a shadow that there is not.
        runs: (bone, start, stop): rows that hang on one bone.
        bones: [B, T, 4, 2].
    """

    points: np.ndarray
    spans: list
    runs: list
    bones: np.ndarray

    def vertices(self, start, stop):
        """Positions in pixels [stop - start, N, 2] float32 in these frames."""
        places = np.empty((stop - start, len(self.points), 2), np.float32)
        for bone, first, last in self.runs:
            own = self.points[first:last]
            if isinstance(bone, int):
                places[:, first:last] = own @ self.bones[bone, start:stop]
                continue
            upper, lower, joint, softness = bone
            share = np.clip((joint - own[:, 1:2]) / (2 * softness) + 0.5, 0, 1)
            above, below = own @ self.bones[upper, start:stop], own @ self.bones[lower, start:stop]
            places[:, first:last] = below + share * (above - below)
        return places


# ---------------------------------------------------------------- matrices [T, 3, 3]


def placed(frames, x=0.0, y=0.0, angle=0.0, scale_x=1.0, scale_y=None):
    """Scales, turns and shifts, each a number or [T]; a positive angle swings what hangs down towards +x."""
    scale_y = scale_x if scale_y is None else scale_y
    matrix = np.zeros((frames, 3, 3))
    cos, sin = (np.cos(angle), np.sin(angle)) if isinstance(angle, np.ndarray) or angle else (1.0, 0.0)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * scale_x, sin * scale_y
    matrix[:, 1, 0], matrix[:, 1, 1] = -sin * scale_x, cos * scale_y
    matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = x, y, 1
    return matrix
