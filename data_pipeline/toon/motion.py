"""How figures move: joint angles over time.

Angles are in radians and positive forwards, towards the side the figure looks to; limbs hang down at 0.
Index 0 of a pair is the limb nearer to the viewer.
"""

from dataclasses import dataclass

import numpy as np

ACTIONS = ("stand", "walk", "run", "jump", "wave", "dance", "cheer")
TRAVELLING = ("walk", "run")


def pick(rng, options, weights=None):
    """One of the options (the fast way: `rng.choice` makes an array of them)."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    share = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        share -= weight
        if share < 0:
            return option
    return option


@dataclass(frozen=True)
class Pose:
    """Arrays over time; `thigh`, `knee`, `shoulder` and `elbow` are [2, T], the rest [T].

    `lift` is the height of the feet above the ground, in leg lengths; `swing` how far hair and cloth are
    blown backwards, about -1 to 1.
    """

    thigh: np.ndarray
    knee: np.ndarray
    shoulder: np.ndarray
    elbow: np.ndarray
    lean: np.ndarray
    nod: np.ndarray
    lift: np.ndarray
    swing: np.ndarray


@dataclass(frozen=True)
class Gait:
    """A figure's own way of moving.

    Attributes:
        action: one of `ACTIONS`.
        period: seconds of a cycle (two steps).
        start: share of the cycle at time 0.
        vigour: 1 is usual; scales angles and heights.
    """

    action: str
    period: float
    start: float
    vigour: float

    @classmethod
    def draw(cls, rng, action, motion):
        """One of the usual speeds; `motion` scales speed and reach."""
        slow, fast = {
            "stand": (2.0, 3.0),
            "walk": (0.75, 1.05),
            "run": (0.45, 0.62),
            "jump": (0.6, 0.9),
            "wave": (0.5, 0.8),
            "dance": (0.8, 1.2),
            "cheer": (0.5, 0.8),
        }[action]
        period = rng.uniform(slow, fast) / np.sqrt(max(motion, 1e-3))
        return cls(action, period, rng.random(), rng.uniform(0.85, 1.1) * np.clip(motion, 0.0, 1.5) ** 0.5)

    def speed(self):
        """Leg lengths a second at which the feet do not slide."""
        reach = {"walk": 0.52, "run": 0.9}.get(self.action, 0.0) * self.vigour
        return 4 * np.sin(min(reach, 1.2)) / self.period

    def pose(self, times):
        """`Pose` at times [T], in seconds."""
        phase = 2 * np.pi * (times / self.period + self.start)
        pair = np.stack([phase, phase + np.pi])
        zero, zeros = np.zeros_like(phase), np.zeros_like(pair)
        return _POSES[self.action](phase, pair, zero, zeros, self.vigour)


def _stand(phase, pair, zero, zeros, vigour):
    breath = np.sin(phase)
    arms = zeros + [[-0.10], [0.12]]
    return Pose(
        zeros + [[-0.05], [0.07]],
        zeros + 0.04,
        arms + 0.08 * vigour * breath,
        zeros + 0.18 + 0.05 * breath,
        0.02 * breath,
        0.05 * vigour * np.sin(phase + 1),
        zero,
        0.3 * vigour * np.sin(phase + 0.7),
    )


def _walk(phase, pair, zero, zeros, vigour):
    return Pose(
        0.52 * vigour * np.sin(pair),
        0.10 + 0.75 * vigour * np.maximum(0, np.cos(pair)),
        -0.55 * vigour * np.sin(pair),
        0.25 + 0.25 * np.maximum(0, -np.sin(pair)),
        zero + 0.05,
        0.04 * np.sin(2 * phase),
        zero,
        0.5 + 0.5 * np.sin(2 * phase - 1),
    )


def _run(phase, pair, zero, zeros, vigour):
    return Pose(
        0.15 + 0.9 * vigour * np.sin(pair),
        0.25 + 1.35 * vigour * np.maximum(0, np.cos(pair + 0.3)),
        -0.95 * vigour * np.sin(pair),
        zeros + 1.25,
        zero + 0.2,
        0.05 * np.sin(2 * phase) - 0.08,
        0.16 * vigour * np.abs(np.cos(phase)),
        1.2 + 0.5 * np.sin(2 * phase - 1),
    )


def _jump(phase, pair, zero, zeros, vigour):
    cycle = (phase / (2 * np.pi)) % 1
    air = np.clip((cycle - 0.3) / 0.6, 0, 1)
    height = 4 * air * (1 - air)
    crouch = np.where(cycle < 0.3, np.sin(np.pi * cycle / 0.3), 0) * vigour
    bend = 0.9 * crouch + 0.5 * height
    up = np.minimum(2.3, 0.3 + 2.3 * height)
    return Pose(
        zeros + bend + [[-0.06], [0.1]] * height,
        zeros + 1.7 * bend,
        np.stack([up, -0.6 * up]),
        zeros + 0.35,
        0.25 * crouch,
        -0.1 * crouch,
        0.9 * vigour * height,
        1.2 * np.cos(2 * np.pi * cycle),
    )


def _wave(phase, pair, zero, zeros, vigour):
    pose = _stand(phase / 3, pair / 3, zero, zeros, vigour)
    swing = np.sin(phase)
    return Pose(
        pose.thigh,
        pose.knee,
        np.stack([-2.05 + 0.12 * swing, pose.shoulder[1]]),
        np.stack([-0.3 + 0.6 * vigour * swing, pose.elbow[1]]),
        -0.03 + 0.03 * swing,
        0.06 * vigour * swing,
        zero,
        0.4 * swing,
    )


def _dance(phase, pair, zero, zeros, vigour):
    bounce = np.abs(np.sin(phase))
    return Pose(
        zeros + [[-0.22], [0.26]] + 0.3 * vigour * bounce,
        zeros + 0.1 + 0.6 * vigour * bounce,
        np.stack([-1.5 - 0.8 * vigour * np.sin(phase), 1.5 - 0.8 * vigour * np.sin(phase)]),
        np.stack([-0.7 - 0.4 * np.cos(phase), 0.7 - 0.4 * np.cos(phase)]),
        0.2 * vigour * np.sin(phase),
        -0.14 * vigour * np.sin(phase),
        0.1 * vigour * np.abs(np.cos(phase)),
        1.2 * np.cos(phase),
    )


def _cheer(phase, pair, zero, zeros, vigour):
    beat = np.sin(phase)
    return Pose(
        zeros + [[-0.12], [0.14]],
        zeros + 0.1 + 0.25 * vigour * np.maximum(0, beat),
        np.stack([-2.1 + 0.35 * vigour * beat, 2.1 - 0.35 * vigour * beat]),
        zeros + [[-0.3], [0.3]],
        0.04 * beat,
        0.08 * vigour * beat,
        0.12 * vigour * np.maximum(0, -beat),
        0.8 * np.cos(phase),
    )


_POSES = {
    "stand": _stand,
    "walk": _walk,
    "run": _run,
    "jump": _jump,
    "wave": _wave,
    "dance": _dance,
    "cheer": _cheer,
}


def blink(rng, times):
    """Whether the eyes are closed, bool [T]: an eighth of a second every two to four seconds."""
    every = rng.uniform(2.0, 4.0)
    return (times + rng.uniform(0, every)) % every < 0.125
