import dataclasses

import cv2
import numpy as np
import pytest
from cartoons import cartoon, encoded, resized, stream

from data_pipeline import duplicates
from data_pipeline.curation import CurationConfig, curate_image, curate_video
from data_pipeline.duplicates import mark_duplicates

CONFIG = CurationConfig(min_side=96, max_text=None)


def no_text(frames):
    return 0.0


def clip(frames, source="a.mp4", config=CONFIG):
    (found,) = curate_video(stream(frames), source, config, no_text)
    assert found.kept, found.details
    return found


def dropped(*clips, config=CONFIG):
    """Indices of the clips that are marked."""
    marked = mark_duplicates(list(clips), config)
    return [index for index, found in enumerate(marked) if found.reasons == ("duplicate",)]


def copies(frames):
    height, width = frames.shape[1:3]
    bright = np.clip(frames * 1.1 + 8, 0, 255).astype(np.uint8)
    return {
        "the same": frames,
        "re-encoded": encoded(frames, 32),
        "smaller": resized(frames, height * 2 // 3, width * 2 // 3),
        "brighter": bright,
        "darker": (frames * 0.75).astype(np.uint8),
        "cropped": frames[:, 2 : height - 2, 3 : width - 3],
        "half the rate": frames[::2],
    }


@pytest.mark.parametrize("line_art", [False, True])
@pytest.mark.parametrize("name", list(copies(np.zeros((2, 16, 16, 3), np.uint8))))
def test_copies_are_dropped(name, line_art):
    frames = cartoon(1, 20, line_art=line_art)
    first, other, copy = clip(frames), clip(cartoon(2, 20), "b.mp4"), clip(copies(frames)[name], "c.mp4")
    assert dropped(first, other, copy) == [2]
    why = mark_duplicates([first, other, copy], CONFIG)[2].details["duplicate"]
    assert first.name in why and "more than 6 wanted" in why


def test_other_clips_are_no_copies():
    clips = [clip(cartoon(seed, 10, line_art=art), f"{seed}{art}") for seed in range(5) for art in (0, 1)]
    assert dropped(*clips) == []


def test_the_same_drawing_in_other_colours_is_no_copy():
    frames = (64 + cartoon(1) // 2).astype(np.uint8)  # no colour is cut off
    planes = [cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]] for frame in frames]
    recolored = np.stack([cv2.cvtColor(frame, cv2.COLOR_YCrCb2RGB) for frame in planes])
    first, second = clip(frames), clip(recolored, "b.mp4")
    assert dropped(first, second) == []
    assert dropped(first, second, config=dataclasses.replace(CONFIG, duplicate_chroma=-1)) == [1]


def test_parts_of_one_shot_are_no_copies():
    config = dataclasses.replace(CONFIG, max_clip_frames=10)
    frames = np.concatenate([cartoon(1, 10), cartoon(1, 10)])
    parts = curate_video(stream(frames), "a.mp4", config, no_text)
    assert len(parts) == 2 and parts[0].phash == parts[1].phash and dropped(*parts) == []
    assert dropped(parts[0], dataclasses.replace(parts[1], source="b.mp4")) == [1]


def test_the_larger_copy_stays_and_else_the_first():
    frames = cartoon(1, 12, height=216, width=384)
    large, small = clip(frames, "large.mp4"), clip(resized(frames, 144, 256), "small.mp4")
    assert dropped(small, large) == [0] and dropped(large, small) == [1] and dropped(large, large) == []
    assert dropped(small, dataclasses.replace(small, source="b.mp4")) == [1]


def test_dropped_clips_have_no_copies():
    first, copy = clip(cartoon(1)), clip(cartoon(1), "b.mp4")
    gone = dataclasses.replace(first, reasons=("short",), details={"short": ""})
    assert mark_duplicates([gone, copy], CONFIG) == [gone, copy]


def chain(*offsets):
    """Clips whose hashes lie on a line: two differ by the difference of their offsets, in bits a hash."""
    base = clip(cartoon(1))
    words = [int(word, 16) for word in base.phash.split("-")]
    hashes = ["-".join(f"{word ^ ((1 << offset) - 1):016x}" for word in words) for offset in offsets]
    return [dataclasses.replace(base, source=str(i), phash=text) for i, text in enumerate(hashes)]


def test_only_clips_that_stay_drop_others():
    assert dropped(*chain(0, 5, 10)) == [1]
    assert dropped(*chain(0, 6, 13)) == [1]
    assert dropped(*chain(0, 7, 14)) == []


def test_nothing_is_asked_without_a_distance():
    config = dataclasses.replace(CONFIG, duplicate_distance=None)
    clips = [clip(cartoon(1)), clip(cartoon(1), "b.mp4")]
    assert mark_duplicates(clips, config) == clips and mark_duplicates([], CONFIG) == []


def test_images_are_compared_with_images():
    frame = cartoon(1, 1)[0]
    image, twin = (curate_image(frame, name, CONFIG, no_text) for name in ("a.png", "b.png"))
    assert dropped(image, twin) == [1]
    assert dropped(image, dataclasses.replace(twin, is_image=False)) == []


@pytest.mark.parametrize("distance", [0, 2.4, 6, 9, duplicates.LARGEST_DISTANCE])
def test_the_index_finds_what_comparing_all_pairs_finds(distance):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (60, 5), dtype=np.uint64)
    hashes = np.concatenate([hashes, hashes, hashes])
    budget = int(distance * 5 + 1e-9)
    for row in range(60, 180):  # copies with about as many wrong bits as are allowed, anywhere
        wrong = rng.choice(320, np.clip(budget + rng.integers(-2, 3), 0, 320), replace=False)
        np.bitwise_xor.at(hashes[row], wrong // 64, np.uint64(1) << (wrong % 64).astype(np.uint64))
    bits = np.bitwise_count(hashes[:, None] ^ hashes).sum(-1, dtype=int)
    expected = [(i, j) for j in range(180) for i in range(j) if bits[i, j] <= budget]
    found = duplicates._close_pairs(hashes, distance)
    assert [(first, second) for first, second, _ in found] == expected and len(expected) > 30
    assert all(bits[first, second] == pytest.approx(5 * apart) for first, second, apart in found)


def test_a_crowd_of_equal_clips_is_searched_in_chunks(monkeypatch):
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 50)
    assert dropped(*chain(*[0] * 30)) == list(range(1, 30))
