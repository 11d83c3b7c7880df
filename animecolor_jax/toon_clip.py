"""A small cel-animation clip drawn by the computer: line art, its colours, and a reference.

A child with a long scarf walks over a meadow and a chick hops behind. It serves the demo and the tests:
no download, no licence, and the right colours are known.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

CYCLE = 16  # frames of two steps; the 17th closes the loop (but for the clouds)
INK = (62, 36, 52)  # outlines of the painted frames: dark, but not black, as on a cel
PENCIL, PAPER = 38, 255
WHITE, YELLOW, ORANGE, LEATHER = (255, 255, 255), (255, 224, 110), (246, 150, 60), (134, 84, 68)

# fmt: off
SKIES = (
    {"sky": (158, 218, 250), "sun": (255, 226, 120), "cloud": (255, 255, 255), "hill": (122, 192, 170),
     "ground": (150, 210, 106)},
    {"sky": (255, 198, 158), "sun": (255, 120, 94), "cloud": (255, 236, 216), "hill": (190, 134, 158),
     "ground": (222, 188, 104)},
    {"sky": (96, 116, 190), "sun": (255, 246, 206), "cloud": (168, 180, 230), "hill": (66, 92, 138),
     "ground": (82, 142, 128)},
    {"sky": (190, 236, 226), "sun": (255, 206, 128), "cloud": (255, 252, 244), "hill": (140, 176, 208),
     "ground": (236, 206, 216)},
)
HAIR = ((140, 84, 62), (70, 76, 124), (250, 152, 168), (246, 182, 76), (86, 176, 168), (150, 108, 190),
        (216, 92, 70))
CLOTH = ((226, 74, 78), (58, 128, 200), (250, 196, 72), (70, 168, 126), (240, 134, 70), (136, 100, 188),
         (246, 240, 228))
SKIN = ((255, 226, 204), (248, 206, 174), (218, 164, 124), (164, 112, 84))
EYES = ((82, 140, 206), (98, 168, 98), (170, 98, 60), (150, 96, 184))
# fmt: on


def _points(text):
    """Points "x y" or "x y sway", x and y in thousandths of the frame's height -> [N, 3]."""
    rows = [[float(number) for number in point.split()] for point in text.split(",")]
    return np.array([[x / 1000, y / 1000, *(sway or [0])] for x, y, *sway in rows])


# Outlines around an anchor (the middle of the head, the foot ...), y down; hair and cloth sway sideways.
CLOUD = _points("-150 50, -170 10, -100 -30, -50 -75, 30 -70, 80 -30, 150 -20, 170 30, 130 50, 0 55")
TUFT = _points("5 0, -12 -35, 12 -22, 30 -36")
WING = _points("-55 -10, -100 30 1, -62 45 .3, -30 20")
BEAK = _points("55 -12, 100 4, 55 18")
BOOT = _points("-36 -35, 30 -35, 36 -10, 70 0, 68 20, -36 20")
COAT_TOP = _points("60 10, -60 10")
COAT_HEM = _points("-85 -50, -125 45 1, 0 60 1, 120 45 1, 85 -50")
SCARF = _points("-85 -10, -50 -45, 60 -45, 95 -10, 60 35, -50 35")
BACK_HAIR = _points(
    "0 -210, 130 -175, 200 -60, 195 60, 150 135, 50 165, -80 170, -190 150 1, -240 155 1, -220 70, "
    "-215 -40, -135 -170"
)
FACE = _points("0 -160, 125 -120, 172 -10, 150 85, 75 148, 30 158, -50 142, -130 85, -160 -10, -120 -120")
CROWN = _points("-200 90, -215 -30, -170 -140, -60 -215, 60 -210, 165 -145, 200 -30, 190 70")
FRINGE = _points(
    "176 30 1, 164 -50, 135 -20 1, 100 -75, 50 -22 1, 10 -85, -55 -25 1, -85 -70, -130 0 1, -142 -20, "
    "-160 100 1"
)
SHINE = _points("-100 -125, -20 -155, 80 -145, 120 -115, 70 -125, -20 -130")
COWLICK = _points("-10 -200, 5 -260, 50 -275 2, 30 -245 1, 30 -200")
SMILE = _points("-24 -2, 0 2, 26 -2, 16 20, 0 25, -14 18")
EYELID = _points("-40 -12, -26 -39, 0 -51, 26 -39, 40 -12")
CLOSED_EYE = _points("-34 0, 0 16, 34 0")


