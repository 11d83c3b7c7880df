"""The measure of training steps: what it reports, what stages take of memory, where it runs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from animecolor_jax import benchmarks_train, flops
from animecolor_jax.config import preset

TINY = preset("tiny")
DENOISER = dataclasses.replace(TINY.denoiser, num_layers=2, text_length=8)
SHORT = dataclasses.replace(
    TINY,
    denoiser=DENOISER,
    lcg=dataclasses.replace(DENOISER, in_channels=DENOISER.out_channels),
    hce=dataclasses.replace(TINY.hce, model_dim=DENOISER.dim, num_cross=1, depth=1),
)
SHAPE = benchmarks_train.Shape("tiny", SHORT, (2, 4, 6), "float32")


def wide():
    """A model whose activations weigh more than its constants, and whose blocks are scanned."""
    denoiser = dataclasses.replace(TINY.denoiser, num_layers=6, head_dim=16, text_length=16)
    hce = dataclasses.replace(TINY.hce, model_dim=denoiser.dim, num_cross=3)
    lcg = dataclasses.replace(denoiser, in_channels=denoiser.out_channels)
    return dataclasses.replace(TINY, denoiser=denoiser, lcg=lcg, hce=hce)


@pytest.fixture(scope="module")
def memory():
    """{stage: (planned bytes, bound)} with batch 4 and the configs' remat."""
    shape, found = benchmarks_train.Shape("wide", wide(), (3, 12, 20), "float32", remat="block"), {}
    for stage in benchmarks_train.STAGES:
        planned = benchmarks_train.Step(stage, shape, 4).planned
        first = found["stage1_sketch"][0] if found else planned
        bound = benchmarks_train.memory_bound(stage, shape.model, shape.latents, 4, first, "float32")
        found[stage.name] = planned, bound
    return found


@pytest.mark.slow
def test_stage_2_takes_well_less_than_stage_1(memory):
    assert memory["stage2_hce"][0] < 0.8 * memory["stage1_sketch"][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage3_lcg", "stage4_joint"])
def test_frozen_networks_take_their_weights_and_the_bank(stage, memory):
    planned, bound = memory[stage]
    assert planned <= bound


@pytest.mark.slow
def test_report_has_a_line_for_each_stage(monkeypatch, capsys):
    monkeypatch.setitem(benchmarks_train.SHAPES, "small", SHAPE)
    monkeypatch.setattr(benchmarks_train, "STAGES", benchmarks_train.STAGES[1::2])
    benchmarks_train.main(["--repeats", "1", "--batch-size", "2", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for line, stage in zip(report["results"], benchmarks_train.STAGES, strict=True):
        assert stage.name in line["name"] and line["ours"] > 0 and line["ratio"] is None
        assert line["mfu"] is None and line["planned_gib"] > 0
        assert line["tflop"] == flops.train_step(stage, SHORT, SHAPE.latents, 2) / 1e12


@pytest.mark.slow
def test_a_step_updates_the_trained_parameters_from_finite_losses():
    step = benchmarks_train.Step(benchmarks_train.STAGES[0], SHAPE, 1)
    before = {name: jnp.array(leaf) for name, leaf in step._state()[0][0].items()}
    losses = [step() for _ in range(3)]
    after = step._state()[0][0]
    assert len(set(losses)) == 3 and all(0 < loss < 100 for loss in losses)
    assert all((after[name] != before[name]).any() for name in before)


@pytest.mark.slow
@pytest.mark.torch
def test_pytorch_trains_the_same_network():
    pytest.importorskip("diffusers")
    step = benchmarks_train.Step(benchmarks_train.STAGES[0], SHAPE, 1)
    theirs = benchmarks_train.torch_step(step, SHAPE)
    model = theirs.__closure__[[*theirs.__code__.co_freevars].index("model")].cell_contents
    assert sum(leaf.numel() for leaf in model.parameters()) == sum(
        step.parts.shapes[name].size for name in step.parts.trained
    )
    assert model.is_gradient_checkpointing and model.training
    before = model.proj_out.weight.detach().clone()
    assert 0 < theirs() < 100 and (model.proj_out.weight != before).any()
    assert all(leaf.grad is None for leaf in model.parameters())


def test_it_needs_nothing_of_data_preparation():
    blocked = ("grain", "av", "tyro", "tensorflow_datasets", "array_record", "diffusers", "torch")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import animecolor_jax.train.config, animecolor_jax.train.step, animecolor_jax.benchmarks_train
"""
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
