"""People: a body of random build, dressed, with hair and a face, that moves as its gait says.

Lengths are in units of the person's height. The person stands at the origin and looks to +x.
"""

from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.toon import head, shapes
from data_pipeline.toon.drawing import placed
from data_pipeline.toon.motion import pick
from data_pipeline.toon.shapes import control, outline

CLOTHES = ("coat", "shirt and trousers", "shirt and shorts", "blouse and skirt", "dress", "hooded jacket")
_WITH_SKIRT = ("blouse and skirt", "dress")
_SHOE = outline("-36 -38, 26 -38, 38 -12, 78 -2, 80 22!, -40 22!")


@dataclass(frozen=True)
class Person:
    """What a person looks like.

    Attributes:
        name: owner of its colours in the palette.
        kind: girl, boy, woman or man, for the caption.
        look: `head.Look`.
        clothes: one of `CLOTHES`.
        head, leg, torso: lengths.
        shoulder, hip: half widths; `limb`, half the thickness of a leg.
        scarf, bag: what else is worn.
    """

    name: str
    kind: str
    look: "head.Look"
    clothes: str
    head: float
    leg: float
    torso: float
    shoulder: float
    hip: float
    limb: float
    scarf: bool
    bag: bool

    @classmethod
    def draw(cls, rng, name):
        """A person chosen at random."""
        child = rng.random() < 0.6
        female = rng.random() < 0.5
        kind = ("girl" if female else "boy") if child else ("woman" if female else "man")
        size = rng.uniform(0.42, 0.50) if child else rng.uniform(0.31, 0.38)  # of the head, hair and all
        leg = (1 - size) * rng.uniform(0.46, 0.54)
        clothes = pick(
            rng, CLOTHES, (0.2, 0.1, 0.1, 0.25, 0.25, 0.1) if female else (0.25, 0.3, 0.25, 0.0, 0.0, 0.2)
        )
        broad = rng.uniform(0.9, 1.15)
        limb = rng.uniform(0.040, 0.050) if child else rng.uniform(0.034, 0.042)
        return cls(
            name,
            kind,
            head.Look.draw(rng, female),
            clothes,
            size,
            leg,
            1 - size - leg + 0.03,
            broad * (0.078 if child else 0.082),
            broad * (0.075 if child else 0.068),
            limb,
            rng.random() < 0.2,
            rng.random() < 0.15,
        )

    def describe(self):
        """For captions; names no colours."""
        extras = [
            self.look.describe(),
            {"coat": "a coat", "dress": "a dress", "hooded jacket": "a hooded jacket"}.get(
                self.clothes, f"a {self.clothes}"
            ),
        ]
        extras += ["a scarf"] if self.scarf else []
        extras += ["a bag"] if self.bag else []
        return f"a {self.kind} with {', '.join(extras[:-1])} and {extras[-1]}"


def draw_person(stage, person, gait, root, depth=1.0, carried=None):
    """Adds a person to the stage's drawing.

    Args:
        root: [T, 3, 3] from the person's coordinates to the world's.
        carried: function of [T, 3, 3], the far hand's place in the world, that draws what it holds.
    """
    pose = gait.pose(stage.times)
    if carried is not None:
        shoulder, elbow = np.array(pose.shoulder), np.array(pose.elbow)
        shoulder[1], elbow[1] = 0.75 + 0.1 * shoulder[1], 1.25
        pose = replace(pose, shoulder=shoulder, elbow=elbow)
    rig = _Rig(stage, person, pose, root, depth)
    rig.back()
    if carried is not None:
        carried(rig.hands[1])
    rig.arm(1)
    rig.leg(1)
    rig.leg(0)
    rig.body()
    rig.face()
    rig.arm(0)


