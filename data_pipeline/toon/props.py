"""Things: trees, houses, cars, balls, umbrellas. Each is drawn standing on its `place`."""

import numpy as np

from data_pipeline.toon.shapes import box, bumps, control, ellipse, moved, outline


class Place:
    """Where a thing stands, and the pen that draws it there.

    Args:
        drawing: `Drawing`.
        bone: index of the bone it hangs on.
        name: owner of its colours.
        x, y, size: foot and scale, in the bone's units.
        far: thin outlines in a darker tone of the fill, as in backgrounds.
        flip: mirrored.
    """

    def __init__(self, drawing, bone, name, x=0.0, y=0.0, size=1.0, far=True, flip=False):
        self.drawing, self.bone, self.name, self.far = drawing, bone, name, far
        self.x, self.y, self.size, self.flip = x, y, size, flip

    def _at(self, points):
        if isinstance(points, list):
            return [self._at(part) for part in points]
        return moved(points, self.x, self.y, self.size, self.flip)

    def shape(self, points, kind, shade=0.0, weight=1.0, tone="base"):
        """A shape, or a list of them, with outline; `kind` is the kind of colour."""
        slot = f"{self.name}/{kind}"
        ink = (slot, "line") if self.far else ("ink", "base")
        self.drawing.shape(
            self.bone,
            self._at(points),
            slot,
            shade=shade * self.size,
            tone=tone,
            ink=ink,
            weight=weight * (0.8 if self.far else 1.0),
        )

    def spot(self, points, kind, tone="base"):
        """A patch without outline."""
        self.drawing.spot(self.bone, self._at(points), f"{self.name}/{kind}", tone=tone)

    def line(self, points, kind, weight=0.8):
        """A line in a darker tone of a colour."""
        ink = (f"{self.name}/{kind}", "line") if self.far else ("ink", "base")
        self.drawing.line(self.bone, self._at(points), weight=weight, ink=ink)


def tree(place, rng):
    """A round tree, 0.6 high."""
    place.shape(outline("-35 0!, -22 -250!, 22 -250!, 35 0!"), "wood", shade=0.02)
    place.shape(
        bumps(0, -0.42, 0.21 * rng.uniform(0.9, 1.2), 0.20, int(rng.integers(7, 10)), turn=rng.uniform(0, 1)),
        "leaf",
        shade=0.07,
    )


def pine(place, rng):
    """A pine, 0.7 high."""
    place.shape(box(-0.025, -0.15, 0.025, 0), "wood")
    for y, wide in ((-0.10, 0.19), (-0.26, 0.15), (-0.42, 0.11)):
        tier = control(
            [(-wide, y), (0, y - 0.27), (wide, y), (0.3 * wide, y + 0.02), (-0.35 * wide, y + 0.02)]
        )
        tier[:3, 3] = 1
        place.shape(tier, "leaf", shade=0.04)


