"""The measure of metrics: its PyTorch counterparts compute what ours do, and what it reports."""

import jax
import numpy as np
import pytest

from animecolor_jax import benchmarks_metrics
from animecolor_jax.benchmarks_metrics import NETWORKS, clips, network_metric, pairs, pixel_metrics

# Of distances and features: what float32 loses in a different order of additions, over their maximum.
NETWORK_ERROR = 2e-5


@pytest.fixture(scope="module")
def frames():
    return clips(9, 40, 56)


@pytest.mark.torch
def test_pixel_counterparts_equal_ours(frames):
    pytest.importorskip("torch")
    ours, theirs = pixel_metrics(*frames), benchmarks_metrics.torch_pixel_metrics(*frames)
    assert ours.keys() == theirs.keys()
    for name, error in {"psnr": 1e-5, "ssim": 1e-6, "sa": 1e-6}.items():
        found = np.asarray(ours[name]())
        assert found.shape == (9,) and np.ptp(found) > 0
        np.testing.assert_allclose(found, theirs[name]().numpy(), rtol=0, atol=error)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", NETWORKS)
def test_network_counterparts_equal_ours(name, frames):
    pytest.importorskip("torch")
    count = 9 if name.startswith("i3d") else 2
    cut = [clip[:count] for clip in frames]
    module, state = benchmarks_metrics.torch_network(name)
    with jax.default_matmul_precision("float32"):
        found = np.asarray(network_metric(name, state, *cut)())
    expected = benchmarks_metrics.torch_network_metric(name, module, *cut)().numpy()
    assert found.shape == expected.shape and np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=NETWORK_ERROR * np.abs(expected).max())


def test_every_metric_gets_a_line_in_frames_a_second(monkeypatch):
    monkeypatch.setattr(benchmarks_metrics, "FRAMES", 2)
    monkeypatch.setattr(benchmarks_metrics, "HEIGHT", 40)
    monkeypatch.setattr(benchmarks_metrics, "WIDTH", 56)
    monkeypatch.setattr(benchmarks_metrics, "NETWORKS", {})
    lines = benchmarks_metrics.metrics("none", 1)
    assert [line["name"] for line in lines] == ["psnr", "ssim", "sa"]
    for line in lines:
        assert line["shape"] == "2 frames of 40x56" and line["unit"] == "frames/s"
        assert line["ours"] > 0 and line["theirs"] is None and line["ratio"] is None


def test_networks_are_measured_one_by_one_on_the_frames_that_fit(monkeypatch, frames):
    built = []
    fake = lambda name, state, *cut: built.append((name, len(cut[0]), state)) or (lambda: None)  # noqa: E731
    monkeypatch.setattr(benchmarks_metrics, "network_metric", fake)
    found = []
    for name, count, sides in pairs(*frames, against_torch=False):
        found.append((name, count))
        assert sides.keys() == {"ours"}
    assert [(name, count, None) for name, count in found[3:]] == built
    assert dict(found)["lpips_vgg"] == 2 and dict(found)["i3d (fvd)"] == 9