@dataclass(frozen=True)
class ToonClip:
    """`sketch` and `color` are [T, H, W, 3] uint8 and show the same drawings; `reference` is [H, W, 3]."""

    sketch: np.ndarray
    color: np.ndarray
    reference: np.ndarray


def draw_toon_clip(num_frames=17, height=96, width=160, seed=0):
    """Draws the clip; the same arguments give the same pixels.

    Args:
        num_frames: how many; the movement repeats every 16.
        height, width: of the frames, in pixels.
        seed: chooses the colours, the clouds and the flowers.

    Returns:
        `ToonClip`: dark lines on white, the painted frames, and the first of these as reference.
    """
    scene = _Scene(np.random.default_rng(seed), width / height)
    pairs = [scene.draw(index, height, width) for index in range(num_frames)]
    sketch, color = (np.stack(frames) for frames in zip(*pairs, strict=True))
    return ToonClip(sketch, color, color[0])


# ---------------------------------------------------------------- shapes and colours


def _place(anchor, outline, sway=0.0, scale=1.0):
    return anchor + scale * outline[:, :2] + np.outer(outline[:, 2], [sway, 0])


def _curve(points, closed=True, steps=10):
    """A smooth (Catmull-Rom) curve through points [N, 2] -> [M, 2]."""
    points = np.asarray(points, float)
    before, after = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    p = np.concatenate([before, points, after])
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (p[k : len(p) - 3 + k, None] for k in range(4))
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


def _ellipse(center, rx, ry):
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.asarray(center) + np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1)


def _limb(start, end, thick_start, thick_end):
    """A tube from start to end with a round end: an arm or a leg."""
    along = (end - start) / np.hypot(*(end - start))
    side, tip = np.array([-along[1], along[0]]), end + along * thick_end
    right, left = (
        [start + side * thick_start, end + side * thick_end],
        [end - side * thick_end, start - side * thick_start],
    )
    return _curve([*right, tip, *left])


def _shadow(color, amount=0.82):
    """The shadow tone of a cel colour: darker, and a little towards violet."""
    factors = (amount + 0.03, amount - 0.05, amount + 0.06)
    return tuple(round(level * factor) for level, factor in zip(color, factors, strict=True))


def _mix(color, other, share):
    return tuple(round(a + share * (b - a)) for a, b in zip(color, other, strict=True))


