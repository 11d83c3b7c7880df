"""Puts a clip together: who plays where, what they do, how the camera and the light move, and the caption."""

import math
from dataclasses import dataclass

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.toon import background, props
from data_pipeline.toon.animals import Animal, draw_animal
from data_pipeline.toon.camera import MOVES, Camera, Stage
from data_pipeline.toon.characters import Person, draw_person
from data_pipeline.toon.drawing import Drawing, placed
from data_pipeline.toon.motion import ACTIONS, TRAVELLING, Gait, pick
from data_pipeline.toon.palette import Palette
from data_pipeline.toon.render import render
from data_pipeline.toon.shapes import ellipse


@dataclass(frozen=True)
class ToonConfig:
    """How difficult clips are.

    Attributes:
        max_characters: a clip has one to this many, 1 to 8.
        motion: scales speed and reach of figures and camera; 1 is usual, 0 to 4.
        late_entry: probability that a character after the first comes in only after the first frame.
        lighting: probability that the light changes.
        camera: probability that the camera moves.
        foreground: probability of something at the lower edge that hides what is behind.
        extras: probability of a ball, a car or the like, and of something carried.
    """

    max_characters: int = 3
    motion: float = 1.0
    late_entry: float = 0.3
    lighting: float = 0.25
    camera: float = 0.6
    foreground: float = 0.35
    extras: float = 0.4

    def __post_init__(self):
        ranges = {"max_characters": (1, 8), "motion": (0, 4)}
        for name, value in vars(self).items():
            low, high = ranges.get(name, (0, 1))
            if not (math.isfinite(value) and low <= value <= high):
                raise InputError(
                    f"{value}", where=f"ToonConfig.{name}", expected=f"a number from {low} to {high}"
                )


@dataclass(frozen=True)
class ToonClip:
    """A clip and what is known about it.

    Attributes:
        color: [T, H, W, 3] uint8 RGB.
        sketch: [T, H, W] uint8, 255 paper and 0 line: the same drawing's line art, drawn alone.
        caption: what the clip shows, without a word about colours.
        fps: frames a second.
        entries: for each character the first frame in which it is seen, T if in none; characters hidden by
            others count as seen.
    """

    color: np.ndarray
    sketch: np.ndarray
    caption: str
    fps: float
    entries: tuple

    @property
    def line_art(self):
        """[T, H, W, 3], the sketch as frames of a video."""
        return np.repeat(self.sketch[..., None], 3, axis=-1)

    @property
    def reference(self):
        """[H, W, 3], the first frame."""
        return self.color[0]


def draw_clip(num_frames=17, height=96, width=160, seed=0, palette_seed=None, fps=24, config=None):
    """Draws a clip; the same arguments give the same pixels.

    Args:
        num_frames: 1 or more.
        height, width: of the frames, in pixels.
        seed: chooses shapes, motion and caption.
        palette_seed: chooses the colours and nothing else; by default it follows from `seed`.
        fps: frames a second; motion is defined in seconds.
        config: `ToonConfig`.

    Returns:
        `ToonClip`.

    Raises:
        InputError: a size, length or rate that is not positive; a negative seed.
    """
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width), ("fps", fps)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{value}", where=name, expected="a positive number")
    for name, value in (("seed", seed), ("palette_seed", palette_seed)):
        if value is not None and value < 0:
            raise InputError(f"{value}", where=name, expected="a whole number, 0 or above")
    if palette_seed is None:
        palette_seed = int(np.random.default_rng([seed, 1]).integers(2**31))
    rng = np.random.default_rng([seed, 0])
    scene = _Scene(rng, np.arange(num_frames) / fps, height, width, config or ToonConfig())
    palette = Palette(palette_seed)
    tint, shadow = scene.light(palette)
    color, sketch, inside = render(
        scene.drawing, num_frames, height, width, palette, tint, shadow, scene.rows
    )
    entries = tuple(int(np.argmax(seen)) if seen.any() else num_frames for seen in inside.T)
    return ToonClip(color, sketch, scene.caption(), fps, entries)


