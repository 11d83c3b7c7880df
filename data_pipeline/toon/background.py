"""Places: layers from the sky to what stands before the figures, each with its own parallax."""

import numpy as np

from data_pipeline.toon import props, shapes
from data_pipeline.toon.drawing import placed
from data_pipeline.toon.motion import pick
from data_pipeline.toon.props import Place
from data_pipeline.toon.shapes import box, control, ellipse

PLACES = {  # how captions say where a figure stands, and where it goes
    "meadow": ("in a meadow", "across a meadow"),
    "garden": ("in a garden", "across a garden"),
    "forest": ("in a forest", "through a forest"),
    "city": ("in a street", "along a street"),
    "beach": ("on a beach", "along a beach"),
    "room": ("in a room", "through a room"),
    "mountains": ("in a mountain valley", "through a mountain valley"),
}
HORIZON = {
    "meadow": 0.66,
    "forest": 0.64,
    "city": 0.70,
    "beach": 0.64,
    "room": 0.68,
    "garden": 0.66,
    "mountains": 0.66,
}
_MARGIN = 0.9  # how far the world goes on beside the frame, in frame heights


def draw_back(stage, kind, rng):
    """Everything behind the figures.

    Args:
        kind: a key of `PLACES`.
    """
    horizon = HORIZON[kind]
    if kind == "room":
        _room(stage, rng, horizon)
        return
    _sky(stage, rng)
    {
        "meadow": _hills,
        "garden": _hills,
        "forest": _woods,
        "city": _street,
        "beach": _sea,
        "mountains": _peaks,
    }[kind](stage, rng, horizon)


def draw_front(stage, kind, rng):
    """What stands before the figures, at the lower edge; may hide them."""
    depth, choice = 1.35, rng.random()
    x = rng.uniform(*pick(rng, ((0.0, 0.15), (0.85, 1.0)))) * stage.aspect
    bone = stage.fixed(depth)
    things = {
        "room": (props.table, props.plant, props.sofa),
        "city": (props.lamp_post, props.bush, props.fence),
        "beach": (props.rock, props.palm, props.bush),
    }.get(kind, (props.bush, props.fence, props.tree))
    if choice < 0.75:
        thing = things[int(rng.integers(3))]
        size = (
            rng.uniform(0.95, 1.35)
            if thing in (props.tree, props.palm, props.lamp_post)
            else rng.uniform(1.2, 1.8)
        )
        thing(Place(stage.drawing, bone, "front", x, 1.04, size, far=False, flip=rng.random() < 0.5), rng)
    elif kind not in ("room", "city"):
        count = int(2.6 * stage.aspect) + 2
        spots = [((k + rng.uniform(-0.3, 0.3)) / 2.6, 1.02, rng.uniform(0.9, 1.3)) for k in range(count)]
        _plant(stage, bone, "front", spots)


def _band(stage, depth, y, slot, *, shade=0.0, waves=0.0, rng=None, bottom=1.6):
    """Ground that reaches from y to below the frame; `waves` is the height of its hills."""
    left, right = -_MARGIN, stage.aspect + _MARGIN
    if waves:
        x = np.arange(left, right + 0.4, 0.4) + rng.uniform(-0.05, 0.05)
        rise = y - waves * (0.5 + 0.5 * np.sin(x * rng.uniform(2.2, 3.8) + rng.uniform(0, 6.3)))
        top = control(np.column_stack([x, rise]))
        top[[0, -1], 3] = 1
        points = np.concatenate([top, control([(right + 0.4, bottom), (left, bottom)], corner=True)])
    else:
        points = box(left, y, right, bottom)
    stage.drawing.shape(stage.fixed(depth), points, slot, ink=(slot, "line"), weight=0.8)
    if shade:
        stage.drawing.spot(stage.fixed(depth), box(left, y + shade, right, bottom), slot, tone="shade")


def _ground_shadows(stage, slot):
    """What figures leave on the ground: before anything whose lines they would hide."""
    for bone, points in stage.shadows:
        stage.drawing.spot(bone, points, slot, tone="deep")


def _spread(stage, rng, count):
    """Places along the layer, apart from each other, that the camera may come to see."""
    left, right = -0.35, stage.aspect + 0.35
    step = (right - left) / count
    return [left + (k + rng.uniform(0.15, 0.85)) * step for k in range(count)]


