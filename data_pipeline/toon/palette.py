"""Colours, drawn independently of the shapes: what a clip's line art shows never tells its colours."""

import colorsys
import random

import numpy as np

_SKIN = ((255, 228, 208), (250, 210, 180), (232, 184, 146), (206, 150, 112), (164, 112, 84), (118, 78, 62))

# Kinds of things: (share of natural hues, natural hues, saturation, value). A hue is a share of the circle,
# and what is not natural has any.
_KINDS = {
    "hair": (0.35, (0.02, 0.14), (0.20, 0.80), (0.28, 0.98)),
    "eye": (0.0, (0, 1), (0.45, 0.85), (0.35, 0.85)),
    "mouth": (1.0, (0.93, 1.04), (0.45, 0.70), (0.62, 0.90)),
    "cloth": (0.0, (0, 1), (0.35, 0.82), (0.60, 1.00)),
    "fur": (0.45, (0.04, 0.13), (0.15, 0.70), (0.50, 1.00)),
    "thing": (0.0, (0, 1), (0.35, 0.82), (0.55, 1.00)),
    "sky": (0.5, (0.48, 0.62), (0.14, 0.50), (0.88, 1.00)),
    "far": (0.3, (0.30, 0.65), (0.18, 0.42), (0.68, 0.92)),
    "ground": (0.4, (0.10, 0.40), (0.22, 0.55), (0.66, 0.94)),
    "leaf": (0.5, (0.22, 0.42), (0.30, 0.65), (0.48, 0.90)),
    "wood": (0.5, (0.03, 0.10), (0.30, 0.60), (0.40, 0.75)),
    "wall": (0.0, (0, 1), (0.10, 0.42), (0.72, 0.98)),
    "glow": (0.5, (0.10, 0.16), (0.15, 0.65), (0.94, 1.00)),
    "pale": (0.3, (0.50, 0.65), (0.02, 0.14), (0.94, 1.00)),
}
_SCENERY = ("sky", "far", "ground", "leaf", "wood", "wall")  # darker at night
_FACTORS = {"shade": (0.84, 0.76, 0.87), "deep": (0.68, 0.58, 0.74), "line": (0.54, 0.48, 0.60)}
_TOWARD = {"light": (0.5, (255, 255, 255)), "blush": (0.35, (255, 84, 92))}
_NIGHT = {"sky": 0.36, "wall": 0.6}  # times the value; 0.55 for the rest


class Palette:
    """A colour for every name.

    A slot is `owner/kind` or `owner/kind.part` (`person0/cloth.shirt`); kinds are those of this module. Its
    colour depends on the seed and the name alone.

    Args:
        seed: whole number, 0 or above.
    """

    def __init__(self, seed):
        self.seed = seed
        rng = random.Random(f"{seed}")
        self._night = rng.random() < 0.22
        self._ink = _from_hsv(rng.random(), rng.uniform(0.25, 0.6), rng.uniform(0.10, 0.24))
        dusk = _from_hsv(rng.choice((0.02, 0.06, 0.62, 0.70, 0.85)) + rng.uniform(-0.03, 0.03), 0.42, 1.0)
        self.dusk = np.array(dusk) / 255 * 0.82  # factors of red, green and blue as the light goes
        self.dark = np.array(_from_hsv(rng.uniform(0.58, 0.75), 0.34, 1.0)) / 255 * 0.72  # lamp switched off
        self._base = {"ink": self._ink, "white": (255, 255, 255), "dark": (48, 38, 46)}

    def color(self, slot, tone="base"):
        """Red, green and blue, 0 to 255, of a slot.

        Args:
            tone: base; shade and deep, darker, a little towards violet; light, towards white; line, for
                outlines of what is far away; blush, of cheeks.
        """
        if slot not in self._base:
            self._base[slot] = self._draw(slot)
        red, green, blue = self._base[slot]
        if tone in _TOWARD:
            share, (other_red, other_green, other_blue) = _TOWARD[tone]
            red += share * (other_red - red)
            green += share * (other_green - green)
            blue += share * (other_blue - blue)
        elif tone != "base":
            factors = _FACTORS[tone]
            red, green, blue = red * factors[0], green * factors[1], blue * factors[2]
        return round(red), round(green), round(blue)

    def _draw(self, slot):
        rng = random.Random(f"{self.seed} {slot}")
        kind = slot.rpartition("/")[2].partition(".")[0]
        if kind == "skin":
            return rng.choice(_SKIN)
        share, hues, saturations, values = _KINDS[kind]
        hue = rng.uniform(*hues) if rng.random() < share else rng.random()
        saturation, value = rng.uniform(*saturations), rng.uniform(*values)
        if kind in ("cloth", "thing", "hair", "fur") and rng.random() < 0.16:  # nearly white, grey or black
            saturation, value = rng.uniform(0.0, 0.12), rng.choice((0.96, 0.62, 0.34))
        if self._night and kind in _SCENERY:
            value *= _NIGHT.get(kind, 0.55)
            saturation = min(1.0, saturation + 0.15)
        return _from_hsv(hue, saturation, value)


def _from_hsv(hue, saturation, value):
    return tuple(255 * level for level in colorsys.hsv_to_rgb(hue % 1, saturation, value))
