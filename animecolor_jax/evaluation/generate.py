"""Colours the clips of a dataset's split, to be scored from memory.

Every device of this host has networks of its own and colours a clip by itself, so that a clip's pixels do not
depend on how many devices there are. Results are also written as lossless video, OUT/generated/HASH/NAME.mkv,
for the report, and so that nothing is coloured twice; HASH is that of weights, data and numbers.
"""

import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np

from animecolor_jax import media, media_writing
from animecolor_jax.config import CONFIG_CLASSES
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.run import check_method, digest
from animecolor_jax.pipeline import NEGATIVE_PROMPT, Pipeline
from animecolor_jax.weights import Weights


@dataclass(frozen=True)
class ColorConfig:
    """How clips are coloured.

    Raises:
        InputError: a number out of its range.
    """

    steps: int | None = None
    """Default: what the weights name, else 50."""
    guidance: float | None = None
    """Default: what the weights name, else 6."""
    sampler: str = "ddim"
    seed: int = 43
    """The same for every clip."""
    negative_prompt: str = NEGATIVE_PROMPT
    dtype: str | None = None
    """Default: the weights' own."""
    split: str = "test"
    stride: int = 3
    """A clip is every stride-th frame of the stored one, from the first; that is also the reference."""
    clips: int = 0
    """Number of clips, the first ones of the split; 0: all."""

    def __post_init__(self):
        for name, least in (("steps", 1), ("stride", 1), ("clips", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{value}", where=f"--color.{name}", expected=f"{least} or more")


def method_name(weights):
    """What the colouring by a weights directory is called: the directory's name, or that of the training run
    which it lies in."""
    folder = Path(weights).resolve()
    return folder.parent.name if (folder.parent / "run.json").exists() else folder.name


class Colored:
    """The clips of a split with what the networks make of them; `Files`' counterpart.

    Attributes:
        names: ids of the clips of this process.
    """

    has_sketches, notes = True, ()

    def __init__(self, weights, data, method, config, protocol, out, process=0, processes=1):
        """
        Args:
            weights: weights directory. data: dataset. method: what the result is called.
            config: ColorConfig. protocol: Protocol. out: folder for coloured clips, or None: not kept.

        Raises:
            InputError: a network is missing, or the dataset has no clips in the split.
        """
        self.protocol, self.methods = protocol, [check_method(method)]
        if protocol.mask:
            raise InputError(
                f"protocol {protocol.name} needs masks, which datasets do not have", where="--protocol",
                expected="a protocol without masks", fix="colour first, then score files with --mask",
            )  # fmt: skip
        self.weights = Weights(weights)
        self.weights.require(*CONFIG_CLASSES)
        best = self.weights.inference
        self.config = replace(config, **best.filled(steps=config.steps, guidance=config.guidance))
        from data_pipeline import records  # TFDS, which the scoring of files does not need

        self._clips = records.open_clips(str(data))
        self._steps = self._open().num_batches
        total = min(config.clips or self._steps, self._steps)
        # the order of evaluation does not change, so a step is a clip for ever
        self._step_of = {self._name(step): step for step in range(total)}
        self.names = list(self._step_of)[process::processes]
        self.folder = None if out is None else Path(out) / "generated" / digest(self.settings)[:8]
        self.pixel_source = f"target stored video; {method} memory; line art of the targets"
        self._free, self._pipelines, self._lock = queue.SimpleQueue(), {}, threading.Lock()
        for device in jax.local_devices():
            self._free.put(device)

    def _open(self):
        from data_pipeline.dataset import evaluation_batches

        return evaluation_batches(self._clips, 1, split=self.config.split, stride=self.config.stride)

    def _name(self, step):
        return f"{self.config.split}-{step:05d}"

    @property
    def settings(self):
        """What all scores depend on: weights, data and numbers."""
        files = sorted(self.weights.directory.glob("*.safetensors"))
        stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        windows = self.weights.inference.window, self.weights.inference.overlap
        return [stamps, self._clips.info["digest"], asdict(self.config), windows]

    @property
    def facts(self):
        """{clip of any process: what its scores depend on}; all is in `settings`."""
        return dict.fromkeys(self._step_of)

    def check(self, scorer):
        """Nothing: clips of a dataset are as long and large as their buckets."""

    def load(self, names):
        """Yields (name, arguments of `Scorer.add`) as clips are finished, some in advance."""
        devices = jax.local_device_count()
        if devices == 1:  # in this thread, which Ctrl-C reaches
            for name in names:
                yield name, self._make(name, self._read(name))
            return
        pool, running = ThreadPoolExecutor(devices), deque()
        try:
            for name in names:
                running.append((name, pool.submit(self._make, name, self._read(name))))
                if len(running) > devices:
                    name, clip = running.popleft()
                    yield name, clip.result()
            for name, clip in running:
                yield name, clip.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, name):
        batches = self._open()
        batches.step = self._step_of[name]
        try:
            batch = next(batches)
        finally:
            batches.close()
        row = {key: batch[key][0] for key in ("video", "sketch", "reference", "caption", "fps")}
        return {key: value if isinstance(value, str) else np.asarray(value) for key, value in row.items()}

    def _make(self, name, row):
        """Arguments of `Scorer.add` of one clip, coloured on a device that has nothing to do."""
        file = None if self.folder is None else self.folder / f"{name}.mkv"
        if file is not None and file.is_file():
            video = media.read_video(file).frames
        else:
            video = self._color(row)
            if file is not None:
                media_writing.write_video(file, video, float(row["fps"]))
        return {"target": row["video"], "generated": {self.methods[0]: video}, "sketch": row["sketch"]}

    def _color(self, row):
        device, config = self._free.get(), self.config
        try:
            with jax.default_device(device):
                pipeline = self._pipeline(device)
                return pipeline(
                    np.repeat(row["sketch"][..., None], 3, axis=-1), row["reference"][0],
                    prompt=row["caption"], negative_prompt=config.negative_prompt, num_steps=config.steps,
                    guidance_scale=config.guidance, sampler=config.sampler, key=jax.random.key(config.seed),
                    progress=False,
                )  # fmt: skip
        finally:
            self._free.put(device)

    def _pipeline(self, device):
        with self._lock:  # one reads the files at a time
            if device not in self._pipelines:
                self._pipelines[device] = Pipeline.load(self.weights.directory, dtype=self.config.dtype)
            return self._pipelines[device]

    def read_clip(self, kind, name):
        """The frames of the method, "target" or "sketch" as they are scored."""
        if kind in ("target", "sketch"):
            clip = self._read(name)["video" if kind == "target" else kind]
        else:
            clip = media.read_video(self.folder / f"{name}.mkv").frames
        protocol = replace(self.protocol, values="uint8")
        return protocol.prepare(protocol.choose(clip))