class _Cel:
    """Draws every shape twice: painted, and as line art that covers what is behind it.

    Coordinates have the frame's height as unit, y down. Drawn large and scaled down, for smooth lines.
    """

    def __init__(self, height, width):
        self.size = width, height
        self.zoom = height * max(3, round(480 / height))
        large = (round(width * self.zoom / height), self.zoom)
        self.color, self.sketch = Image.new("RGB", large), Image.new("L", large, PAPER)
        self.paint, self.pencil = ImageDraw.Draw(self.color), ImageDraw.Draw(self.sketch)
        self.pen = max(0.006, 1.15 / height)  # fine in large frames, and still a pixel wide in small ones

    def _pixels(self, points):
        return [tuple(point) for point in np.asarray(points) * self.zoom]

    def line(self, points, weight=1.0, ink=INK):
        """A stroke with round ends and joints, in both."""
        pixels, radius = self._pixels(points), self.pen * weight * self.zoom / 2
        for draw, tone in ((self.paint, ink), (self.pencil, PENCIL)):
            draw.line(pixels, fill=tone, width=max(1, round(2 * radius)), joint="curve")
            for x, y in (pixels[0], pixels[-1]):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone)

    def shape(self, points, fill, shade=None, weight=1.0, ink=INK):
        """A closed shape with outline; `shade` (points) is its shadow, painted where it lies inside."""
        pixels = self._pixels(points)
        self.paint.polygon(pixels, fill=fill)
        self.pencil.polygon(pixels, fill=PAPER)
        if shade is not None:
            inside, shadow = (Image.new("1", self.color.size) for _ in range(2))
            ImageDraw.Draw(inside).polygon(pixels, fill=1)
            ImageDraw.Draw(shadow).polygon(self._pixels(shade), fill=1)
            self.color.paste(_shadow(fill), mask=ImageChops.logical_and(inside, shadow))
        self.line(np.concatenate([points, points[:1]]), weight, ink)

    def spot(self, points, fill, pencil=None):
        """A patch without outline; in the sketch only if `pencil` gives it a tone."""
        self.paint.polygon(self._pixels(points), fill=fill)
        if pencil is not None:
            self.pencil.polygon(self._pixels(points), fill=pencil)

    def finish(self):
        """(sketch, color), both [H, W, 3] uint8."""
        sketch, color = (image.resize(self.size, Image.Resampling.BOX) for image in (self.sketch, self.color))
        return np.repeat(np.asarray(sketch)[..., None], 3, axis=-1), np.asarray(color)


# ---------------------------------------------------------------- the scene