def _sky(stage, rng):
    drawing, aspect = stage.drawing, stage.aspect
    far = stage.fixed(0.0)
    drawing.spot(far, box(-1, -1, aspect + 1, 2), "place/sky")
    if rng.random() < 0.5:
        y = rng.uniform(0.3, 0.5)
        drawing.spot(far, box(-1, y, aspect + 1, 2), "place/sky", tone="light")
    sort = rng.random()
    x, y, radius = rng.uniform(0.1, 0.9) * aspect, rng.uniform(0.12, 0.24), rng.uniform(0.06, 0.1)
    if sort < 0.45:
        drawing.shape(far, ellipse(x, y, radius, radius), "sun/glow", ink=("sun/glow", "line"), weight=0.8)
    elif sort < 0.7:
        moon = shapes.moved(
            shapes.outline("20 -100!, -60 -80, -105 0, -60 80, 20 100!, -25 50, -42 0, -25 -50"),
            x,
            y,
            10 * radius,
        )
        drawing.shape(far, moon, "sun/glow", ink=("sun/glow", "line"), weight=0.8)
        stars = [
            shapes.star(
                (k + rng.uniform(0.1, 0.9)) / 5, rng.uniform(0.04, 0.5), rng.uniform(0.012, 0.022), 4, 0.4
            )
            for k in range(int(5 * aspect))
        ]
        if stars:
            drawing.shape(far, stars, "sun/glow.star", ink=("sun/glow.star", "line"), weight=0.6)
    drift = rng.uniform(0.01, 0.04) if rng.random() < 0.4 else 0.0
    for cloud in range(int(rng.integers(0, 3 + int(aspect)))):
        wide, speed = rng.uniform(0.10, 0.19), drift * rng.uniform(0.7, 1.3)
        x, y = rng.uniform(-0.1, aspect + 0.1), rng.uniform(0.08, 0.36)
        bone = stage.bone(placed(len(stage.times), x + speed * stage.times, y), 0.1)
        points = shapes.bumps(0, 0, wide, 0.42 * wide, int(rng.integers(6, 9)), turn=rng.uniform(0, 1))
        slot = f"cloud{cloud % 2}/pale"
        drawing.shape(bone, points, slot, shade=0.03, ink=(slot, "line"), weight=0.8)


def _hills(stage, rng, horizon):
    for layer, (depth, y) in enumerate(((0.2, horizon - 0.10), (0.4, horizon - 0.03))):
        _band(stage, depth, y + 0.05, f"hill{layer}/far", waves=rng.uniform(0.08, 0.18), rng=rng)
    bone = stage.fixed(0.6)
    _band(stage, 0.6, horizon, "place/ground.back", waves=0.03, rng=rng)
    things = (props.tree, props.house, props.pine, props.bush)
    for index, x in enumerate(_spread(stage, rng, int(rng.integers(2, 4)))):
        thing = pick(rng, things, (0.45, 0.2, 0.2, 0.15))
        thing(Place(stage.drawing, bone, f"tree{index}", x, horizon + 0.02, rng.uniform(0.65, 0.95)), rng)
    if rng.random() < 0.4:
        middle = 0.5 * stage.aspect
        place = Place(stage.drawing, stage.fixed(0.8), "fence", middle, horizon + 0.07)
        props.fence(place, rng, middle + 0.75)
    _band(stage, 1.0, horizon + 0.08, "place/ground", shade=rng.uniform(0.16, 0.24), waves=0.02, rng=rng)
    _flowers(stage, rng, horizon)


def _flowers(stage, rng, horizon):
    _ground_shadows(stage, "place/ground")
    places = _spread(stage, rng, 3 + int(2 * stage.aspect))
    spots = [(x, horizon + rng.uniform(0.16, 0.24), rng.uniform(0.7, 1.0)) for x in places]
    _plant(stage, stage.fixed(1.0), "flower", [spot for spot in spots if rng.random() < 0.5])


def _plant(stage, bone, name, spots):
    """Flowers of three colours."""
    for color in range(min(3, len(spots))):
        props.flowers(Place(stage.drawing, bone, f"{name}{color}"), spots[color::3])


