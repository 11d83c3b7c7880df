import math

import numpy as np
import pytest

from animecolor_jax.evaluation.statistics import paired_difference, summarize


def named(values):
    return {f"clip{index:04d}": value for index, value in enumerate(values)}


def test_a_large_sample_has_the_interval_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, 800)
    summary = summarize(named(values))
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert summary.mean == pytest.approx(values.mean(), abs=1e-12)
    assert summary.interval == pytest.approx((summary.mean - half, summary.mean + half), abs=0.08 * half)
    assert summary.clips == 800 and summary.undefined == ()


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [summarize(named(rng.exponential(1, 40)), resamples=599) for _ in range(150)]
    covered = np.mean([not summary.excludes(1) for summary in found])
    assert 0.87 <= covered <= 0.99  # 0.95, of 150 draws of a skewed distribution


def test_the_interval_is_skewed_as_the_scores_are():
    summary = summarize(named([20.0] * 30 + [100.0] * 2))  # two clips are identical to their targets
    low, high = summary.interval
    assert high - summary.mean > 1.2 * (summary.mean - low)


def test_more_confidence_is_wider_and_the_seed_decides():
    scores = named(np.random.default_rng(2).normal(size=30))
    (low, high), (lowest, highest) = (summarize(scores, confidence=c).interval for c in (0.9, 0.99))
    assert lowest < low < high < highest
    assert summarize(scores) == summarize(scores) != summarize(scores, seed=1)
    assert summarize(dict(reversed(scores.items()))) == summarize(scores)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1e-3]])
def test_few_clips_still_have_an_interval_around_their_mean(values):
    summary = summarize(named(values))
    low, high = summary.interval
    assert min(values) <= low < summary.mean < high <= max(values)


def test_one_clip_has_a_mean_but_no_interval():
    summary = summarize({"a": 3.0})
    assert (summary.mean, summary.interval, summary.clips) == (3.0, None, 1)
    assert not summary.excludes(0)


def test_equal_scores_have_an_interval_without_width():
    assert summarize(named([0.1] * 7)).interval == pytest.approx((0.1, 0.1))
    assert summarize(named([0.0] * 7)).interval == (0.0, 0.0)


def test_undefined_clips_are_named_and_not_averaged():
    summary = summarize({"b": 2.0, "still": None, "a": 1.0, "nan": math.nan, "inf": math.inf})
    assert summary.mean == 1.5 and summary.clips == 2
    assert summary.undefined == ("inf", "nan", "still")
    assert summarize({"still": None}) == summarize({"still": math.nan})
    assert summarize({"still": None}).mean is None and summarize({}).undefined == ()


def test_pairs_tell_methods_apart_whose_own_intervals_overlap():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 3, 40)
    worse, better = named(20 + difficulty), named(20.5 + difficulty + rng.normal(0, 0.1, 40))
    difference = paired_difference(better, worse)
    assert summarize(worse).interval[1] > summarize(better).interval[0]
    assert difference.excludes(0) and not difference.excludes(0.5)
    assert difference.mean == pytest.approx(summarize(better).mean - summarize(worse).mean)
    mirrored = paired_difference(worse, better)
    assert mirrored.mean == pytest.approx(-difference.mean)
    assert mirrored.interval == pytest.approx([-bound for bound in reversed(difference.interval)], abs=0.01)


def test_a_pair_is_undefined_where_either_score_is():
    difference = paired_difference({"a": 1.0, "b": None, "c": 4.0}, {"a": math.nan, "b": 2.0, "c": 1.0})
    assert (difference.mean, difference.clips, difference.undefined) == (3.0, 1, ("a", "b"))


def test_a_difference_of_other_clips_is_refused():
    with pytest.raises(ValueError, match="only_here"):
        paired_difference({"a": 1.0, "only_here": 1.0}, {"a": 1.0})