def palm(place, rng):
    """A palm, 0.7 high."""
    place.shape(
        outline("-40 0!, -20 -200, 30 -380, 60 -520!, 90 -510!, 70 -360, 25 -200, 25 0!"), "wood", shade=0.02
    )
    leaf = outline("0 0!, 90 -80, 200 -70, 290 30!, 190 0, 90 -10")
    for x_scale, angle in ((1, -0.5), (-1, 0.5), (1, 0.25), (-1, -0.25)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = leaf.copy()
        points[:, :2] = (leaf[:, :2] * [x_scale, 1]) @ turn.T + [0.075, -0.52]
        place.shape(points, "leaf", shade=0.02)


def bush(place, rng):
    """A bush, 0.2 high."""
    place.shape(
        bumps(0, -0.06, 0.21, 0.13, int(rng.integers(7, 10)), turn=rng.uniform(0, 1)), "leaf", shade=0.05
    )


def rock(place, rng):
    """A rock, 0.12 high."""
    place.shape(outline("-140 0!, -120 -70, -50 -120, 50 -110, 120 -60, 140 0!"), "far.rock", shade=0.03)


def house(place, rng):
    """A house, 0.62 high."""
    place.shape(box(-0.24, -0.34, 0.24, 0), "wall")
    place.shape(outline("-300 -330!, -170 -560!, 170 -560!, 300 -330!"), "thing.roof", shade=0.03)
    place.shape(box(0.12, -0.62, 0.17, -0.5), "wall")
    place.shape(box(-0.05, -0.2, 0.06, 0), "wood")
    place.shape([box(x, -0.26, x + 0.08, -0.15) for x in (-0.17, 0.12)], "glow", weight=0.8)


def fence(place, rng, half=0.36):
    """A fence, 0.17 high; `half` is half its length."""
    place.shape([box(-half, y, half, y + 0.02) for y in (-0.11, -0.06)], "wood.fence", weight=0.8)
    boards = np.arange(-half + 0.04, half, 0.128)
    place.shape([_BOARD + (x, 0, 0, 0) for x in boards], "wood.fence")


_BOARD = outline("-30 0!, -30 -130!, 0 -170!, 30 -130!, 30 0!")


def lamp_post(place, rng):
    """A street lamp, 0.75 high."""
    place.shape(box(-0.012, -0.66, 0.012, 0), "far.post")
    place.shape(outline("-60 -640!, -40 -750!, 40 -750!, 60 -640!"), "glow")
    place.shape(outline("-60 -745!, 0 -790, 60 -745!"), "far.post")


def flowers(place, spots):
    """Flowers of one colour, 0.09 high, at (x, y, size)."""
    place.line([moved(_STALK, *spot) for spot in spots], "leaf")
    place.shape([moved(_PETALS, *spot) for spot in spots], "thing", weight=0.7)


_STALK = outline("0 0, 4 -60")
_PETALS = bumps(0.004, -0.075, 0.026, 0.024, 5, depth=0.35)


def parasol(place, rng):
    """A beach parasol, 0.6 high."""
    place.shape(box(-0.009, -0.5, 0.009, 0), "wood")
    _canopy(place, -0.36, 0.32, "thing", "thing.stripe")


def umbrella(place, rng):
    """An umbrella, its handle at the origin."""
    place.shape(box(-0.007, -0.4, 0.007, 0.06), "wood")
    _canopy(place, -0.30, 0.25, "thing", "thing.stripe")


def _canopy(place, y, wide, first, second):
    top = y - 0.55 * wide
    xs = np.linspace(-wide, wide, 5)
    rim = [
        (x, y - 0.1 * wide, 0, 0) if k % 2 else (x, y, 0, 1)
        for k, x in enumerate(np.linspace(wide, -wide, 9))
    ]
    dome = [(-0.8 * wide, y - 0.33 * wide, 0, 0), (0, top, 0, 0), (0.8 * wide, y - 0.33 * wide, 0, 0)]
    place.shape(np.array(rim + dome), first, shade=0.04)
    gore = [
        (xs[1], y, 0, 1),
        (0.75 * xs[1], y - 0.35 * wide, 0, 0),
        (0, top, 0, 1),
        (0.75 * xs[3], y - 0.35 * wide, 0, 0),
        (xs[3], y, 0, 1),
        (0.5 * xs[3], y - 0.1 * wide, 0, 0),
        (0, y, 0, 1),
        (0.5 * xs[1], y - 0.1 * wide, 0, 0),
    ]
    place.shape(np.array(gore), second, weight=0.8)


def balloon(place, rng):
    """A balloon on a string that ends at the origin."""
    place.line(outline("0 0, 15 -120, -5 -240, 8 -330"), "thing")
    place.shape(outline("0 -335!, -85 -430, -90 -520, 0 -600, 90 -520, 85 -430"), "thing", shade=0.04)
    place.spot(ellipse(-0.03, -0.52, 0.02, 0.035), "thing", tone="light")


def ball(place, rng):
    """A ball around the origin, radius 0.5."""
    place.shape(ellipse(0, 0, 0.5, 0.5), "thing", shade=0.14)
    place.shape(
        outline("-480 -130!, 0 -60, 480 -130!, 480 130!, 0 220, -480 130!"), "thing.stripe", weight=0.8
    )


def car(place, rng):
    """A small car, 0.5 high and 1 long, that looks to +x; its wheels are drawn apart, for they turn."""
    place.shape(
        outline(
            "-500 -90!, -510 -230, -440 -280, -300 -300!, -220 -480, -120 -500, 90 -500, 180 -460, "
            "280 -300!, 450 -270, 505 -200, 500 -90!"
        ),
        "thing",
        shade=0.05,
    )
    panes = ("-240 -300!, -180 -440, -30 -450!, -30 -300!", "10 -300!, 10 -450!, 120 -440, 220 -300!")
    place.shape([outline(points) for points in panes], "glow", weight=0.8)
    place.shape(ellipse(0.46, -0.2, 0.03, 0.04), "glow.lamp", weight=0.8)
    place.line(outline("-10 -300, -10 -110"), "thing")


def wheel(place, rng):
    """A wheel around the origin, radius 0.11."""
    place.shape(ellipse(0, 0, 0.11, 0.11), "hair.tyre")
    place.shape(ellipse(0, 0, 0.05, 0.05), "pale", weight=0.8)
    place.line(control([(-0.05, 0), (0.05, 0)]), "pale")


def sofa(place, rng):
    """A sofa, 0.36 high."""
    place.shape(outline("-340 -60!, -330 -330, -250 -360, 250 -360, 330 -330, 340 -60!"), "thing", shade=0.04)
    place.shape(box(-0.3, -0.17, 0.3, -0.05), "thing.seat", shade=0.03)
    arm = outline("0 0!, 0 -200, 50 -240, 100 -200, 100 0!")
    place.shape([arm + (x, 0, 0, 0) for x in (-0.40, 0.30)], "thing", shade=0.02)


def table(place, rng):
    """A table with a cup, 0.32 high."""
    place.shape([box(x, -0.26, x + 0.03, 0) for x in (-0.22, 0.2)], "wood")
    place.shape(box(-0.3, -0.29, 0.3, -0.24), "wood", shade=0.015)
    place.shape(outline("-40 -380!, -30 -290!, 40 -290!, 50 -380!"), "thing.cup")


def plant(place, rng):
    """A plant in a pot, 0.45 high."""
    for points in (
        "0 -130, -80 -200, -170 -330, -60 -290, 10 -180",
        "0 -130, -40 -300, 20 -450, 60 -300, 30 -150",
        "10 -130, 60 -230, 190 -330, 130 -200, 40 -120",
    ):
        place.shape(outline(points), "leaf", shade=0.02)
    place.shape(outline("-80 -140!, -60 0!, 60 0!, 80 -140!"), "thing.pot", shade=0.03)


def window(place, rng):
    """A window, 0.4 high, its sill at the origin."""
    place.shape(box(-0.22, -0.4, 0.22, 0), "pale")
    place.shape(box(-0.19, -0.37, 0.19, -0.03), "sky.window")
    place.shape(bumps(0.05, -0.2, 0.09, 0.045, 6), "pale", weight=0.8)
    place.line([outline("0 -370, 0 -30"), outline("-190 -200, 190 -200")], "pale")
    curtain = outline("270 -430!, 110 -430!, 160 -200, 200 20!, 270 20!")
    place.shape([curtain, moved(curtain, flip=True)], "cloth.curtain", shade=0.02)


def picture(place, rng):
    """A framed picture, 0.2 high."""
    place.shape(box(-0.13, -0.2, 0.13, 0), "wood.frame")
    place.shape(box(-0.105, -0.175, 0.105, -0.025), "wall.picture", weight=0.8)
    place.shape(outline("-90 -30!, -40 -110!, 10 -60!, 45 -95!, 90 -30!"), "leaf", weight=0.8)


def shelf(place, rng):
    """A bookshelf, 0.62 high."""
    place.shape(box(-0.2, -0.62, 0.2, 0), "wood")
    for row, y in enumerate((-0.43, -0.24, -0.05)):
        place.shape(box(-0.175, y - 0.14, 0.175, y), "far.shelf", tone="shade", weight=0.8)
        x = -0.17
        for book in range(int(rng.integers(3, 6))):
            wide, tall = rng.uniform(0.035, 0.06), rng.uniform(0.08, 0.12)
            place.shape(box(x, y - tall, x + wide, y), f"thing.book{row}{book}", weight=0.7)
            x += wide


def boat(place, rng):
    """A sailing boat, 0.4 high."""
    place.shape(outline("-200 -60!, 200 -60!, 140 0!, -150 0!"), "thing", shade=0.02)
    place.shape(outline("-10 -80!, -10 -400!, -160 -80!"), "pale")
    place.shape(outline("15 -80!, 15 -360!, 140 -80!"), "thing.sail")
