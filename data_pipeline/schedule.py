"""Which clips make the batch of step s: a pure function of (seed, s), for any number of hosts and workers.

The order of the samples:

1. Every batch comes from one bucket. With n clips in a bucket and batches of B rows, epochs 0 to e - 1 hold
   floor(e * n / B) batches of it together. So buckets have exactly their clips' share of the batches; no
   remainder is dropped, and a bucket of fewer than B clips has a batch every few epochs.
2. Within an epoch the batches of the buckets are mixed at random, by a generator seeded with (seed, epoch).
3. The clips of a bucket are an endless stream, pass after pass, each pass another permutation of all clips,
   seeded with (seed, bucket, pass). Batch j of the bucket takes positions j * B to (j + 1) * B of its stream:
   at any time no clip of a bucket was used more than once more than another one.

Nothing is read in sequence, so any step can be computed at once. Permutations are those of NumPy's default
generator, which a later NumPy may change.
"""

import bisect
import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.shapes import Bucket

# One domain of random streams each, so that no two uses share a stream.
_ORDER, _SHUFFLE, _STEP, _ROW = range(4)


class BatchRows(NamedTuple):
    """The rows of a global batch.

    Attributes:
        bucket: that of all its clips.
        clips: [B] int64, positions of the records in the bucket's split.
        valid: [B] bool, False where a row only fills up the batch.
    """

    bucket: Bucket
    clips: np.ndarray
    valid: np.ndarray


def step_rng(seed, step):
    """The generator of what all rows of the batch of `step` share."""
    return np.random.default_rng((seed, _STEP, step))


def row_rng(seed, step, row):
    """The generator of row `row` of the global batch of `step`."""
    return np.random.default_rng((seed, _ROW, step, row))


@dataclass(frozen=True)
class TrainingSchedule:
    """An endless sequence of batches, in the order that the module describes.

    Attributes:
        counts: ((bucket, number of clips), ...).
        batch_size: B, rows of a global batch.
        seed: 0 or more.
        image_weight: how often an image is used for every use of a clip, in thousandths at the finest.
    """

    counts: tuple[tuple[Bucket, int], ...]
    batch_size: int
    seed: int
    image_weight: float = 1.0

    num_batches = None  # without end

    def __post_init__(self):
        _require(self.counts, "no clips", "counts", "at least one clip")
        _require(self.batch_size >= 1, f"{self.batch_size}", "batch_size", "1 or more")
        _require(self.seed >= 0, f"{self.seed}", "seed", "0 or more")
        _require(self.image_weight >= 0, f"{self.image_weight}", "image_weight", "0 or more")
        _require(any(self._shares), "only images, which image_weight 0 leaves out", "image_weight", "above 0")

    def batches_before(self, epoch):
        """How many batches all epochs before `epoch` have."""
        return sum(self._bucket_batches(epoch))

    def epoch_of(self, step):
        """The epoch that the batch of `step` belongs to."""
        # Rounding down takes less than one batch from every bucket, which bounds the epoch from above.
        last = (step + 1 + len(self.counts)) / sum(self._shares) + 1
        return bisect.bisect_right(range(int(last) + 1), step, key=self.batches_before) - 1

    def batch(self, step):
        """`BatchRows` of `step`, all valid."""
        return _training_batch(self, step)

    @functools.cached_property
    def _shares(self):
        """Batches an epoch of every bucket, exactly."""
        weight = Fraction(self.image_weight).limit_denominator(1000)
        return [
            Fraction(clips, self.batch_size) * (weight if bucket.is_image else 1)
            for bucket, clips in self.counts
        ]

    def _bucket_batches(self, epoch):
        return [epoch * share.numerator // share.denominator for share in self._shares]


@dataclass(frozen=True)
class EvaluationSchedule:
    """Every clip exactly once, bucket after bucket, in the order of the records.

    The last batch of a bucket is filled up by repeating its last clip, with `valid` False.
    """

    counts: tuple[tuple[Bucket, int], ...]
    batch_size: int

    def __post_init__(self):
        _require(self.counts, "no clips", "counts", "at least one clip")
        _require(self.batch_size >= 1, f"{self.batch_size}", "batch_size", "1 or more")

    @property
    def num_batches(self):
        """How many batches there are."""
        return sum(-(-clips // self.batch_size) for _, clips in self.counts)

    def batch(self, step):
        """`BatchRows` of `step`, which is below `num_batches`."""
        for bucket, clips in self.counts:
            batches = -(-clips // self.batch_size)
            if step < batches:
                positions = step * self.batch_size + np.arange(self.batch_size)
                return BatchRows(bucket, np.minimum(positions, clips - 1), positions < clips)
            step -= batches
        raise IndexError(f"step {step} after the last batch")


@functools.lru_cache(maxsize=64)  # asked for once a row
def _training_batch(schedule, step):
    epoch = schedule.epoch_of(step)
    buckets, earlier = _epoch_order(schedule, epoch)
    place = step - schedule.batches_before(epoch)
    index = buckets[place]
    batch = schedule._bucket_batches(epoch)[index] + int(earlier[place])
    return _stream_rows(schedule, *schedule.counts[index], batch)


@functools.lru_cache(maxsize=4)
def _epoch_order(schedule, epoch):
    """For every batch of an epoch, the bucket's index and how many batches of it came before, both [N]."""
    before, after = schedule._bucket_batches(epoch), schedule._bucket_batches(epoch + 1)
    batches = [end - first for first, end in zip(before, after, strict=True)]
    buckets = np.random.default_rng((schedule.seed, _ORDER, epoch)).permutation(
        np.repeat(np.arange(len(batches)), batches)
    )
    earlier = np.empty_like(buckets)
    earlier[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(n) for n in batches])
    return buckets, earlier


def _stream_rows(schedule, bucket, clips, batch):
    positions = batch * schedule.batch_size + np.arange(schedule.batch_size)
    rows = np.empty(schedule.batch_size, np.int64)
    passes = positions // clips
    for number in range(int(passes[0]), int(passes[-1]) + 1):
        inside = passes == number
        rows[inside] = _clip_order(schedule.seed, bucket, number, clips)[positions[inside] % clips]
    return BatchRows(bucket, rows, np.ones(schedule.batch_size, bool))


@functools.lru_cache(maxsize=512)  # a pass or two of each bucket
def _clip_order(seed, bucket, number, clips):
    shape = bucket.frames, bucket.height, bucket.width
    return np.random.default_rng((seed, _SHUFFLE, *shape, number)).permutation(clips)


def _require(holds, what, where, expected):
    if not holds:
        raise InputError(what, where=where, expected=expected)
