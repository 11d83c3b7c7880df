"""What a training run says about itself: metrics.jsonl for machines, TensorBoard, videos and a progress bar.

Only finished steps count for speed: compilation, validation and saving are left out. Everything here is plain
numbers and files; nothing imports JAX.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from animecolor_jax.errors import InputError
from animecolor_jax.train.tensorboard import encode_gif, open_events
from data_pipeline.storage import Storage, is_remote

METRICS = "metrics.jsonl"
LOSS_STEPS = 100  # that the shown loss is the mean of
RATE_WINDOWS = 10  # lines of the log that the shown speed is the mean of
GIF_SIZE = 512  # pixels of the longest side in TensorBoard
UPLOAD_SECONDS = 60.0  # between uploads of the log, where RUN is an object store


class RunLog:
    """The log of one attempt of a run; a context manager.

    `step` counts updates made: the first of a run is 1, and a run resumed from the checkpoint of step s goes
    on with s + 1. What an earlier attempt wrote about steps after `start_step` is dropped: whoever validates
    before saving has every validation once.
    """

    def __init__(
        self,
        directory,
        *,
        start_step,
        total_steps,
        batch_size,
        log_every=10,
        flops_per_step=None,
        peak_flops=None,
        show=None,
        leader=True,
        clock=time.perf_counter,
    ):
        """
        Args:
            directory: RUN, a local path or a URL; an object store gets the log once a minute and at pauses.
            start_step: updates made before.
            total_steps: updates that the run is to make.
            batch_size: clips of a step, of all devices together.
            log_every: steps between writes, and between lines or updates of speed on the terminal.
            flops_per_step: of all devices together; None where it is unknown or differs from step to step.
            peak_flops: FLOP/s of all devices together; None where it is unknown.
            show: True for a progress bar, False for lines, None for a bar on a terminal and lines elsewhere.
            leader: whether this process writes and shows anything.
            clock: function that returns seconds.

        Raises:
            InputError: the log of an earlier attempt is damaged, or the encoder of .mp4 is missing.
        """
        self.total_steps, self.batch_size, self.log_every = total_steps, batch_size, log_every
        self.flops_per_step, self.leader = flops_per_step, leader
        self._losses = deque(maxlen=LOSS_STEPS)
        self._waiting = []  # records of steps since the last write
        self._step, self._clock = start_step, clock
        self._files = contextlib.ExitStack()
        self._bar = self._events = None
        if leader:
            self._open(Storage(directory), start_step)
            if sys.stderr.isatty() if show is None else show:
                self._bar = tqdm(
                    total=total_steps,
                    initial=start_step,
                    bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
                    file=sys.stderr,
                    dynamic_ncols=True,
                )
        self._speed = _Speed(batch_size, peak_flops, clock)

    def _open(self, storage, start_step):
        self._storage, self._folder = storage, Path(storage.root)
        if is_remote(storage.root):
            self._folder = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._uploaded = self._clock()
        self._video_suffix = _video_suffix(self._folder)
        self._open_metrics(start_step)
        self._events = open_events(self._folder / "tensorboard", start_step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def step(self, step, *, loss, grad_norm, learning_rate, flops=None, compiled=False, **facts):
        """Records a training step, when its values are there.

        Args:
            flops: of this step; None means `flops_per_step`.
            compiled: whether the time since the last step held a compilation; it then counts for no speed.
            facts: more of the record, such as the bucket; numbers also go to TensorBoard.
        """
        self._step = step
        self._speed.add(self.flops_per_step if flops is None else flops, counted=not compiled)
        self._losses.append(_plain(loss))
        record = {"step": step, "kind": "train", "loss": loss, "grad_norm": grad_norm}
        record |= {"learning_rate": learning_rate, "compiled": compiled, **facts}
        self._waiting.append(_plain(record))
        write = step % self.log_every == 0 or step == self.total_steps
        if write:
            self._write_window()
        if self._bar is not None:
            self._bar.set_description_str(self._progress(), refresh=False)
            self._bar.update(1)
        elif self.leader and write:
            self._say(f"step {step}/{self.total_steps} {self._progress()}")

    def validation(self, step, loss, **facts):
        """Records a validation loss, and numbers or other facts about it."""
        self._write_window()
        if not self.leader:
            return
        record = _plain({"step": step, "kind": "validation", "loss": loss, **facts})
        self._write([record])
        self._scalars(step, {f"validation/{name}": value for name, value in record.items()})
        told = [name for name in ("loss", "psnr") if record.get(name) is not None]
        said = ", ".join(f"{name} {record[name]:.5f}" for name in told)
        self._say(f"step {step}/{self.total_steps} validation {said}")

    def video(self, name, step, frames, fps):
        """Shows a clip in TensorBoard's image tab and writes it to RUN/validation/step_00000500/NAME.mp4
        (.gif where PyAV is missing).

        Args:
            frames: [T, H, W, 3] uint8 RGB.
        """
        if not self.leader:
            return
        with self._storage.writing(f"validation/step_{step:08d}/{name}{self._video_suffix}") as path:
            if self._video_suffix == ".mp4":
                from animecolor_jax.media_writing import write_video

                write_video(path, frames, fps)
            else:
                path.write_bytes(encode_gif(frames, fps)[0])
        if self._events is not None:
            self._events.image(f"validation/{name}", step, *encode_gif(frames, fps, GIF_SIZE))

    @contextlib.contextmanager
    def pause(self):
        """Leaves what is done within out of the speed: validation, saving, waiting.

        Everything recorded so far is on disk when it begins: no checkpoint made within is ahead of the log.
        """
        with self._speed.pause():
            self.flush()
            yield

    def flush(self):
        """Brings everything recorded so far to disk, or to the object store."""
        self._write_window()
        if self.leader:
            self._sync(force=True)

    def close(self):
        """Flushes, and ends the progress bar."""
        if not self.leader:
            return
        with self._files:
            self.flush()
            self._metrics.close()
            if self._events is not None:
                self._events.close()
            if self._bar is not None:
                self._bar.close()
        self.leader = False

    def summary(self):
        """{"loss", "steps_per_second", "mfu"}: the mean loss of the last 100 steps (those of earlier attempts
        included), and the speed of the last 10 windows; None where unknown."""
        seconds, mfu = self._speed.recent()
        return {"loss": self._loss(), "steps_per_second": 1 / seconds if seconds else None, "mfu": mfu}

    def _open_metrics(self, start_step):
        found = read_metrics(self._storage) if start_step else []
        kept = [record for record in found if record["step"] <= start_step]
        self._losses.extend(record["loss"] for record in kept if record["kind"] == "train")
        Storage(self._folder).write(METRICS, _lines(kept))
        self._metrics = (self._folder / METRICS).open("ab")

    def _write_window(self):
        rates = self._speed.end_window()
        records, self._waiting = self._waiting, []
        if not self.leader or not records:
            return
        none = dict.fromkeys(rates)
        records = [{**record, **(none if record["compiled"] else rates)} for record in records]
        self._write(records)
        for record in records:
            self._scalars(record["step"], {f"train/{name}": value for name, value in record.items()})
        self._sync()

    def _write(self, records):
        self._metrics.write(_lines(records))
        self._metrics.flush()

    def _scalars(self, step, values):
        left_out = ("step", "kind", "compiled")
        if self._events is not None:
            values = {key: value for key, value in values.items() if key.rpartition("/")[2] not in left_out}
            self._events.scalars(step, values)

    def _sync(self, force=False):
        """Files to disk, and to the object store if it is time or `force`."""
        os.fsync(self._metrics.fileno())
        if self._events is not None:
            self._events.flush()
        if not is_remote(self._storage.root):
            return
        if force or self._clock() - self._uploaded >= UPLOAD_SECONDS:
            files = [self._folder / METRICS, *(self._folder / "tensorboard").glob("*")]
            for path in files:
                self._storage.write(path.relative_to(self._folder).as_posix(), path.read_bytes())
            self._uploaded = self._clock()

    def _loss(self):
        """Mean of the last steps' losses; None where one is not finite, or there is none."""
        if not self._losses or None in self._losses:
            return None
        return math.fsum(self._losses) / len(self._losses)

    def _progress(self):
        seconds, mfu = self._speed.recent()
        parts = [f"loss {_number(self._loss(), '.4f')}"]
        if seconds:
            parts.append(f"{seconds:.3g} s/step {self.batch_size / seconds:.3g} clips/s")
        if mfu is not None:
            parts.append(f"mfu {100 * mfu:.1f} %")
        if seconds:
            parts.append(f"left {duration((self.total_steps - self._step) * seconds)}")
        return " ".join(parts)

    def _say(self, text):
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


