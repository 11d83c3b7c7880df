"""Frechet distance and its moments: recorded values, closed forms, and any split into batches and hosts."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.frechet import Moments, frechet_distance, trace_sqrt

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
I3D, INCEPTION = (load_file(FIXTURES / f"{name}.safetensors") for name in ("i3d", "inception_fid"))
FVD_CASES = ["full_rank", "few_samples", "unequal_counts", "logits400", "one_sample", "identical"]
FID_CASES = ["full_rank", "few_samples", "low_rank", "identical", "shifted"]


def moments_of(features, *, batch=None):
    """Moments of features [N, D], taken in as batches of that size."""
    moments = Moments()
    for start in range(0, len(features), batch or max(len(features), 1)):
        moments.add(features[start : start + (batch or len(features))])
    return moments


def random_features(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 5 * rng.normal(size=d)


def covariance(moments):
    return moments.factor().T @ moments.factor()


def scale_of(*moments):
    """What rounding errors of a distance are measured by: the sum of its terms without their signs."""
    difference = moments[0].mean - moments[1].mean
    return sum((each.factor() ** 2).sum() for each in moments) + np.square(difference).sum()


@pytest.mark.parametrize(
    "fixture, prefix, case, exact",
    [
        *((I3D, "fvd", case, "exact") for case in FVD_CASES),
        *((INCEPTION, "fid", case, "distance_exact") for case in FID_CASES),
    ],
    ids=[*(f"fvd_{case}" for case in FVD_CASES), *(f"fid_{case}" for case in FID_CASES)],
)
@pytest.mark.parametrize("batch", [None, 7])
def test_distance_equals_the_recorded_one(fixture, prefix, case, exact, batch):
    pair = [moments_of(fixture[f"inputs/{prefix}_{case}/features{i}"], batch=batch) for i in (0, 1)]
    expected = fixture[f"outputs/{prefix}_{case}/{exact}"][0]
    trace = fixture[f"outputs/{prefix}_{case}/trace_sqrt"][0]
    assert abs(frechet_distance(*pair) - expected) <= 1e-12 * (abs(expected) + trace)
    assert abs(trace_sqrt(*pair) - trace) <= 1e-12 * trace


def test_distance_of_commuting_gaussians_is_the_closed_form():
    # exact moments: N(0, 1) columns made orthonormal, then stretched along common axes
    rng = np.random.default_rng(1)
    n, d = 40, 6
    centred = rng.normal(size=(n, d))
    white = np.linalg.qr(centred - centred.mean(0))[0] * np.sqrt(n - 1)  # covariance 1, mean 0
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    means, deviations = rng.normal(size=(2, d)), rng.uniform(0.1, 3, size=(2, d))
    pair = [moments_of(white * deviations[i] @ axes.T + means[i]) for i in (0, 1)]
    closed_form = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(*pair) == pytest.approx(closed_form, rel=1e-12)
    assert trace_sqrt(*pair) == pytest.approx((deviations[0] * deviations[1]).sum(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 11, 12, 13, 60], ids=lambda n: f"{n} samples of 12 dimensions")
def test_mean_and_covariance_are_those_of_numpy(n):
    features = random_features(n, 12)
    moments = moments_of(features, batch=5)
    assert (moments.count, moments.dim) == (n, 12)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(covariance(moments), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("n", [9, 16, 50], ids=lambda n: f"{n} samples of 16 dimensions")
def test_no_split_into_batches_and_no_order_of_merging_changes_anything(n):
    features, other = random_features(n, 16), moments_of(random_features(40, 16, seed=3))
    whole = moments_of(features)
    rng = np.random.default_rng(2)
    for batch in (1, 3, n):
        parts = [moments_of(part, batch=batch) for part in np.array_split(features, 4)]
        rng.shuffle(parts)
        merged = Moments()
        for part in parts:
            merged.merge(part)
        pairwise = parts[0]
        parts[2].merge(parts[3])
        pairwise.merge(parts[1])
        parts[2].merge(pairwise)
        for moments in (moments_of(features, batch=batch), merged, parts[2]):
            assert moments.count == n
            np.testing.assert_allclose(moments.mean, whole.mean, rtol=1e-12)
            largest = np.abs(covariance(whole)).max()
            np.testing.assert_allclose(covariance(moments), covariance(whole), rtol=0, atol=1e-12 * largest)
            difference = frechet_distance(moments, other) - frechet_distance(whole, other)
            assert abs(difference) <= 1e-12 * scale_of(whole, other)


def test_merging_leaves_the_other_moments_alone():
    few, many = random_features(3, 4), random_features(9, 4, seed=1)
    moments, others = moments_of(few), [moments_of(many[:4]), moments_of(many)]
    before = [other.state() for other in others]
    for other in others:
        moments.merge(other)
        moments.add(few)
    for other, state in zip(others, before, strict=True):
        for name, value in other.state().items():
            np.testing.assert_array_equal(value, state[name])


def test_features_are_copied():
    features = random_features(3, 8)
    moments = moments_of(features)
    mean = moments.mean.copy()
    features[:] = 0
    np.testing.assert_array_equal(moments.mean, mean)


def test_memory_does_not_grow_with_the_samples():
    moments = Moments()
    for seed in range(5):
        moments.add(random_features(30, 8, seed))
        assert sum(np.size(value) for value in moments.state().values()) <= 8 * 8 + 8 + 1


@pytest.mark.parametrize("n", [0, 1, 6, 7, 40])
def test_state_goes_through_arrays_and_continues(n):
    features, more = random_features(n, 6), random_features(5, 6, seed=1)
    other = moments_of(random_features(9, 6, seed=2))
    state = moments_of(features).state()
    assert all(isinstance(value, (np.ndarray, np.generic)) for value in state.values())
    restored = Moments.from_state(state)
    assert restored.count == n
    restored.add(more)
    whole = moments_of(np.concatenate([features, more]))
    difference = frechet_distance(restored, other) - frechet_distance(whole, other)
    assert abs(difference) <= 1e-12 * scale_of(whole, other)


@pytest.mark.parametrize("n", [2, 8, 100])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_sets_are_about_0_apart(n, offset):
    features = random_features(n, 8) + offset
    pair = moments_of(features), moments_of(features[::-1], batch=3)
    assert abs(frechet_distance(*pair)) <= 1e-12 * scale_of(*pair)


def test_constant_features_have_no_covariance():
    pair = moments_of(np.full((20, 4), 0.1)), moments_of(np.full((20, 4), 0.3))
    assert frechet_distance(*pair) == pytest.approx(4 * 0.2**2, rel=1e-12)


def test_distance_is_symmetric_with_one_set_above_and_one_below_the_dimensions():
    pair = moments_of(random_features(5, 10)), moments_of(random_features(50, 10, seed=1))
    assert frechet_distance(*pair) == pytest.approx(frechet_distance(*pair[::-1]), rel=1e-12)


def test_one_sample_gives_the_distance_of_the_means():
    one, many = random_features(1, 5), random_features(30, 5, seed=1)
    expected = np.square(one[0] - many.mean(0)).sum()
    assert frechet_distance(moments_of(one), moments_of(many)) == pytest.approx(expected, rel=1e-12)
    assert trace_sqrt(moments_of(many), moments_of(one)) == 0


@pytest.mark.parametrize(
    "features, match",
    [
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((2, 0)), r"shape \(2, 0\)"),
        (np.array([[0, 1], [np.nan, 1], [np.inf, 1]]), "2 samples are not finite, the first is number 4"),
        (np.zeros((2, 3)), "3 dimensions beside those of 2"),
    ],
)
def test_unusable_features_are_refused_and_not_counted(features, match):
    moments = moments_of(random_features(3, 2))
    with pytest.raises(InputError, match=match):
        moments.add(features)
    assert moments.count == 3


def test_empty_sets_and_sets_of_other_dimensions_are_refused():
    some = moments_of(random_features(3, 2))
    with pytest.raises(InputError, match="without samples"):
        frechet_distance(some, Moments())
    with pytest.raises(InputError, match="dimensions"):
        frechet_distance(some, moments_of(random_features(3, 4)))
    with pytest.raises(InputError, match="dimensions"):
        some.merge(moments_of(random_features(9, 4)))


@pytest.mark.parametrize("change", [{"m2": np.zeros((3, 3))}, {"count": np.int64(2)}, {"extra": np.zeros(1)}])
def test_state_that_does_not_fit_together_is_refused(change):
    with pytest.raises(InputError, match="do not fit together"):
        Moments.from_state({**moments_of(random_features(9, 4)).state(), **change})