@dataclass
class _Figure:
    """A character, how it moves, and its path: x, y and the side it looks to are [T]."""

    who: object
    gait: Gait
    x: np.ndarray
    y: np.ndarray
    facing: np.ndarray
    height: float
    enters: str = ""
    carries: str = ""


class _Scene:
    def __init__(self, rng, times, height, width, config):
        self.rng, self.times, self.config = rng, times, config
        self.height, self.width, self.aspect = height, width, width / height
        self.fit = min(1.0, 0.35 + 0.65 * self.aspect)  # things are smaller in upright frames
        self.duration = max(float(times[-1]), 1 / 24)
        self.place = pick(rng, list(background.PLACES))
        self.near = rng.random() < 0.22  # figures are cut off by the frame's lower edge
        self.figures = self._cast()
        self.move = pick(rng, MOVES[1:]) if rng.random() < config.camera else "still"
        self.lighting = pick(rng, ("dusk", "lamp", "shadow")) if rng.random() < config.lighting else ""
        self.light_side = pick(rng, (-1.0, 1.0))
        self.drawing = Drawing((0.6 * self.light_side, -0.8))
        camera = Camera.draw(rng, self.move, times, height, width, config.motion)
        self.stage = Stage(self.drawing, times, camera)
        self.extra = self._extra()
        self.rows = self._draw()

    # ------------------------------------------------------------ who, where, what

    def _cast(self):
        rng, count = self.rng, int(self.rng.integers(1, self.config.max_characters + 1))
        figures = []
        for index in range(count):
            spot = (index + rng.uniform(0.35, 0.65)) / count
            spot = max(spot, 0.28) if index == 0 else spot  # the reference is to show somebody
            late = index > 0 and rng.random() < self.config.late_entry
            is_person = rng.random() < (0.85 if index == 0 else 0.6)
            name = f"figure{index}"
            who = (Person if is_person else Animal).draw(rng, name)
            figures.append(self._figure(who, spot * self.aspect, late))
        return figures

    def _figure(self, who, x, late):
        rng, motion = self.rng, self.config.motion
        person = isinstance(who, Person)
        action = pick(rng, ACTIONS if person else ("stand", "walk", "run", "jump"))
        if late or getattr(who, "kind", "") == "bird":
            action = "run"
        ground = rng.uniform(0.85, 0.95)
        if person:
            size = rng.uniform(0.62, 0.74) if who.kind in ("girl", "boy") else rng.uniform(0.74, 0.84)
        else:
            size = {"cat": 0.36, "dog": 0.42, "rabbit": 0.30, "chick": 0.20, "bird": 0.22}[who.kind]
            size *= rng.uniform(0.85, 1.25)
        size *= (0.55 + 0.5 * ground) * self.fit
        if self.near:
            size, ground = 1.5 * size, ground + (0.42 if person else 0.12)
        if not person and who.kind == "bird":
            ground = rng.uniform(0.22, 0.45)
        gait = Gait.draw(rng, action, motion)
        reach = (who.leg if person else 0.36) * size
        speed = reach * gait.speed() * (1.0 if motion else 0.0)
        facing = pick(rng, (-1.0, 1.0))
        enters = ""
        if late:
            enters = pick(rng, ("left", "right"))
            x, facing, gait = self._entry(enters, gait, reach, size)
        elif action in TRAVELLING:
            x, facing = self._walk(x, facing, speed * self.times)
        else:
            x, facing = np.full(len(self.times), x), np.full(len(self.times), facing)
        figure = _Figure(who, gait, x, np.full(len(self.times), ground), facing, size, enters)
        if person and action in ("stand", "walk", "wave") and rng.random() < 0.5 * self.config.extras:
            figure.carries = pick(rng, ("umbrella", "balloon"))
        return figure

    def _walk(self, x, facing, way):
        """Goes `way` [T] far and turns round at the frame's edges -> x, facing [T]."""
        left, right = 0.06 * self.aspect, 0.94 * self.aspect
        start = (x - left) if facing > 0 else 2 * right - left - x
        along = (start + way) % (2 * (right - left))
        back = along > right - left
        return left + np.where(back, 2 * (right - left) - along, along), np.where(back, -1.0, 1.0)

    def _entry(self, side, gait, reach, size):
        """Waits beside the frame, then comes in fast enough to be seen before the clip ends."""
        # half of the longest figure, and as far as the camera may look
        outside = 0.75 * size + 0.05 + 0.3 * self.config.motion
        start = self.rng.uniform(0.05, 0.35) * self.duration
        needed = (outside + 0.3 * self.aspect) / (0.75 * (self.duration - start) + 1e-6)
        speed = max(reach * gait.speed(), needed)
        hurry = min(speed / max(reach * gait.speed(), 1e-6), 2.0)
        gait = Gait(gait.action, gait.period / hurry, gait.start, gait.vigour)
        way = speed * np.maximum(0, self.times - start) - outside
        x, facing = self._walk(0.06 * self.aspect, 1.0, np.maximum(way, 0))
        x = np.where(way < 0, way + 0.06 * self.aspect, x)
        return (x, facing, gait) if side == "left" else (self.aspect - x, -facing, gait)

    def _extra(self):
        if self.rng.random() >= self.config.extras:
            return ""
        return pick(self.rng, ["ball", "car"] if self.place not in ("room", "beach", "forest") else ["ball"])

    # ------------------------------------------------------------ drawing

    def _draw(self):
        rng, stage, drawing = self.rng, self.stage, self.drawing
        ball = self._ball_path() if self.extra == "ball" else None
        for figure in self.figures:
            self._ground_shadow(figure)
        background.draw_back(stage, self.place, rng)
        if self.extra == "car":
            self._car()
        rows = {}
        for index in sorted(range(len(self.figures)), key=lambda index: self.figures[index].y[0]):
            figure = self.figures[index]
            start = drawing.count
            facing = figure.facing * figure.height
            root = placed(len(self.times), figure.x, figure.y, 0, facing, figure.height)
            if isinstance(figure.who, Person):
                carried = self._carried(figure, index) if figure.carries else None
                draw_person(stage, figure.who, figure.gait, root, carried=carried)
            else:
                draw_animal(stage, figure.who, figure.gait, root)
            rows[index] = (start, drawing.count)
        if ball is not None:
            props.ball(props.Place(drawing, ball, "ball", far=False), rng)
        if rng.random() < self.config.foreground:
            background.draw_front(stage, self.place, rng)
        return [rows[index] for index in range(len(rows))]

    def _ground_shadow(self, figure):
        if getattr(figure.who, "kind", "") == "bird":
            return
        wide = 0.17 if isinstance(figure.who, Person) else 0.42
        bone = self.stage.bone(placed(len(self.times), figure.x, figure.y, 0, figure.height))
        self.stage.shadows.append((bone, ellipse(-0.04 * self.light_side, 0.012, wide, 0.028)))

    def _carried(self, figure, index):
        thing = getattr(props, figure.carries)
        size = figure.height * (1.6 if figure.carries == "umbrella" else 1.0)
        sway = 0.10 * np.sin(2.3 * self.times + index)

        def draw(hand):
            place = placed(len(self.times), hand[:, 0, 2], hand[:, 1, 2], sway, size)
            thing(props.Place(self.drawing, self.stage.bone(place), f"held{index}", far=False), self.rng)

        return draw

    def _ball_path(self):
        """The bone of a ball that bounces through the scene."""
        rng, times = self.rng, self.times
        radius, ground = self.fit * rng.uniform(0.05, 0.08), rng.uniform(0.88, 0.97)
        speed = self.config.motion * rng.uniform(0.3, 0.9)
        x, facing = self._walk(rng.uniform(0.1, 0.9) * self.aspect, pick(rng, (-1.0, 1.0)), speed * times)
        bounce = (
            self.fit * rng.uniform(0.0, 0.3) * np.abs(np.cos(times * rng.uniform(4, 7) + rng.uniform(0, 3)))
        )
        below = self.stage.bone(placed(len(times), x, ground))
        self.stage.shadows.append((below, ellipse(0, 0, 0.9 * radius, 0.012)))
        turn = -facing * speed * times / radius
        return self.stage.bone(placed(len(times), x, ground - radius - bounce, turn, 2 * radius))

    def _car(self):
        rng, times = self.rng, self.times
        size, ground = rng.uniform(0.55, 0.75), 0.83
        facing, speed = pick(rng, (-1.0, 1.0)), self.config.motion * rng.uniform(0.5, 1.3)
        middle = rng.uniform(0.2, 0.8) * self.aspect
        x = middle + facing * speed * (times - 0.5 * self.duration)
        jolt = 0.004 * np.sin(23 * times)
        body = placed(len(times), x, ground + jolt, 0, facing * size, size)
        props.car(props.Place(self.drawing, self.stage.bone(body), "car", far=False), rng)
        for axle in (-0.28, 0.30):
            wheel = placed(
                len(times),
                x + facing * axle * size,
                ground - 0.075 * size,
                -facing * speed * times / (0.11 * size),
                size,
            )
            props.wheel(props.Place(self.drawing, self.stage.bone(wheel), "car", far=False), rng)

    # ------------------------------------------------------------ light and words

    def light(self, palette):
        """Tint [T, 3] and shadow [T, 4, 2] of the frames, each None where there is none."""
        rng, frames = self.rng, len(self.times)
        share = self.times / self.duration
        start, backwards, slope = rng.uniform(0.3, 0.7), rng.random() < 0.5, rng.uniform(-0.4, 0.4)
        if self.lighting == "dusk":
            return 1 + share[:, None] * (palette.dusk - 1), None
        if self.lighting == "lamp":
            dark = (share >= start) != backwards
            return np.where(dark[:, None], palette.dark, 1.0), None
        if self.lighting == "shadow":
            edge = np.where(backwards, 1.15 - 1.3 * share, 1.3 * share - 0.15) * self.width
            left, tilt = np.zeros(frames) - self.height, slope * self.height
            top, bottom = np.zeros(frames) - 1, np.zeros(frames) + self.height + 1
            corners = [(left, top), (edge + tilt, top), (edge - tilt, bottom), (left, bottom)]
            return None, np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)
        return None, None

    def caption(self):
        """What the clip shows, without colours: those are the reference's to tell."""
        first, *others = self.figures
        text = _sentence_part(first)
        text += f" {background.PLACES[self.place][first.gait.action in TRAVELLING]}"
        here = [_sentence_part(figure) for figure in others if not figure.enters]
        text += f" while {' and '.join(here)}" if here else ""
        text += {"": "", "ball": "; a ball bounces", "car": "; a car drives past"}[self.extra]
        sentences = [text]
        sentences += [
            f"{figure.who.describe()} runs in from the {figure.enters}"
            if not _flies(figure)
            else f"{figure.who.describe()} flies in from the {figure.enters}"
            for figure in others
            if figure.enters
        ]
        sentences += {
            "still": [],
            "pan": ["the camera pans"],
            "zoom in": ["the camera moves closer"],
            "zoom out": ["the camera moves away"],
            "shake": ["the camera shakes"],
            "drift": ["the camera drifts"],
        }[self.move]
        sentences += {
            "": [],
            "dusk": ["the light fades"],
            "lamp": ["the light changes suddenly"],
            "shadow": ["a shadow passes"],
        }[self.lighting]
        return ". ".join(part[0].upper() + part[1:] for part in sentences) + "."


def _flies(figure):
    return figure.who.kind == "bird"


def _sentence_part(figure):
    verb = {
        "stand": "stands",
        "walk": "walks",
        "run": "runs",
        "jump": "jumps",
        "wave": "waves",
        "dance": "dances",
        "cheer": "cheers",
    }[figure.gait.action]
    verb = "flies" if _flies(figure) else verb
    carried = {"": "", "umbrella": " with an umbrella", "balloon": " with a balloon"}[figure.carries]
    return f"{figure.who.describe()} {verb}{carried}"
