"""The camera: pans, zooms, shakes, and the parallax of near and far layers."""

import numpy as np

from data_pipeline.toon.drawing import placed
from data_pipeline.toon.motion import pick

MOVES = ("still", "pan", "zoom in", "zoom out", "shake", "drift")


class Camera:
    """Maps the world to pixels; lengths in the world are in frame heights, y down.

    Args:
        x, y: [T] how far the camera has moved from its place.
        zoom: [T], 1 shows exactly one frame height.
    """

    def __init__(self, x, y, zoom, height, width):
        self.x, self.y, self.zoom, self.height, self.width = x, y, zoom, height, width

    @classmethod
    def draw(cls, rng, move, times, height, width, motion):
        """A camera path.

        Args:
            move: one of `MOVES`.
            times: [T] seconds.
            motion: 1 is usual; scales reach and speed.
        """
        zero = np.zeros(len(times))
        x, y, zoom = zero, zero, zero + 1.0
        length = max(times[-1], 1 / 24) if len(times) else 1.0
        share = times / length
        ease = share * share * (3 - 2 * share)
        side = pick(rng, (-1.0, 1.0))
        reach = motion * min(0.30, rng.uniform(0.10, 0.25) * length + 0.08)
        if move == "pan":
            x = side * reach * (share - 0.5) * 2 * min(1.0, width / height)
        elif move == "zoom in":
            zoom = 1 + 1.6 * reach * ease
        elif move == "zoom out":
            zoom = 1 + 1.6 * reach * (1 - ease)
        elif move == "shake":
            strength = motion * rng.uniform(0.008, 0.020) * np.exp(-2 * ((times * 1.1 + rng.random()) % 1.6))
            x = strength * np.sin(times * rng.uniform(45, 60))
            y = strength * np.sin(times * rng.uniform(50, 70) + 1)
        elif move == "drift":
            x = side * 0.5 * reach * (share - 0.5)
            y = -0.15 * reach * ease
            zoom = 1 + 0.5 * reach * ease
        return cls(x, y, zoom, height, width)

    def layer(self, depth):
        """[T, 3, 3] from the world to pixels at a depth: 0 infinitely far, 1 the figures, above 1 nearer."""
        zoom = 1 + (self.zoom - 1) * depth
        frames = len(zoom)
        middle = 0.5 * self.width / self.height
        return placed(frames, middle * self.height, 0.55 * self.height, 0, self.height * zoom) @ placed(
            frames, -middle - depth * self.x, -0.55 - depth * self.y
        )


class Stage:
    """What the parts of a scene are drawn with.

    Attributes:
        drawing: `Drawing`.
        times: [T] seconds.
        camera: `Camera`.
        aspect: width of the frame, in heights.
        shadows: [(bone, control points)] of what figures leave on the ground, drawn with the ground.
    """

    def __init__(self, drawing, times, camera):
        self.drawing, self.times, self.camera = drawing, times, camera
        self.aspect = camera.width / camera.height
        self._layers, self._fixed = {}, {}
        self.shadows = []

    def bone(self, matrix, depth=1.0, sway=0.0):
        """A bone of the drawing. `matrix` [T, 3, 3] maps its coordinates to the world's."""
        if depth not in self._layers:
            self._layers[depth] = self.camera.layer(depth)
        return self.drawing.bone(self._layers[depth] @ matrix, sway)

    def fixed(self, depth):
        """A bone that stands still in the world."""
        if depth not in self._fixed:
            self._fixed[depth] = self.bone(placed(len(self.times)), depth)
        return self._fixed[depth]
