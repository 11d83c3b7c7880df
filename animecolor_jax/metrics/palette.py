"""Palettes of clips, and how far one is from another: what colours there are, not where. In NumPy float64.

Distances are Euclidean in CIE L*a*b* (Delta E of 1976): about 2 can just be seen, from black to white it
is 100.
"""

import numpy as np
from scipy.optimize import linprog

from animecolor_jax.errors import InputError

COLORS = 16  # of a palette
STARTS = 8  # of k-means, the best of which counts: palettes of one clip differ less from seed to seed
SETTLED = 0.1  # Delta E that no centre moves by in the last round
MAX_ROUNDS = 100
CELL = 8  # 8-bit levels: side of the cubes of colours that k-means takes for one colour, their mean
_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
_WHITE = _XYZ.sum(1)  # D65; as the sum, it makes greys come out without any colour
_BENT = 6 / 29  # the cube root above it cubed, a line below


def srgb_to_lab(colors):
    """[..., 3] uint8 sRGB -> [..., 3] float64, L* in [0, 100], a* and b* about -108 to 98; white is D65.

    Source: IEC 61966-2-1 for sRGB, CIE 15 for L*a*b*.
    """
    values = np.arange(256) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    x = linear[colors] @ _XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(x > _BENT**3, np.cbrt(x), x / (3 * _BENT**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def palette(frames, colors=COLORS, seed=0):
    """The main colours of a clip: k-means in L*a*b* over all pixels, the best of several k-means++ starts.

    The same pixels give the same palette, in whatever order they stand.

    Args:
        frames: [T, H, W, 3] uint8, or one image [H, W, 3].
        colors: K, 1 or more.
        seed: of the starts.

    Returns:
        centres [K, 3] float64 in L*a*b*, and weights [K] float64 that sum to 1, the largest first. They are
        fewer than K, and exact, where the frames have no more than K distinct colours; colours that are very
        much alike may also leave fewer.

    Raises:
        InputError: frames of another shape or dtype, without pixels, or `colors` below 1.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] != 3 or not frames.size:
        raise InputError(
            f"{frames.dtype} of shape {list(frames.shape)}", where="frames",
            expected="uint8 [T, H, W, 3] or [H, W, 3] with at least one pixel",
        )  # fmt: skip
    if colors < 1:
        raise InputError(f"{colors}", where="colors", expected="1 or more")
    red, green, blue = np.moveaxis(frames.astype(np.uint32), -1, 0)
    codes, counts = np.unique((red << 16 | green << 8 | blue).ravel(), return_counts=True)
    distinct = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
    centres, shares = srgb_to_lab(distinct), counts / counts.sum()
    if len(centres) > colors:
        cells = np.unique(distinct // CELL @ [1 << 16, 1 << 8, 1], return_inverse=True)[1]
        centres, shares = _means(centres, shares, cells, cells.max() + 1)
    if len(centres) > colors:
        rng = np.random.default_rng(seed)
        found = [_k_means(centres, shares, _spread_out(centres, shares, colors, rng)) for _ in range(STARTS)]
        _, centres, shares = min(found, key=lambda one: one[0])
    order = np.argsort(-shares, kind="stable")
    return centres[order], shares[order]


def palette_distance(a, b):
    """The earth mover's distance between two palettes, in Delta E.

    It is how far, on average, a pixel's colour has to move for one palette to become the other: 0 for the
    same colours in the same shares. A metric, solved exactly.

    Args:
        a, b: (centres [K, 3] in L*a*b*, weights [K]) of `palette`, which may differ in K.

    Raises:
        ValueError: weights do not fit the centres, are negative, or do not sum to 1.

    Source: Rubner et al. 2000.
    """
    for centres, weights in (a, b):
        if np.shape(centres) != (len(weights), 3) or np.min(weights) < 0 or abs(np.sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"centres {np.shape(centres)} with weights {weights}, expected [K, 3], and [K] that sum to 1"
            )
    (centres, shares), (others, needs) = a, b
    costs = np.linalg.norm(np.subtract.outer(centres, others)[:, range(3), :, range(3)], axis=0)
    leaving, coming = np.eye(len(shares)), np.eye(len(needs))
    moves = np.vstack([np.kron(leaving, np.ones(len(needs))), np.kron(np.ones(len(shares)), coming)])
    # One of the equations follows from the others. Left in, rounding could set it against them.
    found = linprog(costs.ravel(), A_eq=moves[:-1], b_eq=np.concatenate([shares, needs])[:-1], method="highs")
    if not found.success:
        raise ValueError(f"no distance between these palettes: {found.message}")
    return max(float(found.fun), 0.0)


def _spread_out(points, shares, number, rng):
    """`number` of the points [N, 3], each drawn with a chance of its share times its squared distance from
    the nearest of those before it. Source: Arthur and Vassilvitskii 2007 (k-means++)."""
    chosen = [rng.choice(len(points), p=shares / shares.sum())]
    distances = np.full(len(points), np.inf)
    while len(chosen) < number:
        distances = np.minimum(distances, np.square(points - points[chosen[-1]]).sum(-1))
        mass = shares * distances
        chosen.append(rng.choice(len(points), p=mass / mass.sum()))
    return points[chosen]


def _k_means(points, shares, centres):
    """Lloyd's rounds from `centres`. Returns (mean squared distance, centres [K, 3], shares [K]); a centre
    that loses all points is left out."""
    for _ in range(MAX_ROUNDS):
        nearest = np.argmin(np.square(centres).sum(-1) - 2 * points @ centres.T, axis=1)
        kept, nearest = np.unique(nearest, return_inverse=True)
        before = centres[kept]
        centres, weights = _means(points, shares, nearest, len(kept))
        if np.square(centres - before).sum(-1).max() <= SETTLED**2:
            break
    error = shares @ np.square(points - centres[nearest]).sum(-1)
    return error, centres, weights


def _means(points, shares, groups, number):
    """Weighted means [number, 3] of the points [N, 3] of every group, and its share [number]."""
    weights = np.bincount(groups, shares, number)
    sums = [np.bincount(groups, shares * axis, number) for axis in points.T]
    return np.stack(sums, axis=-1) / weights[:, None], weights