def _woods(stage, rng, horizon):
    _band(stage, 0.3, horizon - 0.12, "hill0/leaf", waves=0.12, rng=rng)
    _band(stage, 0.5, horizon, "place/ground.back")
    for row, (depth, size) in enumerate(((0.5, 0.9), (0.8, 1.25))):
        for index, x in enumerate(_spread(stage, rng, 3 + int(stage.aspect))):
            thing = (props.pine, props.tree)[int(rng.random() < 0.4)]
            place = Place(
                stage.drawing,
                stage.fixed(depth),
                f"tree{row}{index % 2}",
                x,
                horizon + 0.05 + 0.05 * row,
                size * rng.uniform(0.85, 1.15),
            )
            thing(place, rng)
    _band(stage, 1.0, horizon + 0.10, "place/ground", shade=0.2, waves=0.02, rng=rng)
    _flowers(stage, rng, horizon)


def _peaks(stage, rng, horizon):
    for layer, (depth, high) in enumerate(((0.15, 0.42), (0.3, 0.26))):
        for x in _spread(stage, rng, 2 + int(stage.aspect)):
            top, wide = high * rng.uniform(0.75, 1.1), rng.uniform(0.35, 0.5)
            peak = control([(x - wide, horizon), (x, horizon - top), (x + wide, horizon)], corner=True)
            slot = f"peak{layer}/far"
            stage.drawing.shape(stage.fixed(depth), peak, slot, shade=0.0, ink=(slot, "line"), weight=0.8)
            if layer == 0:
                cap = control(
                    [
                        (x, horizon - top),
                        (x + 0.3 * wide, horizon - 0.7 * top),
                        (x + 0.1 * wide, horizon - 0.76 * top),
                        (x - 0.06 * wide, horizon - 0.66 * top),
                        (x - 0.3 * wide, horizon - 0.7 * top),
                    ],
                    corner=True,
                )
                stage.drawing.shape(
                    stage.fixed(depth), cap, "snow/pale", ink=("snow/pale", "line"), weight=0.7
                )
    _hills(stage, rng, horizon)


def _street(stage, rng, horizon):
    drawing = stage.drawing
    _houses(stage, rng, stage.fixed(0.3), "tower", "far", horizon, 0.42)
    _houses(stage, rng, stage.fixed(0.6), "house", "wall", horizon, 0.42)
    _band(stage, 1.0, horizon + 0.02, "place/ground.path")
    for index, x in enumerate(_spread(stage, rng, int(rng.integers(1, 4)))):
        thing = (props.lamp_post, props.tree, props.bush)[int(rng.integers(3))]
        thing(
            Place(drawing, stage.fixed(0.95), f"street{index}", x, horizon + 0.06, rng.uniform(0.75, 0.95)),
            rng,
        )
    _band(stage, 1.0, horizon + 0.12, "place/ground", shade=0.0)
    _ground_shadows(stage, "place/ground")
    marks = [
        shapes.outline("0 955!, 200 955!, 180 975!, -20 975!") + (x, 0, 0, 0)
        for x in np.arange(-0.8, stage.aspect + 0.8, 0.42)
    ]
    drawing.spot(stage.fixed(1.0), marks, "place/ground", tone="light")


def _houses(stage, rng, bone, name, kind, horizon, high):
    """A row of houses in three colours; those of kind wall have windows."""
    x, houses = -0.6, ([], [], [])
    while x < stage.aspect + 0.6:
        wide, top = rng.uniform(0.22, 0.38), horizon - high * rng.uniform(0.7, 1.3)
        color = len(houses[0]) + len(houses[1]) + len(houses[2])
        houses[color % 3].append((x, top, x + wide, horizon + 0.1))
        x += wide
    for color, row in enumerate(houses):
        slot = f"{name}{color}/{kind}"
        stage.drawing.shape(bone, [box(*sides) for sides in row], slot, ink=(slot, "line"), weight=0.8)
        panes = [pane for sides in row for pane in _panes(*sides)] if kind == "wall" else []
        lit = rng.random(len(panes)) < 0.7
        for light, lamp in ((True, "glow"), (False, "sky")):
            boxes = [pane for pane, on in zip(panes, lit, strict=True) if on == light]
            if boxes:
                stage.drawing.shape(bone, boxes, f"{name}{color}/{lamp}", ink=(slot, "line"), weight=0.6)


