import collections

import numpy as np
import pytest

from animecolor_jax.errors import InputError
from data_pipeline.schedule import EvaluationSchedule, TrainingSchedule, row_rng, step_rng
from data_pipeline.shapes import Bucket

WIDE, TALL, LONG, IMAGE = Bucket(9, 32, 64), Bucket(9, 64, 32), Bucket(17, 32, 32), Bucket(1, 32, 32)
COUNTS = ((IMAGE, 6), (WIDE, 50), (TALL, 3), (LONG, 21))


def rows(schedule, steps):
    return [schedule.batch(step) for step in steps]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_buckets_have_exactly_their_clips_share_of_the_batches(batch_size):
    schedule = TrainingSchedule(COUNTS, batch_size, seed=3)
    steps = schedule.batches_before(batch_size)  # after B epochs floor(e * n / B) = n
    drawn = collections.Counter(batch.bucket for batch in rows(schedule, range(steps)))
    assert drawn == dict(COUNTS) and steps == 80


@pytest.mark.parametrize("batch_size", [4, 7, 100])
def test_every_clip_of_a_bucket_is_used_equally_often(batch_size):
    schedule = TrainingSchedule(COUNTS, batch_size, seed=3)
    used = collections.defaultdict(collections.Counter)
    for batch in rows(schedule, range(schedule.batches_before(batch_size))):
        used[batch.bucket].update(batch.clips.tolist())
    for bucket, clips in COUNTS:
        assert used[bucket] == dict.fromkeys(range(clips), batch_size)


def test_at_any_time_no_clip_is_more_than_one_use_ahead_of_another():
    schedule = TrainingSchedule(COUNTS, 4, seed=0)
    used = {bucket: np.zeros(clips, int) for bucket, clips in COUNTS}
    for step in range(150):
        batch = schedule.batch(step)
        np.add.at(used[batch.bucket], batch.clips, 1)
        assert np.ptp(used[batch.bucket]) <= 1


def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before():
    schedule = TrainingSchedule(COUNTS, 7, seed=5)
    forward = [(str(b.bucket), b.clips.tolist()) for b in rows(schedule, range(60))]
    again = TrainingSchedule(COUNTS, 7, seed=5)
    for step in np.random.default_rng(0).permutation(60):
        batch = again.batch(int(step))
        assert (str(batch.bucket), batch.clips.tolist()) == forward[step]


def test_seeds_epochs_and_passes_have_different_orders():
    def order(seed, steps):
        schedule = TrainingSchedule(((WIDE, 40), (TALL, 40)), 4, seed)
        return [(str(b.bucket), *b.clips.tolist()) for b in rows(schedule, steps)]

    first = order(0, range(20))
    assert first != order(1, range(20)) and first != order(0, range(20, 40))
    assert [name for name, *_ in first] != sorted(name for name, *_ in first), "buckets are mixed"


def test_adding_a_bucket_does_not_reorder_the_clips_of_another():
    def clips_of(schedule, bucket):
        return [batch.clips.tolist() for batch in rows(schedule, range(80)) if batch.bucket == bucket][:5]

    alone = TrainingSchedule(((WIDE, 50),), 4, 0)
    assert clips_of(alone, WIDE) == clips_of(TrainingSchedule(COUNTS, 4, 0), WIDE)


def test_a_far_step_is_found_at_once_in_its_epoch():
    schedule = TrainingSchedule(COUNTS, 7, seed=0)
    for step in (0, 10, 11, 12, 10**6, 10**9):
        epoch = schedule.epoch_of(step)
        assert schedule.batches_before(epoch) <= step < schedule.batches_before(epoch + 1)
    schedule.batch(10**9)


@pytest.mark.parametrize("weight", [0, 0.5, 2])
def test_images_count_by_their_weight(weight):
    schedule = TrainingSchedule(COUNTS, 4, 0, image_weight=weight)
    batches = rows(schedule, range(schedule.batches_before(8)))
    assert sum(batch.bucket.is_image for batch in batches) == 12 * weight
    assert sum(batch.bucket == WIDE for batch in batches) == 100


def test_evaluation_has_every_clip_once_and_marks_the_rows_that_fill_up():
    schedule = EvaluationSchedule(COUNTS, 4)
    seen = collections.Counter()
    for batch in rows(schedule, range(schedule.num_batches)):
        assert len(batch.clips) == 4
        seen.update((batch.bucket, clip) for clip in batch.clips[batch.valid].tolist())
    assert seen == {(bucket, clip): 1 for bucket, clips in COUNTS for clip in range(clips)}
    with pytest.raises(IndexError):
        schedule.batch(schedule.num_batches)


def test_no_two_generators_share_a_stream():
    generators = [step_rng(0, 0), step_rng(0, 1), step_rng(1, 0)]
    generators += [row_rng(0, step, row) for step in range(3) for row in range(3)]
    assert len({int(rng.integers(2**62)) for rng in generators}) == len(generators)


@pytest.mark.parametrize(
    "make, where",
    [
        (lambda: TrainingSchedule((), 4, 0), "counts"),
        (lambda: TrainingSchedule(COUNTS, 0, 0), "batch_size"),
        (lambda: TrainingSchedule(COUNTS, 4, -1), "seed"),
        (lambda: TrainingSchedule(COUNTS, 4, 0, image_weight=-1), "image_weight"),
        (lambda: TrainingSchedule(((IMAGE, 3),), 4, 0, image_weight=0), "image_weight"),
        (lambda: EvaluationSchedule((), 4), "counts"),
        (lambda: EvaluationSchedule(COUNTS, 0), "batch_size"),
    ],
)
def test_impossible_schedules_are_refused(make, where):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.where == where
