"""One resumable training loop for everything that the recipe trains.

A slice of it ends at a deadline, at Ctrl-C, or at the last step; the same call goes on where it stopped, bit
for bit on one kind of device: a step's batch and noise follow from its number.
"""

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from animecolor_jax.pipeline import NonFiniteError
from animecolor_jax.replacing import replacing
from animecolor_jax.train.run_log import RunLog

STATE = "state.npz"
SAVE_SECONDS = 120.0


class OutOfTime(Exception):
    """The slice is over; everything is saved."""


class Deadline:
    """When a slice ends: after some minutes, or when the process is told to stop.

    Args:
        minutes: from now; None: never.
    """

    def __init__(self, minutes=None):
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._told = threading.Event()

    def stop_on_signals(self):
        """Ctrl-C and SIGTERM end the slice; a second Ctrl-C does not wait."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, _):
        if self._told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._told.set()

    def passed(self):
        """Whether the slice is to end now."""
        return self._told.is_set() or time.monotonic() >= self._end

    def check(self):
        """Raises OutOfTime if it is."""
        if self.passed():
            raise OutOfTime


class Task(NamedTuple):
    """What a loop trains.

    Attributes:
        state: pytree of arrays at step 0.
        step: function of (state, batch, number of the step) -> (state, {"loss", "grad_norm", ...}).
        batch: function of a step's number -> its batch, pytree of arrays.
        steps: updates in all. batch_size: for the log. learning_rate: function of a step's number.
        validate: function of a state -> {"loss", ...}, or None. validate_every: steps between calls.
    """

    state: object
    step: object
    batch: object
    steps: int
    batch_size: int
    learning_rate: object
    validate: object = None
    validate_every: int = 200


def train(folder, task, deadline, show=None):
    """Trains to the last step and returns the state then; the log is FOLDER/metrics.jsonl.

    Raises:
        OutOfTime: the deadline has passed; the state is in FOLDER/state.npz.
        NonFiniteError: a loss was not finite; what was saved last stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first, state = load(folder / STATE, task.state)
    if first == task.steps:
        return state
    saved = time.monotonic()
    with RunLog(
        folder, start_step=first, total_steps=task.steps, batch_size=task.batch_size, log_every=20, show=show
    ) as log:
        if first == 0 and task.validate is not None:
            _validate(log, task, state, 0)
        shapes = set()
        for number in range(first, task.steps):
            if deadline.passed():
                save(folder / STATE, number, state)
                raise OutOfTime
            batch = task.batch(number)
            state, values = task.step(state, batch, number)
            loss = float(values["loss"])
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss {loss} in step {number + 1} of {folder.name}")
            shape = jax.tree.map(np.shape, batch)
            log.step(
                number + 1, **{name: float(value) for name, value in values.items()},
                learning_rate=float(task.learning_rate(number)), compiled=str(shape) not in shapes,
            )  # fmt: skip
            shapes.add(str(shape))
            done = number + 1
            if task.validate is not None and (done == task.steps or done % task.validate_every == 0):
                _validate(log, task, state, done)
            if done == task.steps or time.monotonic() - saved > SAVE_SECONDS:
                save(folder / STATE, done, state)
                saved = time.monotonic()
    return state


def _validate(log, task, state, step):
    with log.pause():
        found = dict(task.validate(state))
        log.validation(step, found.pop("loss"), **found)


def save(path, step, state):
    """Writes a pytree of arrays and the number of updates it has had, whole or not at all."""
    leaves = {f"leaf{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, step=step, **leaves)
        file.flush()
        os.fsync(file.fileno())


def load(path, state):
    """(updates, state) of a file of `save` with the structure of `state`; (0, state) where there is none."""
    if not Path(path).exists():
        return 0, state
    with np.load(path, allow_pickle=False) as file:
        leaves = [jax.numpy.asarray(file[f"leaf{number}"]) for number in range(len(file.files) - 1)]
        return int(file["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)