class _Speed:
    """Time and FLOPs of steps, in windows between two writes of the log."""

    def __init__(self, batch_size, peak_flops, clock):
        self.batch_size, self.peak_flops, self.clock = batch_size, peak_flops, clock
        self.mark = clock()  # the step in progress began here
        self.window = (0, 0.0, 0.0)  # steps, seconds, FLOPs; None for FLOPs where a step's are unknown
        self.windows = deque(maxlen=RATE_WINDOWS)

    def add(self, flops, counted):
        now = self.clock()
        if counted:
            steps, seconds, done = self.window
            done = None if flops is None or done is None else done + flops
            self.window = (steps + 1, seconds + now - self.mark, done)
        self.mark = now

    @contextlib.contextmanager
    def pause(self):
        spent = self.clock() - self.mark
        try:
            yield
        finally:
            self.mark = self.clock() - spent

    def end_window(self):
        """Rates of the window, {name: None} where it holds no counted step."""
        window, self.window = self.window, (0, 0.0, 0.0)
        if window[0]:
            self.windows.append(window)
        seconds, mfu = self._rates([window])
        clips = self.batch_size / seconds if seconds else None
        return {"seconds_per_step": seconds, "clips_per_second": clips, "mfu": mfu}

    def recent(self):
        """(seconds per step, MFU) of the last windows; None where unknown."""
        return self._rates(self.windows)

    def _rates(self, windows):
        steps = sum(window[0] for window in windows)
        seconds = sum(window[1] for window in windows)
        flops = [window[2] for window in windows]
        if not steps:
            return None, None
        if self.peak_flops is None or None in flops or not seconds:
            return seconds / steps, None
        return seconds / steps, sum(flops) / (seconds * self.peak_flops)


def _video_suffix(folder):
    try:
        from animecolor_jax import media_writing
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        print("validation videos are .gif: PyAV is not installed", file=sys.stderr, flush=True)
        return ".gif"
    media_writing.check_output(folder / "validation.mp4")
    return ".mp4"


def read_metrics(directory):
    """The records of a run's metrics.jsonl, in order; none where there is no such file.

    Args:
        directory: RUN, a path, URL or Storage.

    Raises:
        InputError: a line is damaged. An unfinished last one, which a kill leaves, is not counted.
    """
    storage = directory if isinstance(directory, Storage) else Storage(directory)
    data = storage.read(METRICS) if storage.exists(METRICS) else b""
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            record["step"], record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"line {number} is damaged",
                where=f"{storage}/{METRICS}",
                expected="one JSON object with step and kind",
                fix="remove that line, or move the file away",
            ) from error
        records.append(record)
    return records


def _lines(records):
    return b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)


def duration(seconds):
    """Seconds as text with its two largest units: 17 h 3 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((index for index, (value, _) in enumerate(parts) if value), 3)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2])


def _number(value, form):
    return "unknown" if value is None else format(value, form)


def _plain(value):
    """Values as strict JSON has them: NumPy's numbers as Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
