"""Batches for training and evaluation: records -> Grain -> NumPy arrays, the same for any number of workers.

What workers make are rows, not batches: all of them share in every batch, and shared memory holds a few clips
instead of a few batches. (Grain itself imports JAX, but nothing here touches a device.)

Grain and TFDS are imported where they are used: `train.config` needs the config alone, also where neither is
installed.
"""

from dataclasses import dataclass, field

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.examples import Examples
from data_pipeline.schedule import EvaluationSchedule, TrainingSchedule
from data_pipeline.sketch_augment import SketchMix
from data_pipeline.views import ViewConfig

ENDLESS = 2**40  # steps; Grain wants a length


@dataclass(frozen=True)
class LoadConfig:
    """Who reads. None of it changes what is read."""

    workers: int = 0
    """Processes of this host that read and decode; with 0 the training process does it."""
    threads: int = 2
    """Threads of every worker, or of the training process."""
    buffer: int = 2
    """Rows that every worker keeps ready, in shared memory (/dev/shm)."""

    def __post_init__(self):
        for name, least in (("workers", 0), ("threads", 1), ("buffer", 1)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{value}", where=f"load.{name}", expected=f"{least} or more")


@dataclass(frozen=True)
class DataConfig:
    """What training batches are made of."""

    batch_size: int = 16
    """Rows of a batch of all hosts together."""
    seed: int = 0
    """Decides, together with the step, everything that is random."""
    split: str = "train"
    """Split of the dataset."""
    image_weight: float = 1.0
    """How often a single image is used for every use of a clip."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """Which frames are seen, and how."""
    sketch: SketchMix | None = field(default_factory=SketchMix)
    """Extractors and line styles; None leaves sketches to the device (animecolor_jax.sketch)."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """Processes and buffers."""


def training_batches(clips, config, *, encoded=None, tokenize=None, rows=None, start_step=0):
    """The endless batches of training: this host's rows of the global batches of step 0, 1, ...

    The global batch of a step is a pure function of the records, the step, and everything in `config` but
    `load`: the same for any number of hosts, workers and threads, wherever the iteration started.

    Args:
        clips: `records.open_clips(path)`.
        config: DataConfig.
        encoded: `records.open_encoded(path, weights)`; what it holds is not made from the clips.
        tokenize: function of a list of B captions to int32 [B, L]; adds `tokens` to the batches.
        rows: numbers of this host's rows, ascending, as `animecolor_jax.loading.rows_of_host` says for a
            mesh; all by default.
        start_step: step of the first batch.

    Returns:
        `Batches`.

    Raises:
        InputError: no such split, or no clips in it; no such rows; precomputed records that do not
            fit. While iterating: a record is damaged.
    """
    counts = _counts(clips, encoded, config.split)
    schedule = TrainingSchedule(counts, config.batch_size, config.seed, config.image_weight)
    examples = Examples(clips, encoded, config, schedule, _rows(rows, config.batch_size))
    return Batches(examples, tokenize, start_step)


def evaluation_batches(
    clips,
    batch_size,
    *,
    split="test",
    stride=3,
    sketch=None,
    load=None,
    encoded=None,
    tokenize=None,
    rows=None,
):
    """Every clip of a split once, bucket after bucket: the window from frame 0, which is the reference.

    Nothing is random. Where a bucket's clips do not fill its last batch, the last clip is repeated in rows
    whose `valid` is False.

    Args:
        batch_size: rows of a batch of all hosts together.
        split: split of the dataset.
        stride: a window takes every stride-th frame, fewer apart where the clip is too short.
        sketch: SketchMix; the official XDoG if None.
        load: LoadConfig.
    The other arguments, the result and errors are those of `training_batches`.
    """
    config = DataConfig(
        batch_size,
        split=split,
        view=ViewConfig.evaluation(stride),
        sketch=SketchMix() if sketch is None else sketch,
        load=LoadConfig() if load is None else load,
    )
    schedule = EvaluationSchedule(_counts(clips, encoded, split), batch_size)
    examples = Examples(clips, encoded, config, schedule, _rows(rows, batch_size))
    return Batches(examples, tokenize)


class Batches:
    """Iterator over one host's rows of global batches: dicts whose leading axis B is this host's rows.

    - From clips: `video` [B, T, H, W, 3] and `reference` [B, R, H, W, 3] uint8; `sketch` [B, T, H, W] uint8,
      unless left to the device.
    - From precomputed latents instead: `video_mean`, `video_logvar`, `sketch` [B, t, h, w, C];
      `reference_mean`, `reference_logvar` [B, R, h, w, C]. From precomputed image features, of the same
      references: `image_summary` [B, R, S], `image_features` [B, R, N, E]. From precomputed text: `text`
      [B, L, D]. All of these bfloat16.
    - Always: `frame_numbers` [B, T] and `reference_numbers` [B, R] int32, frames of the stored clip; `valid`
      [B] bool; `fps` [B] float32; `id` and `caption`, lists of str, "" where the caption is dropped. With a
      tokenizer: `tokens` [B, L] int32.

    Attributes:
        step: of the batch that comes next.
        batch_size: rows of a batch of all hosts together.
    """

    def __init__(self, examples, tokenize=None, start_step=0):
        self.examples, self.tokenize = examples, tokenize
        self.batch_size = examples.schedule.batch_size
        self.step = start_step
        self._rows = None

    def __iter__(self):
        return self

    def __next__(self):
        if self.step == self.num_batches:
            self.close()
            raise StopIteration
        if self._rows is None:
            self._rows = self._start()
        try:
            batch = next(self._rows)
        except BaseException:
            self.close()  # the other workers would wait for ever
            raise
        self.step += 1
        return batch

    @property
    def num_batches(self):
        """Steps of an evaluation; None of training, which has no end."""
        return self.examples.schedule.num_batches

    def clips_of(self, step):
        """Which clips the rows of all hosts are at `step`: their positions in the bucket's split, a list."""
        return self.examples.schedule.batch(step).clips.tolist()

    def get_state(self):
        """JSON values from which `set_state` goes on, on any number of hosts and workers."""
        names = "seed", "split", "batch_size", "image_weight"
        identity = {name: getattr(self.examples.config, name) for name in names}
        return {"step": self.step, **identity, "clips": self.examples.clips.info["digest"]}

    def set_state(self, state):
        """Goes on where `get_state` was called.

        Raises:
            InputError: the state is that of other data, which has another batch at this step.
        """
        ours = self.get_state()
        for name in ours:
            if name != "step" and state.get(name) != ours[name]:
                raise InputError(
                    f"was {state.get(name)!r}, now it is {ours[name]!r}",
                    where=f"data iterator, {name}",
                    expected="the same data as before",
                    fix="start a new run from the weights, or give start_step",
                )
        self.close()
        self.step = state["step"]

    def close(self):
        """Ends the workers; iterating starts them again."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _start(self):
        import grain
        from absl import flags

        load, count = self.examples.config.load, len(self.examples.rows)
        numbers = grain.MapDataset.range(self.step * count, (self.num_batches or ENDLESS) * count)
        if load.workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its flags, which only programs of absl parse
        threads = grain.ReadOptions(load.threads, prefetch_buffer_size=max(load.threads, load.buffer))
        workers = grain.MultiprocessingOptions(load.workers, per_worker_buffer_size=load.buffer)
        rows = numbers.map(self.examples).to_iter_dataset(threads).mp_prefetch(workers)
        return iter(rows.batch(count, batch_fn=self._collate))

    def _collate(self, rows):
        from data_pipeline.records import decode_bits

        batch = {name: [row[name] for row in rows] for name in rows[0]}
        for name, values in batch.items():
            if not isinstance(values[0], str):
                array = np.stack(values)
                batch[name] = decode_bits(array) if array.dtype == np.uint16 else array
        if self.tokenize is not None:
            batch["tokens"] = np.asarray(self.tokenize(batch["caption"]))
        return batch


def _rows(rows, batch_size):
    rows = tuple(range(batch_size) if rows is None else rows)
    if not rows or list(rows) != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < batch_size:
        raise InputError(
            f"{list(rows)} of {batch_size}", where="rows", expected="ascending, from 0 to batch_size - 1"
        )
    return rows


def _counts(clips, encoded, split):
    """((Bucket, number of clips), ...) of a split."""
    from data_pipeline.records import SPLITS

    if split not in SPLITS:
        raise InputError(f"{split!r}", where="split", expected=f"one of {', '.join(SPLITS)}")
    counts = clips.buckets(split)
    if not counts:
        raise InputError(f"has no clips in split {split!r}", where=clips.storage, expected="at least one")
    if encoded is not None and encoded.buckets(split) != counts:
        raise InputError(
            f"has other buckets or numbers of records than the clips in split {split!r}",
            where=encoded.storage,
            expected="one record for every clip",
            fix="run tools/prepare_data.py --precompute ... again",
        )
    return tuple(counts.items())