class _Scene:
    """Colours and places, chosen once; `draw` moves them."""

    def __init__(self, rng, aspect):
        def pick(options):
            return options[rng.integers(len(options))]

        self.aspect = aspect
        self.sky, self.hair, self.skin, self.eyes = pick(SKIES), pick(HAIR), pick(SKIN), pick(EYES)
        self.scarf, self.coat, self.legs = (CLOTH[index] for index in rng.permutation(len(CLOTH))[:3])
        # x as a share of the width, y, size
        self.clouds = rng.uniform(
            [(0.08, 0.1, 0.85), (0.3, 0.24, 0.6)], [(0.16, 0.16, 1.1), (0.38, 0.3, 0.75)]
        )
        self.flowers = np.stack(
            [(np.arange(8) + rng.uniform(0.1, 0.9, 8)) / 8, rng.uniform(0.9, 0.95, 8)], axis=1
        )
        self.petals = [pick(CLOTH) for _ in self.flowers]

    def draw(self, index, height, width):
        """Frame `index` as (sketch, color)."""
        cel, phase = _Cel(height, width), 2 * np.pi * index / CYCLE
        self._landscape(cel, index)
        self._chick(cel, phase)
        self._child(cel, phase, blink=index % CYCLE in (10, 11))
        return cel.finish()

    def _landscape(self, cel, index):
        sky, wide = self.sky, self.aspect
        cel.spot([(0, 0), (wide, 0), (wide, 1), (0, 1)], sky["sky"])
        cel.shape(_ellipse((0.86 * wide, 0.2), 0.095, 0.095), sky["sun"], weight=0.8, ink=_shadow(sky["sun"]))
        for x, y, scale in self.clouds:
            cloud = _curve(_place([x * wide + 0.004 * scale * index, y], CLOUD, scale=scale))
            cel.shape(
                cloud, sky["cloud"], shade=cloud + [0.01, 0.055], weight=0.8, ink=_shadow(sky["cloud"], 0.75)
            )
        for center, top, half in ((0.2, 0.6, 0.5), (0.8, 0.54, 0.62)):
            ridge = _ellipse((center * wide, top + 0.4), half * wide, 0.4)
            cel.shape(ridge, sky["hill"], weight=0.8, ink=_shadow(sky["hill"], 0.7))
        soil = _shadow(sky["ground"], 0.6)
        edge = _curve(
            [(-0.1, 0.79), (0.25 * wide, 0.765), (0.6 * wide, 0.785), (wide + 0.1, 0.77)], closed=False
        )
        ground = np.concatenate([edge, [(wide + 0.1, 1.1), (-0.1, 1.1)]])
        cel.shape(ground, sky["ground"], shade=ground + [0, 0.15], weight=0.9, ink=soil)
        for flower, petal in zip(self.flowers * [wide, 1], self.petals, strict=True):
            cel.line([flower + [0, 0.035], flower], 0.8, ink=soil)
            cel.shape(_ellipse(flower - [0, 0.008], 0.018, 0.015), petal, weight=0.8)

    def _chick(self, cel, phase):
        """A round chick two steps behind, hopping, flattened as it lands."""
        hop = abs(np.sin(phase))
        squash = 1 + 0.16 * (0.35 - min(hop, 0.7))
        rx, ry = 0.085 * squash, 0.08 / squash
        base = np.array([0.22 * self.aspect + 0.006 * np.sin(2 * phase), 0.865 - 0.09 * hop])
        body = base - [0, ry]
        cel.spot(_ellipse((base[0], 0.872), 0.075 * (1 - 0.35 * hop), 0.013), _shadow(self.sky["ground"]))
        for side in (-0.03, 0.03):
            toes = base + [side, 0.012 + 0.012 * hop]
            cel.line([base + [side, -0.01], toes, toes + [0.016, 0]], ink=_shadow(ORANGE))
        cel.shape(_ellipse(body, rx, ry), YELLOW, shade=_ellipse(body + [-0.03, 0.045], rx, ry))
        cel.line(_curve(_place(body - [0, ry], TUFT), closed=False))
        wing = _place(body, WING)
        wing[:, 1] -= WING[:, 2] * (0.02 + 0.05 * hop)  # wings swing up, not aside
        cel.shape(_curve(wing), YELLOW)
        cel.spot(_ellipse(body + [0.028, -0.015], 0.0115, 0.015), INK, PENCIL)
        cel.spot(_ellipse(body + [0.032, -0.021], 0.0045, 0.005), WHITE, PAPER)
        cel.shape(_place(body, BEAK), ORANGE, weight=0.9)
        cel.spot(_ellipse(body + [0.038, 0.018], 0.013, 0.008), (250, 168, 120))

    def _child(self, cel, phase, blink):
        """From back to front, so that each part covers the one behind."""
        x, bob = 0.58 * self.aspect, 0.022 * abs(np.sin(phase))
        hip, neck = np.array([x, 0.735 - bob]), np.array([x + 0.01, 0.565 - bob])
        head = np.array([x + 0.022, 0.385 - bob + 0.006 * np.cos(2 * phase)])
        cel.spot(_ellipse((x, 0.885), 0.13 - bob, 0.018), _shadow(self.sky["ground"]))
        back_hair = _curve(_place(head, BACK_HAIR, 0.018 * np.sin(2 * phase - 1)))
        cel.shape(back_hair, _shadow(self.hair, 0.8))
        self._scarf_tail(cel, neck, phase)
        self._arm(cel, neck, -np.sin(phase))
        self._leg(cel, hip, phase + np.pi)
        self._leg(cel, hip, phase)
        self._coat(cel, hip, neck, 0.014 * np.sin(phase + 0.8))
        self._arm(cel, neck, np.sin(phase))
        wrap = _curve(_place(neck, SCARF))
        cel.shape(wrap, self.scarf, shade=wrap + [-0.02, 0.045])
        self._face(cel, head, blink)
        self._hair(cel, head, 0.01 * np.sin(2 * phase - 0.5))

    def _leg(self, cel, hip, phase):
        swing, lift = 0.085 * np.sin(phase), 0.035 * max(0.0, np.cos(phase))
        foot = np.array([hip[0] + swing - 0.8 * lift, 0.868 - lift])
        cel.shape(_limb(hip + [0.15 * swing, -0.02], foot - [0, 0.02], 0.038, 0.03), self.legs)
        boot = _curve(_place(foot, BOOT))
        cel.shape(boot, LEATHER, shade=boot + [-0.01, 0.035])

    def _arm(self, cel, neck, swing):
        shoulder = neck + [-0.005, 0.065]
        hand = shoulder + [0.105 * swing, 0.125 - 0.03 * abs(swing)]
        cel.shape(_ellipse(hand + [0.014 * swing, 0.016], 0.028, 0.027), self.skin)
        cel.shape(_limb(shoulder, hand - [0, 0.008], 0.034, 0.036), self.coat)

    def _coat(self, cel, hip, neck, sway):
        coat = _curve(np.concatenate([_place(neck, COAT_TOP), _place(hip, COAT_HEM, sway)]))
        cel.shape(coat, self.coat, shade=coat + [-0.075, 0.03])
        seam = [neck + [0.035, 0.05], hip + [0.05, -0.03], hip + [0.055 + sway, 0.055]]
        cel.line(_curve(seam, closed=False), 0.8)
        for y in (0.085, 0.135):
            cel.shape(_ellipse(neck + [0.062, y], 0.0115, 0.0115), (255, 240, 200), weight=0.8)

    def _scarf_tail(self, cel, neck, phase):
        """A band in the wind: the wave runs along it, and grows towards its end."""
        along = np.linspace(0, 1, 7)
        wave = 0.045 * along * np.sin(2 * phase - 4.2 * along)
        center = neck + np.stack([-0.05 - 0.36 * along, wave - 0.005 - 0.06 * along], axis=1)
        half = np.stack([0.012 * along, 0.03 + 0.022 * along], axis=1)
        above, below = _curve(center - half, closed=False), _curve(center + half, closed=False)
        tail = np.concatenate([above, below[::-1]])
        cel.shape(tail, self.scarf, shade=tail + [0, 0.042])
        for stripe in (46, 55):  # of 60 points
            cel.line([above[stripe], below[stripe]], 0.8)

    def _face(self, cel, head, blink):
        under_fringe = _ellipse(head - [0, 0.1], 0.2, 0.12)
        cel.shape(_curve(_place(head, FACE)), self.skin, shade=under_fringe)
        for x, width, cheek in ((-0.045, 1.0, -0.073), (0.1, 0.86, 0.116)):  # turned a little to the right
            if blink:
                closed = _place(head + [x, 0.04], CLOSED_EYE * [width, 1, 1])
                cel.line(_curve(closed, closed=False), 1.4)
            else:
                self._eye(cel, head + [x, 0.04], width)
            cel.spot(
                _ellipse(head + [cheek, 0.094], 0.026 * width, 0.014), _mix(self.skin, (255, 90, 90), 0.25)
            )
        nose = head + [0.036, 0.082]
        cel.line([nose, nose + [0.005, 0.003]], 0.8)
        cel.shape(_curve(_place(head + [0.03, 0.107], SMILE)), (216, 96, 92), weight=0.8)

    def _eye(self, cel, center, width):
        cel.spot(_ellipse(center, 0.033 * width, 0.046), WHITE, PAPER)
        iris = _ellipse(center + [0.004, 0.003], 0.025 * width, 0.04)
        cel.shape(iris, self.eyes, shade=iris - [0, 0.035], weight=0.8)
        cel.spot(_ellipse(center + [0.005, 0.004], 0.012 * width, 0.022), INK, PENCIL)
        cel.spot(_ellipse(center + [-0.007, -0.016], 0.0095, 0.012), WHITE, PAPER)
        cel.line(_curve(_place(center, EYELID * [width, 1, 1]), closed=False), 1.6)

    def _hair(self, cel, head, sway):
        crown, fringe = _curve(_place(head, CROWN), closed=False), _place(head, FRINGE, sway)
        hair = np.concatenate([crown, fringe])  # round above, pointed below
        cel.shape(hair, self.hair, shade=_ellipse(head + [-0.12, 0.1], 0.16, 0.16))
        cel.spot(_curve(_place(head, SHINE)), _mix(self.hair, WHITE, 0.5))
        cel.shape(_curve(_place(head, COWLICK, sway)), self.hair)