def _panes(left, top, right, bottom):
    columns = 2 if right - left < 0.3 else 3
    step = (right - left) / (columns + 0.3)
    lefts = [left + (column + 0.3) * step for column in range(columns)]
    return [
        box(x, y, x + 0.62 * step, y + 0.065)
        for y in np.arange(top + 0.05, bottom - 0.18, 0.11)
        for x in lefts
    ]


def _sea(stage, rng, horizon):
    drawing = stage.drawing
    if rng.random() < 0.5:
        _band(stage, 0.15, horizon - 0.1, "hill0/far", waves=0.12, rng=rng, bottom=horizon)
    _band(stage, 0.3, horizon - 0.12, "place/sky.sea")
    if rng.random() < 0.6:
        x, size = rng.uniform(0.1, 0.9) * stage.aspect, rng.uniform(0.5, 0.8)
        rock = 0.05 * np.sin(2 * stage.times)
        bone = stage.bone(placed(len(stage.times), x + 0.03 * stage.times, horizon - 0.06, rock), 0.4)
        props.boat(Place(drawing, bone, "boat", size=size), rng)
    bone = stage.bone(placed(len(stage.times), 0.02 * np.sin(1.7 * stage.times)), 0.5)
    waves = [
        shapes.outline("-70 0, -35 -12, 0 0, 35 -12, 70 0") + (x, horizon - rng.uniform(0.02, 0.07), 0, 0)
        for x in _spread(stage, rng, 5 + int(stage.aspect))
    ]
    drawing.line(bone, waves, weight=0.7, ink=("place/sky.sea", "line"))
    _band(stage, 1.0, horizon + 0.02, "place/ground", shade=0.2, waves=0.03, rng=rng)
    _ground_shadows(stage, "place/ground")
    for index, x in enumerate(_spread(stage, rng, int(rng.integers(1, 3)))):
        thing = (props.palm, props.parasol, props.rock)[int(rng.integers(3))]
        thing(
            Place(
                drawing,
                stage.fixed(0.95),
                f"shore{index}",
                x,
                horizon + 0.08,
                rng.uniform(0.8, 1.05),
                flip=rng.random() < 0.5,
            ),
            rng,
        )


def _room(stage, rng, horizon):
    drawing, left, right = stage.drawing, -_MARGIN, stage.aspect + _MARGIN
    bone = stage.fixed(0.7)
    drawing.spot(bone, box(left, -1, right, 2), "place/wall")
    pattern = rng.random()
    if pattern < 0.35:
        stripes = [box(x, -1, x + 0.08, horizon) for x in np.arange(left, right, 0.16)]
        drawing.spot(bone, stripes, "place/wall", tone="shade")
    elif pattern < 0.6:
        drawing.shape(
            bone, box(left, 0.44, right, 2), "place/wall.low", ink=("place/wall.low", "line"), weight=0.8
        )
    wall = [props.window, props.picture, props.picture, props.window]
    for index, x in enumerate(_spread(stage, rng, 2 + int(stage.aspect))):
        wall[int(rng.integers(4))](Place(drawing, bone, f"wall{index}", x, rng.uniform(0.40, 0.46)), rng)
    _band(stage, 0.8, horizon, "place/wood.floor")
    drawing.shape(
        bone,
        box(left, horizon - 0.03, right, horizon + 0.005),
        "place/pale",
        weight=0.8,
        ink=("place/pale", "line"),
    )
    things = (props.sofa, props.plant, props.shelf, props.table)
    for index, x in enumerate(_spread(stage, rng, 1 + int(1.4 * stage.aspect))):
        thing = things[int(rng.integers(4))]
        thing(
            Place(drawing, stage.fixed(0.85), f"room{index}", x, horizon + 0.06, rng.uniform(0.9, 1.15)), rng
        )
    _ground_shadows(stage, "place/wood.floor")
    if rng.random() < 0.6:
        rug = ellipse(rng.uniform(0.3, 0.7) * stage.aspect, 0.91, 0.5, 0.065)
        drawing.shape(stage.fixed(1.0), rug, "rug/cloth", ink=("rug/cloth", "line"), weight=0.8)
