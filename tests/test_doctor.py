"""The look at a computer: what is wrong is found, what is right is not complained about."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax import doctor
from animecolor_jax.config import preset
from animecolor_jax.models import attention


def test_attention_here_is_right_and_its_reference_too():
    checks = doctor.parity()
    assert {check["backend"] for check in checks} == {"chunked", "xla"}
    assert all(check["passed"] and check["error"] > 0 for check in checks)


def test_wrong_attention_is_found(monkeypatch):
    wrong = lambda q, k, v: attention.chunked_attention(q, k * 1.01, v)  # noqa: E731
    monkeypatch.setitem(attention._ATTEND, "chunked", wrong)
    checks = {(check["backend"], check["dtype"]): check["passed"] for check in doctor.parity()}
    assert not checks["chunked", "float32"] and checks["xla", "float32"]


def test_gradients_of_the_reference_are_those_of_jax():
    arrays = np.random.default_rng(1).standard_normal((4, 1, 5, 2, 3))
    ours = doctor._reference(*arrays)
    theirs = doctor._attend(*(jnp.asarray(x, jnp.float32) for x in arrays), "xla")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


RATES = {
    "tokens": 100, "matmul_tflops": 500.0, "attention_tflops": 400.0, "attention_backward_tflops": 300.0,
    "memory_gb": 1000.0, "peak_tflops": 900.0,
}  # fmt: skip


def test_hours_follow_from_rates_and_devices():
    model, latents = preset("tiny"), (3, 8, 12)
    one, eight = (doctor.training(model, latents, RATES, count, 10**9) for count in (1, 8))
    for name in one:
        assert one[name]["hours"] == pytest.approx(8 * eight[name]["hours"])
    joint = one["stage4_joint"]
    assert joint["hours"] * 3600 == pytest.approx(50_000 * joint["seconds_per_step"])
    twice = doctor.training(model, latents, {**RATES, "matmul_tflops": 1000.0}, 1, None)["stage4_joint"]
    assert 0.5 < twice["seconds_per_step"] / joint["seconds_per_step"] < 1
    assert twice["batch"] is None and eight["stage4_joint"]["batch"] == 128


def test_what_is_wrong_is_said():
    about = {"platform": "gpu", "devices": 1}
    good = {"backend": "cudnn", "dtype": "bfloat16", "error": 1e-3, "limit": 1e-2, "passed": True}
    fits = {"stage1_sketch": {"batch": 16, "gib": 20.0, "seconds_per_step": 1.0, "hours": 14.0}}
    assert doctor.advice(about, [good], RATES, fits) == []
    slow = {"clips_per_second": 1.0, "needed": 2.0}
    small = {"stage1_sketch": {**fits["stage1_sketch"], "batch": 2, "gib": 120.0}}
    bad = [{**good, "error": 0.5, "passed": False}]
    said = doctor.advice({**about, "platform": "cpu"}, bad, {**RATES, "matmul_tflops": 100.0}, small, slow)
    assert len(said) == 5
    for word, sentence in zip(("wrong", "no GPU", "11%", "accumulate 8", "precompute"), said, strict=True):
        assert word in sentence


def test_rates_are_of_what_is_computed(monkeypatch):
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.0)
    calls = []
    doctor.seconds_of(lambda x: calls.append(x) or jnp.ones(1), 1)
    assert len(calls) == 2  # one to compile
    found = doctor.rates(preset("tiny").denoiser, (3, 8, 12), "float32")
    assert all(value is None or value > 0 for value in found.values()) and found["peak_tflops"] is None


@pytest.mark.slow
def test_the_tool_reports_and_its_json_is_whole():
    command = [sys.executable, "tools/doctor.py", "--preset", "tiny", "--size", "64x96", "--frames", "9"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["passed"] and report["platform"] == "cpu" and report["devices"] == jax.device_count()
    assert set(report["training"]) == {"stage1_sketch", "stage2_hce", "stage3_lcg", "stage4_joint"}
    assert any("no GPU" in sentence for sentence in report["advice"])
