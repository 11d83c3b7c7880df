"""What a GPU or TPU must compute like this project's CPUs: `pytest -m gpu`, `pytest -m tpu`.

The ordinary run makes the same checks on the CPU, in part where other tests make them there anyway. Nothing
here imports what only data preparation and command lines need: Grain, TFDS, fsspec, PyAV, tyro.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_models import make_objective, model_config, random_inputs, random_state

from animecolor_jax import cli, platforms
from animecolor_jax.parity import devices
from animecolor_jax.train import stages
from animecolor_jax.train.config import ComputeConfig, OptimizerConfig, TrainConfig
from animecolor_jax.train.step import make_train_step
from data_pipeline.dataset import DataConfig

TOOL = Path(__file__).parents[1] / "tools" / "doctor.py"
FIXTURES = Path(__file__).parent / "fixtures"
STAGES = (stages.SKETCH, stages.HCE, stages.LCG, stages.JOINT)
# of the gradient's norm, against float32 on a CPU, where bfloat16 came to 0.8e-2 to 1.5e-2
TOLERANCES = {"float32": 5e-4, "bfloat16": 3e-2}


@pytest.mark.parametrize(("queries", "keys"), [(300, 333), (257, 1201), (128, 640)])
def test_every_backend_of_attention_equals_float64_forward_and_backward(device, queries, keys):
    found = devices.attention_errors(queries, keys)
    assert {each["backend"] for each in found} == {"chunked", "xla", *devices.own()}
    assert all(each["passed"] for each in found), found  # None, which says that it is not there, is no pass


def test_networks_give_what_pytorch_gave(device):
    networks = ["text encoder"] if device == "cpu" else devices.CASES  # test_parity.py has them all
    found = devices.network_errors(FIXTURES, devices.attention_errors(), networks)
    assert all(each["passed"] for each in found), found
    assert {(each["network"], each["dtype"]) for each in found} == {
        (network, dtype) for network in networks for dtype in ("float32", "bfloat16")
    }


def first_step(stage, dtype):
    """({"loss", "grad_norm"}, gradient as Adam keeps it, as one vector) of a stage's first step."""
    config = TrainConfig(
        stage=stage, steps=10, data=DataConfig(batch_size=2), optimizer=OptimizerConfig(warmup_steps=0),
        compute=ComputeConfig(dtype=dtype, frozen_dtype=dtype),
    )  # fmt: skip
    model = model_config()
    objective = make_objective(config, model)
    start, optimizer = random_state(objective.parts, config)
    step, inputs = make_train_step(objective, optimizer, config.optimizer), random_inputs(model, batch=2)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        _, opt_state, _, values = step(
            start.trainable, start.opt_state, start.ema, start.frozen, inputs, start.key, jnp.int32(0)
        )
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(opt_state[1].mu)])
    return {name: float(value) for name, value in values.items()}, gradient


def test_a_step_of_every_stage_is_that_of_a_cpu(device):
    every = [(stage, dtype) for stage in STAGES for dtype in TOLERANCES]
    for stage, dtype in every[1:2] if device == "cpu" else every:  # bfloat16 against float32 there
        with platforms.traced_for("cpu"), jax.default_device(jax.devices("cpu")[0]):
            expected, of_cpu = first_step(stage, "float32")
        values, gradient = first_step(stage, dtype)
        assert np.isfinite(gradient).all(), stage.name
        difference = np.linalg.norm(gradient - of_cpu) / np.linalg.norm(of_cpu)
        assert difference < TOLERANCES[dtype], (stage.name, dtype, difference)
        assert values == pytest.approx(expected, rel=TOLERANCES[dtype]), (stage.name, dtype)


@pytest.mark.slow
def test_the_doctor_finds_these_devices_well_and_its_json_is_whole(device, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("tools_doctor", TOOL)
    tool = sys.modules["tools_doctor"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--json"])
    arguments = tool.Arguments(preset="tiny", size="64x96", frames=9)
    with pytest.raises(SystemExit) as stop:
        cli.finish(lambda: tool.run(arguments))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stop.value.code == 0 and report["passed"], report["advice"]
    assert report["platform"] == device and report["devices"] == jax.device_count()
    assert {each["network"] for each in report["networks"]} == set(devices.CASES)
    assert set(report["training"]) == {stage.name for stage in STAGES}
    assert any("no GPU" in sentence for sentence in report["advice"]) == (device == "cpu")
