"""Animals: cats, dogs and rabbits on four legs, chicks that hop, birds that fly.

Lengths are in units of the animal's length; it stands at the origin and looks to +x.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.toon import motion, shapes
from data_pipeline.toon.drawing import placed
from data_pipeline.toon.shapes import ellipse, outline

KINDS = ("cat", "dog", "rabbit", "chick", "bird")
_BODY = outline("-360 -440, -300 -570, -50 -575, 200 -600, 330 -560, 350 -430, 250 -330, 0 -300, -260 -300")
_CAT_TAIL = outline(
    "30 -20, -60 -90 .3, -120 -230 .8, -80 -360 1, -20 -350 1, -40 -250 .8, 10 -130 .3, 50 30"
)
_DOG_TAIL = outline("30 -40, -90 -130 .6, -160 -260 1!, -50 -200 .7, 50 20")
_CAT_EARS = ("-150 -70!, -130 -290!, 10 -160!", "30 -165!, 150 -280!, 150 -60!")
_DOG_EARS = (
    "-140 -130, -190 -60, -200 90 .3, -130 110 .3, -90 0, -70 -120",
    "70 -150, 150 -130, 200 -10 .3, 150 40 .3, 100 -40, 60 -100",
)
_RABBIT_EARS = (
    "-110 -120, -160 -330 .6, -120 -470 1, -50 -400 1, -30 -150",
    "10 -150, 20 -400 .8, 90 -480 1, 130 -380 .8, 90 -120",
)
_WING = outline("-180 0, -60 -60, 120 -50, 220 0, 90 60 .6, 0 160 1!, -60 110 .8!, -110 200 1!, -140 80 .6!")
_CHICK_WING = outline("-130 -20, -240 60 1!, -150 110 .3, -70 70")
_BEAK = outline("130 -35!, 240 10!, 130 45!")


@dataclass(frozen=True)
class Animal:
    """An animal: `kind` is one of `KINDS`, `name` owns its colours, `patch`: it has two of them."""

    name: str
    kind: str
    patch: bool
    collar: bool
    blink_seed: int

    @classmethod
    def draw(cls, rng, name):
        """An animal chosen at random."""
        return cls(
            name, motion.pick(rng, KINDS), rng.random() < 0.6, rng.random() < 0.4, int(rng.integers(2**31))
        )

    def describe(self):
        """For captions; names no colours."""
        collar = " with a collar" if self.collar and self.kind in ("cat", "dog") else ""
        return f"a {self.kind}{collar}"


def draw_animal(stage, animal, gait, root, depth=1.0):
    """Adds an animal to the stage's drawing; `root` [T, 3, 3] maps its coordinates to the world's."""
    phase = 2 * np.pi * (stage.times / gait.period + gait.start)
    draw = {"chick": _chick, "bird": _bird}.get(animal.kind, _four_legs)
    draw(stage, animal, gait, phase, root, depth)


def _four_legs(stage, animal, gait, phase, root, depth):
    drawing, frames, name = stage.drawing, len(phase), animal.name
    fur = f"{name}/fur"
    fast = gait.action == "run" or animal.kind == "rabbit"
    moves = gait.action in (*motion.TRAVELLING, "jump", "dance")
    reach = (0.75 if fast else 0.42) * gait.vigour if moves else 0.0
    lift = (0.16 if fast else 0.03) * gait.vigour * np.abs(np.sin(phase)) if moves else 0.012 * np.sin(phase)
    tilt = 0.12 * np.sin(phase) * fast * moves
    body = root @ placed(frames, 0, -lift, 0) @ placed(frames, 0, -0.4, tilt) @ placed(frames, 0, 0.4)
    bone = stage.bone(body, depth)
    swing = np.sin(phase if moves else 0.7 * phase)
    x_tail = -0.34 if animal.kind != "rabbit" else -0.36
    tail = stage.bone(body @ placed(frames, x_tail, -0.5, 0.25 * swing), depth, 0.10 * swing)
    head = body @ placed(frames, 0.40, -0.66, 0.10 * np.sin(phase + 1) * (1 if moves else 0.6))
    head_bone = stage.bone(head, depth, -0.08 * swing)

    def leg(x, offset, tone):
        angle = reach * np.sin(phase + offset)
        limb = stage.bone(body @ placed(frames, x, -0.38, angle), depth)
        drawing.shape(limb, shapes.tube(0.35, 0.065, 0.048), fur, shade=0.03 * (tone == "base"), tone=tone)
        drawing.shape(
            limb, ellipse(0.022, 0.355, 0.072, 0.042), f"{name}/fur.paw" if animal.patch else fur, tone=tone
        )

    offsets = (0.4, 0.0, np.pi + 0.4, np.pi) if fast else (np.pi, 0.0, 0.0, np.pi)
    leg(-0.20, offsets[0], "shade")
    leg(0.26, offsets[2], "shade")
    if animal.kind == "rabbit":
        drawing.shape(
            tail, shapes.bumps(-0.03, 0, 0.09, 0.085, 7), f"{name}/fur.paw" if animal.patch else fur
        )
    else:
        drawing.shape(tail, _CAT_TAIL if animal.kind == "cat" else _DOG_TAIL, fur, shade=0.03)
    drawing.shape(bone, _BODY, fur, shade=0.07)
    leg(-0.26, offsets[1], "base")
    leg(0.19, offsets[3], "base")
    joints = [ellipse(-0.24, -0.41, 0.075, 0.07), ellipse(0.19, -0.42, 0.065, 0.06)]
    drawing.spot(bone, joints, fur)  # no line where the legs leave the body
    if animal.patch:
        drawing.shape(bone, ellipse(-0.08, -0.5, 0.12, 0.06), f"{name}/fur.paw", weight=0.7)
    if animal.collar and animal.kind != "rabbit":
        drawing.shape(
            bone, outline("235 -590!, 300 -500!, 375 -480!, 390 -540!, 300 -640!"), f"{name}/cloth.collar"
        )
    _animal_head(stage, animal, head_bone, fur)


def _animal_head(stage, animal, bone, fur):
    drawing, name = stage.drawing, animal.name
    ears = {"cat": _CAT_EARS, "dog": _DOG_EARS, "rabbit": _RABBIT_EARS}[animal.kind]
    hanging = animal.kind == "dog"
    ear_slot = f"{name}/fur.paw" if hanging and animal.patch else fur
    if not hanging:
        ears = [outline(points) for points in ears]
        drawing.shape(bone, ears, fur)
        inner = [shapes.moved(ear, *(0.42 * ear[:, :2].mean(axis=0)), scale=0.58) for ear in ears]
        drawing.spot(bone, inner, fur, tone="blush")
    drawing.shape(bone, ellipse(0, 0, 0.215, 0.185), fur, shade=0.05)
    if animal.patch:
        drawing.shape(bone, ellipse(0.07, 0.075, 0.115, 0.085), f"{name}/fur.paw", weight=0.7)
    closed = motion.blink(np.random.default_rng(animal.blink_seed), stage.times)
    eyes = (-0.055, 0.125)
    drawing.spot(
        bone, [ellipse(x, -0.02, 0.032, 0.046) for x in eyes], "dark", in_sketch=True, visible=~closed
    )
    drawing.spot(bone, [ellipse(x - 0.010, -0.036, 0.012, 0.015) for x in eyes], "white", visible=~closed)
    if closed.any():
        drawing.line(bone, [outline("-35 0, 0 16, 35 0") + [x, -0.02, 0, 0] for x in eyes], visible=closed)
    drawing.spot(bone, ellipse(0.065, 0.05, 0.03, 0.021), "dark", in_sketch=True)
    drawing.line(bone, outline("20 90, 45 105, 64 75!, 84 105, 110 88"), weight=0.8)
    if hanging:
        drawing.shape(bone, [outline(points) for points in ears], ear_slot, shade=0.03)
    if animal.kind == "cat":
        whiskers = [
            shapes.control([(near, y), (far, y + 0.6 * (y - 0.065))])
            for near, far in ((0.17, 0.30), (-0.07, -0.22))
            for y in (0.055, 0.085)
        ]
        drawing.line(bone, whiskers, weight=0.7)


def _chick(stage, animal, gait, phase, root, depth):
    """Round, hopping, flattened as it lands."""
    drawing, frames, name = stage.drawing, len(phase), animal.name
    hop = np.abs(np.sin(phase)) * (1.0 if gait.action != "stand" else 0.15)
    squash = 1 + 0.16 * (0.35 - np.minimum(hop, 0.7))
    body = (
        root @ placed(frames, 0, -0.32 * gait.vigour * hop) @ placed(frames, 0, -0.05, 0, squash, 1 / squash)
    )
    bone = stage.bone(body, depth)
    feet = [
        shapes.control([(x, -0.03), (x + 0.01, 0.05), (x + 0.09, 0.05)], corner=True) for x in (-0.1, 0.1)
    ]
    drawing.line(bone, feet, weight=1.2, ink=(f"{name}/thing.beak", "line"))
    fur = f"{name}/fur"
    drawing.shape(bone, ellipse(0, -0.36, 0.36, 0.34), fur, shade=0.10)
    drawing.line(bone, outline("0 -700, -60 -820, 10 -770, 70 -830"))
    wing = stage.bone(body @ placed(frames, -0.02, -0.36, -0.9 * hop * gait.vigour), depth)
    drawing.shape(wing, _CHICK_WING, fur, tone="shade")
    drawing.spot(bone, [ellipse(x, -0.44, 0.042, 0.058) for x in (0.06, 0.24)], "dark", in_sketch=True)
    drawing.spot(bone, [ellipse(x - 0.012, -0.462, 0.015, 0.018) for x in (0.06, 0.24)], "white")
    drawing.shape(bone, _BEAK + [0.02, -0.33, 0, 0], f"{name}/thing.beak", weight=0.9)
    drawing.spot(bone, ellipse(0.05, -0.33, 0.05, 0.03), fur, tone="blush")


def _bird(stage, animal, gait, phase, root, depth):
    drawing, frames, name = stage.drawing, len(phase), animal.name
    beat = np.sin(2 * phase)
    body = root @ placed(frames, 0, 0.08 * gait.vigour * np.cos(2 * phase))
    bone = stage.bone(body, depth)
    fur, other = f"{name}/fur", f"{name}/fur.paw"

    def wing(x, tone):
        stroke = np.where(np.abs(beat) < 0.15, 0.15, np.abs(beat)) * -np.sign(beat + 1e-6) * gait.vigour
        limb = stage.bone(body @ placed(frames, x, -0.06, 0.2, 1.0, 1.5 * stroke), depth)
        drawing.shape(limb, _WING, other if animal.patch else fur, tone=tone)

    wing(0.04, "shade")
    drawing.shape(bone, outline("-300 -40!, -560 -90!, -520 0!, -570 60!, -300 60!"), fur, tone="shade")
    drawing.shape(bone, ellipse(-0.05, 0, 0.34, 0.17), fur, shade=0.06)
    drawing.shape(bone, ellipse(0.26, -0.10, 0.16, 0.15), fur)
    drawing.spot(bone, ellipse(0.19, -0.055, 0.10, 0.09), fur)
    drawing.shape(bone, _BEAK + [0.27, -0.09, 0, 0], f"{name}/thing.beak", weight=0.9)
    drawing.spot(bone, ellipse(0.30, -0.13, 0.03, 0.038), "dark", in_sketch=True)
    wing(-0.06, "base")
