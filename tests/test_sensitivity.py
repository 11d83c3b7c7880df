"""Every metric without a network moves as its definition says; a metric that does not is found out."""

import numpy as np
import pytest

from animecolor_jax.evaluation import sensitivity
from animecolor_jax.evaluation.protocol import Protocol
from animecolor_jax.evaluation.score import Scorer
from data_pipeline.toon import draw_clip

METRICS = ["psnr", "ssim", "sa", "edmd", "tc_dis", "flicker"]


@pytest.fixture(scope="module")
def scores():
    """{version: {metric: value}} of one drawn clip."""
    frames = draw_clip(seed=4, num_frames=5, height=64, width=96).color
    scorer = Scorer(Protocol("p"), METRICS, list(sensitivity.VERSIONS), {})
    scorer.add("clip", frames, {name: make(frames) for name, make in sensitivity.VERSIONS.items()})
    found = scorer.result()
    return {name: {m: found[name].clip_scores[m]["clip"] for m in METRICS} for name in found}


def test_metrics_move_as_their_definitions_say(scores):
    assert sensitivity.failed_claims(scores, METRICS) == []


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_moves_otherwise_is_found_out(scores, metric):
    wrong = {name: dict(row) for name, row in scores.items()}
    wrong["identical"][metric], wrong["flickered"][metric] = (
        wrong["flickered"][metric], wrong["identical"][metric],
    )  # fmt: skip
    failed = sensitivity.failed_claims(wrong, METRICS)
    assert failed and {claim.metric for claim in failed} == {metric}
    wrong["identical"][metric] = None
    assert sensitivity.failed_claims(wrong, [metric])


def test_versions_keep_what_they_should():
    frames = draw_clip(seed=4, num_frames=3, height=32, width=48).color
    versions = {name: make(frames) for name, make in sensitivity.VERSIONS.items()}
    assert all(v.shape == frames.shape and v.dtype == np.uint8 for v in versions.values())
    assert (versions["shifted"][:, 4:, 4:] == frames[:, :-4, :-4]).all()
    changes = np.diff(versions["flickered"].astype(int), axis=0) - np.diff(frames.astype(int), axis=0)
    assert (np.abs(changes) <= 24).all() and (np.abs(changes) == 24).mean() > 0.3
    grey = np.full((1, 8, 8, 3), 120, np.uint8)  # has no hue to turn
    assert np.abs(sensitivity.recolor(grey).astype(int) - grey).max() <= 1
