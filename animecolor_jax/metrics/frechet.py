"""The Frechet distance between two sets of features (FID, FVD), from moments that stream and merge.

The distance of two Gaussians, |mu0 - mu1|^2 + tr S0 + tr S1 - 2 tr sqrt(S0 S1), needs no square root of a
matrix: with factors S0 = A^T A and S1 = B^T B, tr sqrt(S0 S1) is the nuclear norm of A B^T, exactly so
where the covariances are singular. All of it is float64 on the host.
Source: arXiv:1706.08500 section 2 (the distance); Chan, Golub and LeVeque 1983, eq. 2.1 (the update).

Axes: N samples, D dimensions of a feature.
"""

import numpy as np

from animecolor_jax.errors import InputError


class Moments:
    """Number, mean and covariance of features that arrive in batches of any size.

    Up to D samples are kept as they are: they are the exact factor of a covariance of low rank, and no
    larger than it. With more, the sum M2 of the outer products of the deviations takes their place.

    Attributes:
        count: samples so far.
    """

    def __init__(self):
        self.count = 0
        self._batches = []  # [n, D] each, while count <= D
        self._mean = self._m2 = None  # [D], [D, D] afterwards

    @property
    def dim(self):
        """D; None before the first sample."""
        if self._m2 is not None:
            return len(self._mean)
        return self._batches[0].shape[1] if self._batches else None

    @property
    def mean(self):
        """[D]."""
        return np.concatenate(self._batches).mean(axis=0) if self._m2 is None else self._mean

    def add(self, features):
        """Takes in features [N, D] of any real dtype.

        Raises:
            InputError: they are not [N, D], are not finite, or D is another than before.
        """
        features = np.array(features, np.float64)  # a copy: the caller may write over its own
        if features.ndim != 2 or not features.shape[1]:
            raise InputError(f"features of shape {features.shape}", where="moments", expected="[N, D]")
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise InputError(
                f"the features of {int((~finite).sum())} samples are not finite, the first is number "
                f"{self.count + int(np.argmin(finite))}",
                where="moments", expected="finite numbers",
                fix="check the frames and the weights that they were computed from",
            )
        if len(features):
            batch = Moments()
            batch.count, batch._batches = len(features), [features]
            self.merge(batch)

    def merge(self, other):
        """Takes in the samples of other moments, which stay as they are.

        Raises:
            InputError: D differs.
        """
        if not other.count:
            return
        if self.count:
            _require_same_dim(self, other)
        count = self.count + other.count
        if self._m2 is None and other._m2 is None and count <= other.dim:
            self._batches += other._batches
        else:
            mean, m2 = other._summary()
            if self.count:
                old_mean, old_m2 = self._summary()
                delta = mean - old_mean
                m2 = old_m2 + m2 + np.outer(delta, delta) * (self.count * other.count / count)
                mean = old_mean + delta * (other.count / count)
            self._mean, self._m2, self._batches = mean, m2, []
        self.count = count

    def factor(self):
        """F [R, D], R <= D, with F^T F the covariance (divided by N - 1 as in `np.cov`); N >= 2."""
        if self._m2 is None:
            features = np.concatenate(self._batches)
            return (features - features.mean(axis=0)) / np.sqrt(self.count - 1)
        values, vectors = np.linalg.eigh(self._m2 / (self.count - 1))
        # what is left of an eigenvalue 0 by rounding would count as its root, which is not small
        noise = max(values[-1], 0.0) * self.dim * np.finfo(np.float64).eps
        return np.sqrt(np.where(values > noise, values, 0.0))[:, None] * vectors.T

    def state(self):
        """The moments as a dict of arrays, to be stored: `features`, or `count`, `mean` and `m2`."""
        if self._m2 is None:
            return {"features": np.concatenate(self._batches) if self._batches else np.zeros((0, 1))}
        return {"count": np.int64(self.count), "mean": self._mean.copy(), "m2": self._m2.copy()}

    @classmethod
    def from_state(cls, state):
        """The moments that `state()` gave.

        Raises:
            InputError: the arrays are none that `state` gives.
        """
        moments = cls()
        if set(state) == {"features"}:
            moments.add(state["features"])
            return moments
        if set(state) == {"count", "mean", "m2"}:
            mean, m2 = (np.array(state[name], np.float64) for name in ("mean", "m2"))
            if mean.ndim == 1 and m2.shape == (len(mean), len(mean)) and int(state["count"]) > len(mean):
                moments.count, moments._mean, moments._m2 = int(state["count"]), mean, m2
                return moments
        raise InputError(
            "the stored moments do not fit together: "
            + ", ".join(f"{name} {np.shape(value)}" for name, value in state.items()),
            where="moments", expected="features [N, D], or count > D, mean [D] and m2 [D, D]",
            fix="compute the features again",
        )

    def _summary(self):
        """Mean [D] and M2 [D, D]."""
        if self._m2 is not None:
            return self._mean, self._m2
        features = np.concatenate(self._batches)
        mean = features.mean(axis=0)
        return mean, (features - mean).T @ (features - mean)


def frechet_distance(moments0, moments1):
    """The Frechet distance of the Gaussians with these moments, a float.

    Of a set with one sample no covariance is known: the distance is then that of the means alone, as in
    VideoGPT. Equal sets give about 0, rounding noise of either sign.

    Raises:
        InputError: a set is empty, or the dimensions differ.
    """
    _require_samples(moments0, moments1)
    difference = moments0.mean - moments1.mean
    distance = difference @ difference
    if min(moments0.count, moments1.count) > 1:
        factors = moments0.factor(), moments1.factor()
        distance += sum((factor**2).sum() for factor in factors) - 2 * _nuclear_norm(*factors)
    return float(distance)


def trace_sqrt(moments0, moments1):
    """tr sqrt(S0 S1) of the covariances, a float; 0 where one of the sets has one sample.

    Raises:
        InputError: as `frechet_distance`.
    """
    _require_samples(moments0, moments1)
    if min(moments0.count, moments1.count) == 1:
        return 0.0
    return float(_nuclear_norm(moments0.factor(), moments1.factor()))


def _nuclear_norm(a, b):
    return np.linalg.svd(a @ b.T, compute_uv=False).sum()


def _require_samples(moments0, moments1):
    for moments in (moments0, moments1):
        if not moments.count:
            raise InputError(
                "a set without samples", where="frechet distance", expected="at least one sample in each",
                fix="check that both folders have frames",
            )
    _require_same_dim(moments0, moments1)


def _require_same_dim(moments0, moments1):
    if moments0.dim != moments1.dim:
        raise InputError(
            f"features of {moments1.dim} dimensions beside those of {moments0.dim}", where="moments",
            expected="features of one network",
        )
