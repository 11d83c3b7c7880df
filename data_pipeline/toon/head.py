"""Heads: face, eyes, hair, hats. Shapes are in thousandths around the middle of the face, 370 high in all."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.toon import motion, shapes
from data_pipeline.toon.drawing import placed
from data_pipeline.toon.motion import pick
from data_pipeline.toon.shapes import ellipse, outline

_FACE = outline("0 -160, 125 -120, 172 -10, 150 85, 75 148, 30 158, -50 142, -130 85, -160 -10, -120 -120")
_EAR = outline("-175 10, -140 -10, -125 40, -140 85, -170 70")
_CROWN = outline("-200 90!, -215 -30, -170 -140, -60 -215, 60 -210, 165 -145, 200 -30, 190 70!")
_SPIKED_CROWN = outline(
    "-195 90!, -265 40!, -205 -20!, -280 -90!, -190 -110!, -215 -205!, -100 -185!, -60 -270!, 30 -205!, "
    "120 -255!, 140 -165!, 235 -145!, 185 -60!, 225 20!, 180 70!"
)
_SHINE = outline("-110 -120, -20 -155, 80 -145, 120 -110, 70 -128, -20 -135")
_FRINGES = {
    "spiky": outline(
        "176 40!, 160 -50!, 130 -5 .4!, 100 -75!, 50 -12 .4!, 10 -85!, -55 -15 .4!, -85 -70!, "
        "-130 10 .4!, -145 -20!, -160 110 .4!"
    ),
    "straight": outline("176 90!, 158 -20!, 60 -38, -60 -34, -140 -10!, -165 120!"),
    "swept": outline("178 80!, 150 10, 70 -60, 0 -120!, -50 -50, -110 -5, -150 30, -165 110!"),
    "parted": outline("176 110!, 160 20, 120 -60, 60 -125!, 20 -60, -60 -10, -120 20, -160 110!"),
}
_BACKS = {
    "short": outline("0 -200, 130 -170, 185 -60, 170 60, 90 110, -120 125, -190 95, -205 -40, -135 -170"),
    "bobbed": outline(
        "0 -205, 130 -175, 200 -60, 200 60, 170 150!, 50 165, -80 170, -190 160 .6, -245 170 .6!, "
        "-225 70, -215 -40, -135 -170"
    ),
    "long": outline(
        "0 -205, 130 -175, 200 -60, 200 80, 190 220 .5, 215 340 1!, 110 325 1, 20 390 1!, -70 345 1, "
        "-170 400 1!, -200 340 1, -270 350 1!, -240 200 .6, -225 70, -215 -40, -135 -170"
    ),
}
_TAIL = outline(
    "20 -35, -55 -45 .1, -125 10 .3, -165 110 .6, -160 230 .9, -110 330 1!, -70 220 .8, -55 120 .5, "
    "-15 50 .1, 30 25"
)
_BRAID = outline(
    "-20 0, -48 40 .2, -30 78 .3, -52 115 .4, -32 152 .5, -46 190 .7, -22 224 .8, -45 300 1!, "
    "10 300 1!, 14 224 .8, 36 190 .7, 14 152 .5, 42 115 .4, 16 78 .3, 38 40 .2, 20 0"
)
_TUFT = outline("-30 -195!, -10 -250, 45 -275 .6!, 20 -240, 30 -195!")
_SMILES = {
    "smiling": outline("-26 -4!, 0 4, 28 -4!, 18 20, 2 27, -14 20"),
    "laughing": outline("-38 -8!, 0 0, 40 -8!, 30 30, 2 46, -26 30"),
    "small": outline("-20 0, 0 10, 22 0"),
    "round": ellipse(0.002, 0.01, 0.016, 0.02),
}
_EYELID = outline("-42 -8, -28 -38, 0 -50, 28 -38, 42 -12")
_CLOSED = outline("-36 0, 0 18, 36 0")
_BROW = outline("-32 6, 0 -8, 34 4")
_HATS = {
    "cap": (
        outline("-208 -40!, -195 -130, -120 -225, 20 -250, 140 -215, 200 -120, 206 -45!, 0 -78"),
        outline("90 -72!, 200 -92, 300 -62, 322 -28!, 200 -46, 100 -36!"),
    ),
    "straw hat": (
        outline("-150 -100!, -140 -210, -70 -265, 60 -265, 130 -210, 150 -100!"),
        outline("-310 -70, -200 -120, 0 -135, 200 -120, 310 -70, 200 -45, 0 -60, -200 -45"),
    ),
    "woolly hat": (
        outline("-205 -60!, -195 -160, -110 -250, 20 -270, 140 -235, 195 -150, 203 -60!"),
        outline("-222 -50, -215 -100, 0 -125, 212 -100, 222 -50, 212 -25, 0 -60, -212 -25"),
    ),
    "pointed hat": (
        outline("-190 -90!, -110 -260, -70 -400 .4, -130 -470 1!, 20 -430 .6, 80 -290, 185 -90!"),
        outline("-330 -40, -200 -105, 0 -125, 200 -105, 330 -40, 200 -45, 0 -60, -200 -45"),
    ),
}
HAIR = ("short", "bobbed", "long", "curly", "spiky", "pony-tail", "pig-tails", "braid", "bun")
_WORDS = {"pony-tail": "a pony-tail", "pig-tails": "pig-tails", "braid": "a braid", "bun": "a bun"}


@dataclass(frozen=True)
class Look:
    """A head: its hair and fringe, mouth, hat or ears or bow (`top`, "" for none), glasses and blush."""

    hair: str
    fringe: str
    mouth: str
    top: str
    glasses: bool
    blush: bool
    eye: float
    blink_seed: int

    @classmethod
    def draw(cls, rng, female):
        """A head chosen at random."""
        hair = pick(
            rng,
            HAIR,
            (0.06, 0.16, 0.2, 0.12, 0.04, 0.14, 0.14, 0.07, 0.07)
            if female
            else (0.36, 0.08, 0.08, 0.16, 0.26, 0.06, 0.0, 0.0, 0.0),
        )
        tops = (*_HATS, "cat ears", "bow" if female else "tuft")
        top = pick(rng, tops) if rng.random() < 0.45 else ""
        if hair in ("spiky", "bun") and top in _HATS:
            top = ""
        return cls(
            hair,
            pick(rng, list(_FRINGES)),
            pick(rng, list(_SMILES)),
            top,
            rng.random() < 0.14,
            rng.random() < 0.7,
            rng.uniform(0.9, 1.15),
            int(rng.integers(2**31)),
        )

    def describe(self):
        """Words for captions; names no colours."""
        words = _WORDS.get(self.hair, f"{self.hair} hair")
        if self.glasses:
            words += ", glasses"
        return f"{words}, {_article(self.top)}" if self.top and self.top != "tuft" else words


def _article(word):
    return word if word.endswith("ears") else f"a {word}"


def draw_back(stage, person, matrix, bone, swing, depth):
    """Hair behind the body."""
    drawing, look, slot = stage.drawing, person.look, f"{person.name}/hair"
    frames = len(stage.times)
    if look.hair in ("pony-tail", "pig-tails"):
        places = (
            ((-0.17, -0.10, 1.1),) if look.hair == "pony-tail" else ((-0.19, -0.03, 0.85), (0.17, 0.0, -0.75))
        )
        for x, y, size in places:
            tail = (
                matrix
                @ placed(frames, x, y, -0.3 * swing * np.sign(size) - 0.1)
                @ placed(frames, 0, 0, 0, size, abs(size))
            )
            drawing.shape(stage.bone(tail, depth, -0.06 * swing), _TAIL, slot, shade=0.03)
    curls = shapes.bumps(-0.012, -0.02, 0.255, 0.235, 11, turn=0.2)
    back = curls if look.hair == "curly" else _BACKS.get(look.hair, _BACKS["short"])
    drawing.shape(bone, back, slot, tone="shade")
    if look.hair == "bun":
        drawing.shape(bone, ellipse(-0.06, -0.255, 0.085, 0.075), slot, shade=0.04)
    if look.hair == "braid":
        braid = stage.bone(matrix @ placed(frames, -0.175, 0.11, -0.25 * swing, 1.15), depth, -0.05 * swing)
        drawing.shape(braid, _BRAID, slot, shade=0.02)


def draw_front(stage, person, bone):
    """Face, features, fringe, hat."""
    drawing, look, name = stage.drawing, person.look, person.name
    skin, hair = f"{name}/skin", f"{name}/hair"
    drawing.spot(bone, _FACE, skin)
    shadow = ellipse(0.0, -0.07, 0.165, 0.085)
    drawing.spot(bone, shadow, skin, tone="shade")
    drawing.line(bone, _FACE, closed=True)
    _features(stage, drawing, bone, look, name, skin)
    if look.hair not in ("spiky", "curly"):
        drawing.shape(bone, _EAR + [0.018, 0.03, 0, 0], skin, weight=0.8)
    _fringe(drawing, bone, look, hair)
    _top(drawing, bone, look, name, hair)


def _features(stage, drawing, bone, look, name, skin):
    closed = motion.blink(np.random.default_rng(look.blink_seed), stage.times)
    open_ = ~closed if closed.any() else None
    sides = ((-0.052, look.eye), (0.098, 0.86 * look.eye))  # turned a little to the right
    y, tall = 0.04, look.eye

    def both(draw):
        return [draw(x, wide) for x, wide in sides]

    if look.blush:
        drawing.spot(bone, [ellipse(x, 0.098, 0.028, 0.016) for x in (-0.085, 0.118)], skin, tone="blush")
    drawing.spot(
        bone, both(lambda x, wide: ellipse(x, y, 0.035 * wide, 0.046 * tall)), "white", visible=open_
    )
    drawing.shape(
        bone,
        both(lambda x, wide: ellipse(x + 0.005, y + 0.003, 0.027 * wide, 0.041 * tall)),
        f"{name}/eye",
        weight=0.7,
        visible=open_,
    )
    drawing.spot(
        bone,
        both(lambda x, wide: ellipse(x + 0.006, y - 0.003, 0.016 * wide, 0.028 * tall)),
        "dark",
        in_sketch=True,
        visible=open_,
    )
    drawing.spot(
        bone, both(lambda x, wide: ellipse(x - 0.006, y - 0.016, 0.011, 0.014)), "white", visible=open_
    )
    drawing.line(
        bone, both(lambda x, wide: _EYELID * (wide, tall, 1, 1) + (x, y, 0, 0)), weight=1.5, visible=open_
    )
    if closed.any():
        drawing.line(
            bone,
            both(lambda x, wide: _CLOSED * (wide, tall, 1, 1) + (x, y, 0, 0)),
            weight=1.4,
            visible=closed,
        )
    drawing.line(
        bone, both(lambda x, wide: _BROW * (wide, 1, 1, 1) + (x + 0.006, y - 0.078, 0, 0)), weight=0.8
    )
    if look.glasses:
        drawing.line(
            bone,
            both(lambda x, wide: ellipse(x + 0.004, y + 0.004, 0.062 * wide, 0.062)),
            weight=0.8,
            closed=True,
        )
        drawing.line(bone, outline("14 40, 30 36, 44 40"), weight=0.8)
    drawing.line(bone, outline("38 78, 45 84"), weight=0.8)
    mouth = _SMILES[look.mouth] + [0.028, 0.108, 0, 0]
    if look.mouth == "small":
        drawing.line(bone, mouth)
    else:
        drawing.shape(bone, mouth, f"{name}/mouth", weight=0.8)


def _fringe(drawing, bone, look, hair):
    if look.hair == "curly":
        drawing.shape(bone, _curls(), hair, shade=0.03)
        return
    crown = _SPIKED_CROWN if look.hair == "spiky" else _CROWN
    drawing.shape(bone, np.concatenate([crown, _FRINGES[look.fringe]]), hair, shade=0.03)
    drawing.spot(bone, _SHINE, hair, tone="light")


def _curls():
    """A cap of curls whose lower edge leaves the face free."""
    above = shapes.bumps(-0.005, -0.03, 0.225, 0.205, 9, turn=np.pi)[:15]
    below = outline(
        "185 60!, 150 50, 135 -5!, 100 0, 85 -45!, 40 -25, 15 -60!, -40 -30, -65 -45!, -110 0, -125 0!, "
        "-150 60, -185 90!"
    )
    return np.concatenate([above, below])


def _top(drawing, bone, look, name, hair):
    slot = f"{name}/cloth.hat"
    if look.top in _HATS:
        dome, brim = _HATS[look.top]
        drawing.shape(bone, dome, slot, shade=0.04)
        drawing.shape(bone, brim, slot, shade=0.02)
        if look.top == "woolly hat":
            drawing.shape(bone, shapes.bumps(0.02, -0.29, 0.06, 0.055, 7), f"{name}/cloth.band", shade=0.02)
        elif look.top != "cap":
            band = outline("-150 -112!, 0 -138, 150 -112!, 146 -150!, 0 -178, -146 -150!")
            drawing.shape(bone, band, f"{name}/cloth.band", weight=0.8)
    elif look.top == "cat ears":
        for points in ("-175 -130!, -190 -290!, -70 -200!", "165 -130!, 190 -285!, 70 -200!"):
            ear = outline(points)
            drawing.shape(bone, ear, hair, shade=0.02)
            inner = shapes.moved(ear, *(0.45 * ear[:, :2].mean(axis=0)), scale=0.55)
            drawing.spot(bone, inner, f"{name}/skin", tone="blush")
    elif look.top == "bow":
        bow = outline("-110 -195!, -200 -260!, -205 -150!, -110 -195!, -20 -262!, -15 -152!")
        drawing.shape(bone, bow, f"{name}/cloth.bow", shade=0.02)
        drawing.shape(bone, ellipse(-0.11, -0.197, 0.028, 0.026), f"{name}/cloth.bow")
    elif look.top == "tuft":
        drawing.shape(bone, _TUFT, hair)