class _Rig:
    """Bones and strokes of one person; methods add to the drawing, from back to front."""

    def __init__(self, stage, person, pose, root, depth):
        self.stage, self.person, self.pose, self.depth = stage, person, pose, depth
        self.drawing, frames = stage.drawing, len(stage.times)
        thigh, shin = 0.47 * person.leg, 0.40 * person.leg
        ankle = person.leg - thigh - shin
        reach = thigh * np.cos(pose.thigh) + shin * np.cos(pose.thigh - pose.knee) + ankle
        hip_y = -reach.max(axis=0) - pose.lift * person.leg
        self.hips = root @ placed(frames, 0, hip_y)
        self.torso = self.hips @ placed(frames, 0, 0, -pose.lean)
        self.neck = self.torso @ placed(frames, 0, -person.torso)
        scale = person.head / 0.37  # head shapes are 370 high
        self.head = (
            self.neck @ placed(frames, 0.012, 0, pose.nod) @ placed(frames, 0, -0.135 * scale, 0, scale)
        )
        self.legs, self.feet, self.arms, self.hands = [], [], [], []
        self.arm_length = 0.82 * person.torso + 0.02
        upper = 0.5 * self.arm_length
        for side, (x_leg, x_arm) in enumerate(((-0.4, -0.78), (0.45, 0.72))):
            leg = self.hips @ placed(frames, x_leg * person.hip, 0, pose.thigh[side])
            knee = leg @ placed(frames, 0, thigh) @ placed(frames, 0, 0, -pose.knee[side])
            foot = knee @ placed(frames, 0, shin, 0.75 * (pose.knee[side] - pose.thigh[side]))
            arm = self.torso @ placed(
                frames, x_arm * person.shoulder, -person.torso + 0.045, pose.shoulder[side] + pose.lean
            )
            elbow = arm @ placed(frames, 0, upper) @ placed(frames, 0, 0, pose.elbow[side])
            self.legs.append((self._bone(leg), self._bone(knee @ placed(frames, 0, -thigh)), thigh, 0.03))
            self.feet.append(self._bone(foot))
            self.arms.append((self._bone(arm), self._bone(elbow @ placed(frames, 0, -upper)), upper, 0.025))
            self.hands.append(elbow @ placed(frames, 0, upper))
        self.leg_length, self.ankle = thigh + shin, ankle
        self.hip_bone = self._bone(self.hips @ placed(frames, 0, 0, -0.5 * pose.lean), -0.035 * pose.swing)
        self.body_bone = self._bone(self.torso, -0.035 * pose.swing)
        self.head_bone = self._bone(self.head, -0.05 * pose.swing)

    def _bone(self, matrix, sway=0.0):
        return self.stage.bone(matrix, self.depth, sway)

    def _slot(self, kind):
        return f"{self.person.name}/{kind}"

    @property
    def top(self):
        return self._slot("cloth.dress" if self.person.clothes == "dress" else "cloth.top")

    def back(self):
        """What is behind the body."""
        person, frames = self.person, len(self.stage.times)
        head.draw_back(self.stage, person, self.head, self.head_bone, self.pose.swing, self.depth)
        if person.bag:
            bag = shapes.box(-0.115 - person.shoulder, -0.9 * person.torso, 0, -0.2 * person.torso)
            bag[:, 3] = 0
            self.drawing.shape(self.body_bone, bag, self._slot("thing.bag"), shade=0.02)
        if person.scarf:
            wave = np.sin(9 * self.stage.times)
            tail = self._bone(
                self.neck @ placed(frames, -0.03, 0.01, 0.4 + 0.3 * self.pose.swing + 0.1 * wave), 0.05 * wave
            )
            points = outline(
                "20 -40, -90 -60 .2, -190 -40 .6, -290 -70 1!, -300 15 1!, -190 40 .6, -90 25 .2, 20 40"
            )
            points = shapes.moved(points, scale=0.8)
            self.drawing.shape(tail, points, self._slot("cloth.scarf"), shade=0.02)

    def leg(self, side):
        """A leg with its shoe; side 1 is the far one, in the darker tone."""
        person, drawing, tone = self.person, self.drawing, "shade" if side else "base"
        limb, length, near = person.limb, self.leg_length, not side
        bare = person.clothes in (*_WITH_SKIRT, "shirt and shorts")
        slot = self._slot("skin") if bare else self._slot("cloth.trousers")
        drawing.shape(
            self.legs[side], shapes.tube(length, limb, 0.74 * limb), slot, shade=0.6 * limb * near, tone=tone
        )
        if person.clothes == "shirt and shorts":
            shorts = shapes.tube(0.46 * length, 1.15 * limb, 1.25 * limb, 0.2)
            drawing.shape(
                self.legs[side], shorts, self._slot("cloth.trousers"), shade=0.5 * limb * near, tone=tone
            )
        scale = self.ankle / 0.026 * 0.6
        shoe = shapes.moved(_SHOE, y=self.ankle - 0.022 * scale, scale=scale)
        drawing.shape(self.feet[side], shoe, self._slot("cloth.shoes"), tone=tone)

    def arm(self, side):
        """An arm with its hand; side 1 is the far one, in the darker tone."""
        person, drawing, tone = self.person, self.drawing, "shade" if side else "base"
        limb, length, near = 0.82 * person.limb, self.arm_length, not side
        shade = 0.6 * limb * near
        if person.clothes in ("shirt and shorts", "shirt and trousers", "dress"):
            drawing.shape(
                self.arms[side],
                shapes.tube(length + 0.6 * limb, limb, 1.05 * limb),
                self._slot("skin"),
                shade=shade,
                tone=tone,
            )
            drawing.shape(
                self.arms[side],
                shapes.tube(0.42 * length, 1.1 * limb, 1.35 * limb, 0.2),
                self.top,
                shade=shade,
                tone=tone,
            )
        else:
            hand = shapes.ellipse(0.004, length + 0.4 * limb, 1.05 * limb, 1.15 * limb)
            drawing.shape(self.arms[side], hand, self._slot("skin"), tone=tone)
            drawing.shape(
                self.arms[side], shapes.tube(length, limb, 0.95 * limb, 0.2), self.top, shade=shade, tone=tone
            )

    def body(self):
        """Torso, and what hangs from the waist."""
        person, drawing, tall = self.person, self.drawing, self.person.torso
        wide, hip = person.shoulder, person.hip
        neck = shapes.box(-0.024, -tall - 0.03, 0.036, -tall + 0.03)
        drawing.shape(self.body_bone, neck, self._slot("skin"), tone="shade")
        if person.clothes in _WITH_SKIRT:
            hem = 0.36 * person.leg + 0.02
            skirt = control(
                [
                    (-0.85 * hip, -0.32 * tall, 0),
                    (-1.75 * hip, hem, 1),
                    (-0.6 * hip, hem + 0.02, 1),
                    (0.6 * hip, hem + 0.02, 1),
                    (1.75 * hip, hem, 1),
                    (0.85 * hip, -0.32 * tall, 0),
                ]
            )
            skirt[[0, 1, 4, 5], 3] = 1
            slot = self.top if person.clothes == "dress" else self._slot("cloth.skirt")
            drawing.shape(self.hip_bone, skirt, slot, shade=0.035)
            folds = [control([(x * hip, -0.05 * tall, 0), (2.1 * x * hip, hem, 1)]) for x in (-0.35, 0.4)]
            drawing.line(self.hip_bone, folds, weight=0.7)
        low = {"coat": 0.30 * person.leg, "dress": -0.25 * tall, "blouse and skirt": -0.25 * tall}.get(
            person.clothes, 0.03
        )
        flare = {"coat": 1.5}.get(person.clothes, 1.0)
        trunk = control(
            [
                (-0.45 * wide, -tall - 0.004, 0),
                (-wide, -0.86 * tall, 0),
                (-0.98 * hip, -0.35 * tall, 0),
                (-flare * hip, low, 1),
                (0, low + 0.018, 1),
                (flare * hip, low, 1),
                (0.98 * hip, -0.35 * tall, 0),
                (wide, -0.86 * tall, 0),
                (0.5 * wide, -tall - 0.004, 0),
            ]
        )
        trunk[[3, 5], 3] = 1
        drawing.shape(self.body_bone, trunk, self.top, shade=0.03)
        self._details(tall, hip, low)
        if person.scarf:
            wrap = shapes.moved(outline("-85 -30, -40 -50, 60 -50, 95 -25, 60 30, -50 30"), y=-tall + 0.01)
            drawing.shape(self.body_bone, wrap, self._slot("cloth.scarf"), shade=0.02)

    def _details(self, tall, hip, low):
        drawing, person = self.drawing, self.person
        if person.clothes == "coat":
            seam = control(
                [(0.3 * hip, -0.95 * tall, 0), (0.4 * hip, -0.3 * tall, 0), (0.5 * hip, low + 0.01, 1)]
            )
            drawing.line(self.body_bone, seam, weight=0.8)
            buttons = [shapes.ellipse(0.62 * hip, y * tall, 0.011, 0.011) for y in (-0.7, -0.42)]
            drawing.shape(self.body_bone, buttons, self._slot("thing.button"), weight=0.8)
        elif person.clothes == "hooded jacket":
            hood = control(
                [
                    (-0.9 * person.shoulder, -0.98 * tall),
                    (0, -0.80 * tall),
                    (0.95 * person.shoulder, -0.98 * tall),
                ]
            )
            drawing.line(self.body_bone, hood, weight=0.8)
            drawing.line(self.body_bone, control([(0.1 * hip, -0.8 * tall), (0.12 * hip, low)]), weight=0.8)
        elif person.clothes == "dress":
            belt = shapes.box(-1.0 * hip, -0.36 * tall, 1.0 * hip, -0.24 * tall)
            drawing.shape(self.body_bone, belt, self._slot("cloth.belt"), weight=0.8)
        elif person.clothes == "blouse and skirt":
            drawing.shape(
                self.body_bone,
                outline("5 10!, -45 -10!, -45 30!, 5 10!, 55 -10!, 55 30!") + [0.005, -0.9 * tall, 0, 0],
                self._slot("cloth.bow"),
                weight=0.8,
            )
        else:
            stripe = control(
                [
                    (-0.97 * hip, -0.5 * tall, 0),
                    (0.0, -0.47 * tall, 0),
                    (0.99 * hip, -0.5 * tall, 0),
                    (1.0 * hip, -0.28 * tall, 0),
                    (0, -0.25 * tall, 0),
                    (-0.98 * hip, -0.28 * tall, 0),
                ]
            )
            stripe[[0, 2, 3, 5], 3] = 1
            drawing.shape(self.body_bone, stripe, self._slot("cloth.stripe"), weight=0.8)

    def face(self):
        head.draw_front(self.stage, self.person, self.head_bone)
