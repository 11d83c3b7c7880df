"""The look at a computer: what is wrong is found, what is right is not complained about."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import changed_copy

from animecolor_jax import doctor
from animecolor_jax.config import preset
from animecolor_jax.models import attention
from animecolor_jax.parity import devices
from animecolor_jax.train import memory, stages
from animecolor_jax.train.config import ComputeConfig, TrainConfig
from data_pipeline.dataset import DataConfig

FIXTURES = Path(__file__).parent / "fixtures"


def test_attention_here_is_right_and_its_reference_too():
    checks = devices.attention_errors()
    assert {check["backend"] for check in checks} == {"chunked", "xla"}
    assert all(check["passed"] and check["error"] > 0 for check in checks)


def test_wrong_attention_is_found(monkeypatch):
    wrong = lambda q, k, v: attention.chunked_attention(q, k * 1.01, v)  # noqa: E731
    monkeypatch.setitem(attention._ATTEND, "chunked", attention._joined(wrong))
    checks = {(check["backend"], check["dtype"]): check["passed"] for check in devices.attention_errors()}
    assert not checks["chunked", "float32"] and checks["xla", "float32"]


def test_gradients_of_the_reference_are_those_of_jax():
    arrays = np.random.default_rng(1).standard_normal((4, 1, 5, 2, 3))
    ours = devices._reference(*arrays)
    theirs = devices._attend(*(jnp.asarray(x, jnp.float32) for x in arrays), "xla")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def to_tf32(x):
    """Float32 rounded to the 10 bits behind the point that a TF32 product reads."""
    bits = x.view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def test_networks_in_less_than_float32_are_found(tmp_path):
    """Weights rounded to TF32; a device that computes in TF32 rounds both sides of every product."""

    def rounded(tensors):
        for name, value in tensors.items():
            if name.startswith("weights/") and value.dtype == np.float32:
                tensors[name] = to_tf32(value)

    changed_copy(FIXTURES / "t5.safetensors", tmp_path, rounded)
    wrong, _ = devices.network_errors(tmp_path, [], ["text encoder"])  # right ones: test_accelerators.py
    assert not wrong["passed"] and wrong["limit"] < wrong["error"] < 0.01


def test_networks_that_give_no_numbers_or_do_not_run_are_named(tmp_path, monkeypatch):
    def broken(tensors):
        tensors["weights/encoder.final_layer_norm.weight"] *= np.float32("nan")

    changed_copy(FIXTURES / "t5.safetensors", tmp_path, broken)
    found = devices.network_errors(tmp_path, [], ["text encoder"])

    def refuse(*args, **kwargs):
        raise NotImplementedError("no such kernel\nhere")

    monkeypatch.setattr(devices, "check_fixture", refuse)
    found += devices.network_errors(FIXTURES, [], ["text encoder"])
    assert all(each["passed"] is False and each["error"] is None for each in found)
    about = {"platform": "gpu", "devices": 1}
    said = doctor.advice(about, found, RATES, {})
    wanted = ("float32 is not finite", "bfloat16 is not finite", *["does not run: no such kernel"] * 2)
    for words, sentence in zip(wanted, said, strict=True):
        assert words in sentence and "text encoder" in sentence


RATES = {
    "tokens": 100, "matmul_tflops": 500.0, "attention_tflops": 400.0, "attention_backward_tflops": 300.0,
    "memory_gb": 1000.0, "peak_tflops": 900.0,
}  # fmt: skip


def test_hours_follow_from_rates_and_devices(monkeypatch):
    monkeypatch.setattr(doctor, "STAGES", {stages.LCG: 30_000, stages.JOINT: 50_000})
    model, latents = preset("tiny"), (3, 8, 12)
    one, eight = (doctor.training(model, latents, RATES, count, 10**9) for count in (1, 8))
    for name in one:
        assert one[name]["hours"] == pytest.approx(8 * eight[name]["hours"])
    joint = one["stage4_joint"]
    assert joint["hours"] * 3600 == pytest.approx(50_000 * joint["seconds_per_step"])
    twice = doctor.training(model, latents, {**RATES, "matmul_tflops": 1000.0}, 1, None)["stage4_joint"]
    assert 0.5 < twice["seconds_per_step"] / joint["seconds_per_step"] < 1
    assert twice["batch"] is None and eight["stage4_joint"]["batch"] == 128


def test_remat_advised_keeps_as_much_as_fits(monkeypatch):
    monkeypatch.setattr(doctor, "STAGES", {stages.SKETCH: 50_000})
    model, latents, mesh = preset("tiny"), (3, 8, 12), {"fsdp": 8}
    data = DataConfig(batch_size=doctor.PAPER_BATCH)
    for policy in (*doctor.KEEPING, "block"):
        config = TrainConfig(stages.SKETCH, 1, data=data, compute=ComputeConfig(remat=policy))
        limit = 1.0001 * memory.estimate(config, model, latents, mesh)["total"] / doctor.USABLE
        found = doctor.training(model, latents, RATES, 8, limit)
        assert found["stage1_sketch"]["remat"] == policy
        said = doctor.advice({"platform": "gpu", "devices": 8}, [], RATES, found)
        assert [f"--compute.remat {policy}" in sentence for sentence in said] == [True] * (policy != "block")


def test_what_is_wrong_is_said():
    about = {"platform": "gpu", "devices": 1}
    good = {"backend": "cudnn", "dtype": "bfloat16", "error": 1e-3, "limit": 1e-2, "passed": True}
    fits = {"stage1_sketch": {"batch": 16, "gib": 20.0, "remat": "block"}}
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
