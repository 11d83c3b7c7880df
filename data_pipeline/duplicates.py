"""Near-duplicate clips of a whole dataset, by perceptual hashes and an index that spares comparing all pairs.

A clip is a copy of another if five frames at the same places in both look alike (64-bit hash of luma each)
and their colours do too (a coarse grid of chroma: brightness may differ, a recoloured drawing is no copy).
"""

import dataclasses
from itertools import combinations

import cv2
import numpy as np

HASHES = 5  # frames of a clip that are hashed
HASH_BITS = 64
CHROMA_GRID = 8
LARGEST_DISTANCE = 11.5  # bits; the index is exact up to here
_HASH_SIDE = 32
_BAND_BITS = 16
_BANDS = HASHES * HASH_BITS // _BAND_BITS
_PAIRS_AT_ONCE = 1 << 20
_CHROMA_FLOOR = 4.0  # levels squared, so that compression noise on grey frames has no direction


def hash_frames(frames):
    """(phash, chroma) of a clip's frames [T, H, W, 3] uint8 RGB, as text.

    `phash`: 5 hashes of 16 hex digits joined by "-", of the frames in the middle of each fifth: signs of the
    lowest 64 frequencies (against their median, of a DCT of the luma at 32x32). `chroma`: mean Cb and Cr -
    128 of an 8x8 grid, as signed bytes in hex.
    """
    chosen = [frames[int((index + 0.5) * len(frames) / HASHES)] for index in range(HASHES)]
    small = [cv2.resize(frame, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA) for frame in chosen]
    planes = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb) for frame in small]).astype(np.float32)
    hashes = [f"{_hash_luma(luma):016x}" for luma in planes[..., 0]]
    grid = cv2.resize(planes[..., 1:].mean(axis=0) - 128, (CHROMA_GRID,) * 2, interpolation=cv2.INTER_AREA)
    return "-".join(hashes), np.rint(grid).clip(-128, 127).astype(np.int8).tobytes().hex()


def _hash_luma(luma):
    frequencies = cv2.dct(np.ascontiguousarray(luma))[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def mark_duplicates(clips, config):
    """Drops the copies among clips that are kept so far.

    Of two copies the one with more pixels stays, or else the first. A clip is compared with clips that stay
    only, and never with one of the same shot, of which a still background makes all parts alike. Still images
    are compared with still images.

    Args:
        clips: all `Clip`s of the dataset.
        config: `CurationConfig`: `duplicate_distance`, `duplicate_chroma`.

    Returns:
        The clips in the same order, copies with the reason "duplicate" and the twin's name in `details`.
    """
    if config.duplicate_distance is None:
        return list(clips)
    ranked = sorted((i for i, clip in enumerate(clips) if clip.kept), key=lambda i: -clips[i].pixels)
    if not ranked:
        return list(clips)
    hashes = _parse_hashes([clips[i].phash for i in ranked])
    chroma = _parse_chroma([clips[i].chroma for i in ranked])
    marked, dropped = list(clips), set()
    for better, worse, distance in _close_pairs(hashes, config.duplicate_distance):
        twin, clip = clips[ranked[better]], clips[ranked[worse]]
        same_shot = (twin.source, twin.shot) == (clip.source, clip.shot)
        if better in dropped or worse in dropped or same_shot or twin.is_image != clip.is_image:
            continue
        likeness = _likeness(chroma[better], chroma[worse])
        if likeness >= config.duplicate_chroma:
            dropped.add(worse)
            why = (
                f"like {twin.name}: {distance:.1f} of {HASH_BITS} bits differ, more than "
                f"{config.duplicate_distance:g} wanted; colours {likeness:.2f} alike, less than "
                f"{config.duplicate_chroma:g} wanted"
            )
            marked[ranked[worse]] = dataclasses.replace(
                clip, reasons=(*clip.reasons, "duplicate"), details={**clip.details, "duplicate": why}
            )
    return marked


def _parse_hashes(texts):
    """[N, 5] uint64."""
    words = [[int(word, 16) for word in text.split("-")] for text in texts]
    return np.array(words, np.uint64).reshape(-1, HASHES)


def _parse_chroma(texts):
    """[N, 128] float32, in levels from grey."""
    raw = np.frombuffer(bytes.fromhex("".join(texts)), np.int8)
    return raw.reshape(len(texts), -1).astype(np.float32)


def _likeness(a, b):
    """Cosine of two chroma grids: the same under a change of brightness."""
    floor = _CHROMA_FLOOR
    inner, energy_a, energy_b = (a * b).mean(), (a * a).mean(), (b * b).mean()
    return float((inner + floor) / np.sqrt((energy_a + floor) * (energy_b + floor)))


# ---------------------------------------------------------------- the index


def _close_pairs(hashes, distance):
    """All pairs of clips whose hashes differ in at most `distance` bits on average.

    Pigeonhole: with E bits wrong in 20 bands of 16 bits, some band has E // 20 wrong or fewer; so looking up
    every band with that many bits flipped meets every close pair.

    Args:
        hashes: [N, 5] uint64.

    Returns:
        List of (first, second, distance) with first < second, sorted by the second, then the first.
    Source: Norouzi et al., Fast Search in Hamming Space with Multi-Index Hashing (CVPR 2012).
    """
    budget = int(np.floor(distance * HASHES + 1e-9))  # wrong bits in all hashes together
    bands = hashes.view(np.uint16)  # [N, 20]
    flips = _flip_masks(budget // _BANDS)
    found = [_close_in_band(hashes, bands[:, band], flips, budget) for band in range(_BANDS)]
    codes = np.unique(np.concatenate(found))  # second * N + first
    second, first = np.divmod(codes, max(1, len(hashes)))
    bits = _wrong_bits(hashes, first, second)
    return list(zip(first.tolist(), second.tolist(), (bits / HASHES).tolist(), strict=True))


def _flip_masks(most):
    """All uint16 with at most `most` bits set."""
    chosen = (bits for count in range(most + 1) for bits in combinations(range(_BAND_BITS), count))
    return np.array([sum(1 << bit for bit in bits) for bits in chosen], np.uint16)


def _close_in_band(hashes, keys, flips, budget):
    """Codes (second * N + first) of the close pairs that meet in one band, [M] int64."""
    members = np.argsort(keys, kind="stable")
    counts = np.bincount(keys, minlength=1 << _BAND_BITS)
    starts = np.cumsum(counts) - counts
    found = [np.empty(0, np.int64)]
    for flip in flips:
        wanted = keys ^ flip
        for begin, end in _chunks(counts[wanted]):
            sizes = counts[wanted[begin:end]]
            second = np.repeat(np.arange(begin, end), sizes)
            offset = np.arange(len(second)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            first = members[np.repeat(starts[wanted[begin:end]], sizes) + offset]
            ordered = first < second
            first, second = first[ordered], second[ordered]
            close = _wrong_bits(hashes, first, second) <= budget
            found.append(second[close] * len(hashes) + first[close])
    return np.concatenate(found)


def _chunks(sizes):
    """Ranges of clips that have about `_PAIRS_AT_ONCE` candidates together."""
    if not len(sizes):
        return []
    group = np.cumsum(sizes) // _PAIRS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(sizes)]
    return zip(edges[:-1], edges[1:], strict=True)


def _wrong_bits(hashes, first, second):
    return np.bitwise_count(hashes[first] ^ hashes[second]).sum(axis=1, dtype=np.int64)
