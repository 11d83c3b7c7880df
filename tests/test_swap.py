import numpy as np
import pytest

from animecolor_jax.evaluation.swap import summarize_swaps, swap_result
from animecolor_jax.metrics.palette import srgb_to_lab
from data_pipeline.toon import draw_clip


def drawn(seed, palette_seed=None):
    return draw_clip(5, 48, 80, seed=seed, palette_seed=palette_seed).color


def results(nearer, clips):
    return {f"clip{at:03d}": {"to_new": 1.0, "to_old": 2.0, "nearer": at < nearer} for at in range(clips)}


@pytest.mark.parametrize("seed", range(4))
def test_a_clip_in_the_new_colours_is_nearer_to_the_new_reference(seed):
    old, new = drawn(seed), drawn(seed, palette_seed=100 + seed)
    found = swap_result(new, new[0], old[0])
    assert found["nearer"] and found["to_new"] < found["to_old"]
    ignored = swap_result(old, new[0], old[0])  # a model that does not read its reference
    assert not ignored["nearer"]
    assert ignored["to_new"] > ignored["to_old"]


def test_as_far_from_both_is_not_nearer():
    clip, other = drawn(0), drawn(1)
    found = swap_result(clip, other[0], other[0])
    assert found["to_new"] == found["to_old"] and not found["nearer"]
    assert swap_result(clip, clip, other)["to_new"] == pytest.approx(0, abs=1e-6)  # a clip as the reference


@pytest.mark.parametrize(
    ("nearer", "clips", "interval"),
    [
        (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)  # fmt: skip
def test_the_share_has_wilsons_interval(nearer, clips, interval):
    """Values of Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    found = summarize_swaps(results(nearer, clips))
    assert (found.nearer, found.clips, found.share) == (nearer, clips, nearer / clips)
    assert found.interval == pytest.approx(interval, abs=5.1e-5)
    assert len(found.further) == clips - nearer and f"clip{nearer:03d}" not in found.further[1:]


def test_the_summary_is_a_line():
    text = str(summarize_swaps(results(29, 32)))
    assert text == "90.6% of 32 clips are nearer to the new reference (95% interval 75.8% to 96.8%)"


def test_no_clips_have_no_share():
    with pytest.raises(ValueError, match="no clip"):
        summarize_swaps({})


def test_palettes_of_one_colour_compare_the_mean_colours():
    old, new = drawn(2), drawn(2, palette_seed=7)
    means = [srgb_to_lab(frames).reshape(-1, 3).mean(0) for frames in (new, new[0], old[0])]
    found = swap_result(new, new[0], old[0], colors=1)
    assert found["to_new"] == pytest.approx(np.linalg.norm(means[0] - means[1]), abs=1e-9)
    assert found["to_old"] == pytest.approx(np.linalg.norm(means[0] - means[2]), abs=1e-9)


def test_the_seed_repeats_a_result():
    old, new = drawn(2), drawn(2, palette_seed=7)
    first, again, other = (swap_result(new, new[0], old[0], seed=seed) for seed in (0, 0, 1))
    assert first == again != other
