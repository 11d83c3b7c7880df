"""Our code against recorded outputs of the PyTorch reference, through the real converter."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from animecolor_jax import safetensors_io
from animecolor_jax.errors import InputError
from animecolor_jax.parity.check import check_fixture

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.safetensors"))
WITH_BFLOAT16 = [
    path for path in FIXTURES if json.loads(path.with_suffix(".json").read_text()).get("bfloat16_vs_float32")
]
TOOL = Path(__file__).parents[1] / "tools" / "check_parity.py"


def name(path):
    return path.stem


# cases of which others show the like: other sizes, another scheduler, tiles (blended in test_vae.py)
REPEATED = {"vae": ("f1", "f5", "f17", "tiled"), "pipeline": ("ddim_no_cfg", "ddim_cog")}


def cases(path):
    """Parameters (fixture, None for all of its cases, or one of them)."""
    if path.stem not in REPEATED:
        return [pytest.param(path, None, id=path.stem)]
    every, slow = json.loads(path.with_suffix(".json").read_text())["config"]["cases"], [pytest.mark.slow]
    return [
        pytest.param(path, case, id=f"{path.stem}-{case}", marks=slow if case in REPEATED[path.stem] else [])
        for case in every
    ]


@pytest.mark.parametrize(("path", "case"), [each for path in FIXTURES for each in cases(path)])
def test_every_output_of_a_fixture_is_within_its_tolerance(path, case):
    result = check_fixture(path, case=case)
    assert result.passed, result.worst
    skipped = {"Euler/get_velocity", "Euler A/get_velocity"}
    assert set(result.not_compared) <= skipped


LONG = ("animecolor_rope", "dit_sincos", "pipeline", "radio", "vae")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path for path in WITH_BFLOAT16],
    ids=name,
)
def test_bfloat16_error_is_at_most_that_of_the_reference(path):
    result = check_fixture(path, dtype="bfloat16")
    assert result.passed, result.worst


def changed_copy(path, folder, change):
    """A copy of a fixture whose tensors went through `change`."""
    with safetensors_io.Reader(path) as reader:
        tensors = {key: reader.read(key) for key in reader.specs}
    change(tensors)
    copy = folder / path.name
    safetensors_io.write(copy, tensors, tensors.items())
    copy.with_suffix(".json").write_text(path.with_suffix(".json").read_text())
    return copy


def test_a_wrong_weight_and_an_unknown_output_fail(tmp_path):
    path = next(path for path in FIXTURES if path.stem == "t5_eps")

    def perturb(tensors):
        key = next(key for key in tensors if key.endswith("wo.weight"))
        tensors[key] = tensors[key] * 1.01

    def add_output(tensors):
        tensors["outputs/small/something_else"] = np.zeros(3, np.float32)

    assert not check_fixture(changed_copy(path, tmp_path, perturb)).passed
    result = check_fixture(changed_copy(path, tmp_path, add_output))
    assert not result.passed
    assert result.worst[2] == "small/something_else"


def test_unconverted_weights_are_named(tmp_path):
    path = next(path for path in FIXTURES if path.stem == "t5_eps")

    def rename(tensors):
        tensors["weights/encoder.block.0.extra.weight"] = tensors.pop(
            "weights/encoder.final_layer_norm.weight"
        )

    with pytest.raises(InputError, match="encoder.final_layer_norm.weight.*encoder.block.0.extra.weight"):
        check_fixture(changed_copy(path, tmp_path, rename))


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )


def test_tool_reports_json_and_exit_codes(tmp_path):
    path = next(path for path in FIXTURES if path.stem == "t5_eps")
    done = run_tool(path)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (
        done.returncode == 0 and report["passed"] and report["outputs"] == 4 and report["not_compared"] == []
    )

    failed = run_tool(path, "--tolerance", "1e-12")
    report = json.loads(failed.stdout.splitlines()[-1])
    assert failed.returncode == 1 and not report["passed"] and report["worst"] > 1

    refused = run_tool(tmp_path / "nothing.safetensors")
    error = json.loads(refused.stdout.splitlines()[-1])["error"]
    assert refused.returncode == 2 and "nothing.safetensors" in error["where"]
    assert set(error) == {"what", "where", "expected", "fix"}
