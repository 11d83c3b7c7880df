"""The measurement for a GPU, tried on a CPU: what a slice does, what the table says, that every row runs."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from animecolor_jax import doctor, flops, networks
from animecolor_jax.config import COMPONENTS
from animecolor_jax.errors import InputError
from animecolor_jax.measuring import row, slices, table
from animecolor_jax.measuring.rows import rows
from animecolor_jax.measuring.sizes import SIZES

ROOT = Path(__file__).parent.parent
TINY, FULL = SIZES["tiny"], SIZES["2b"]


class Clock:
    """Time that passes only in rows."""

    def __init__(self, **took):
        self.now, self.took, self.begun = 0.0, took, []

    def __call__(self):
        return self.now

    def start(self, name, left):
        """A row that takes as long as it was said to, or what is left."""
        self.begun.append(name)
        self.now += min(self.took[name], left)
        return {"state": "done"} if self.took[name] <= left else {"state": "stopped", "reason": "too long"}


def run_slice(folder, expected, seconds, clock):
    clock.begun = []
    slices.run(slices.Results(folder, "tiny"), expected, seconds, clock.start, clock)
    return clock.begun


def test_slices_go_on_with_what_is_left_and_begin_what_fits(tmp_path):
    expected, clock = {"a": 100, "b": 300, "c": 50}, Clock(a=100, b=250, c=50)
    assert run_slice(tmp_path, expected, 200, clock) == ["a", "c"]
    assert run_slice(tmp_path, expected, 200, clock) == ["b"]  # does not fit, but is the first
    held = slices.Results(tmp_path, "tiny")
    assert {name: result["state"] for name, result in held.rows.items()} == {
        "a": "done", "c": "done", "b": "stopped",
    }  # fmt: skip
    assert run_slice(tmp_path, {**expected, "d": 10}, 400, Clock(b=250, d=10)) == ["d", "b"]
    assert slices.Results(tmp_path, "tiny").left(expected) == []


def test_no_time_begins_nothing(tmp_path):
    assert run_slice(tmp_path, {"a": 1}, 0, Clock(a=1)) == []


def test_results_of_another_size_or_damaged_ones_are_refused(tmp_path):
    slices.Results(tmp_path, "tiny").put("a", {"state": "done"})
    with pytest.raises(InputError, match="size 2b"):
        slices.Results(tmp_path, "2b")
    (tmp_path / slices.RESULTS).write_text("[1]")
    with pytest.raises(InputError, match="cannot be read"):
        slices.Results(tmp_path, "tiny")


def test_a_row_is_ended_when_the_time_is_over(tmp_path):
    found = slices.in_a_process(tmp_path, "text", "tiny", 0.1)
    assert found["state"] == "stopped" and not (tmp_path / slices.LOGS / "text.json").exists()


def test_a_row_that_fails_says_how(tmp_path):
    found = slices.in_a_process(tmp_path, "nothing", "tiny", 100)
    assert found["state"] == "failed" and "KeyError: 'nothing'" in found["reason"]


# ---------------------------------------------------------------- table

RATES = dict.fromkeys(("matmul_tflops", "attention_backward_tflops", "convolution_tflops"), 500.0)
RATES |= {"attention_tflops": 250.0, "memory_gb": 4000.0}
WHERE = {"device": "NVIDIA H200", "date": "2026-01-02 03:04", "jax": "1", "torch": "2", "diffusers": None}


def done(*lines, device="NVIDIA H200"):
    facts = {"unit": "s", "theirs": None, "ratio": None}
    where = WHERE | {"device": device}
    lines = [facts | line for line in lines]
    return {
        "state": "done", "lines": lines, "peak_gib": 3.0, "compiled": 2, "from_cache": 1, "where": where,
    }  # fmt: skip


def roofline():
    return done(*({"name": rate, "shape": "x", "rate": rate, "ours": value} for rate, value in RATES.items()))


def step(seconds):
    work = {"attention": 100.0, "products": 100.0}
    return {"name": "denoising step", "shape": "2b", "ours": seconds, "tflop": work, "read_gb": 4.0}


@pytest.mark.parametrize(("seconds", "met"), [(0.65, True), (0.7, False)])
def test_a_part_is_held_against_the_rates_measured_there(seconds, met):
    found = table.lines({"roofline": roofline(), "step": done(step(seconds))}, FULL)[-1]
    assert found["bound"] == pytest.approx(100 / 250 + 100 / 500)
    assert found["share"] == pytest.approx(0.6 / seconds) and found["met"] is met


def test_weights_have_to_be_read():
    line = step(2.0) | {"tflop": {"products": 1.0}, "read_gb": 6000.0}
    assert table.lines({"roofline": roofline(), "step": done(line)}, FULL)[-1]["bound"] == 1.5


def test_nothing_is_held_against_rates_of_another_device():
    held = {"roofline": roofline(), "step": done(step(0.65), device="NVIDIA A100-SXM4-40GB")}
    found = table.lines(held, FULL)[-1]
    assert found["share"] is None and found["met"] is None and found["target"] == "90 % of the bound"


def test_a_training_step_meets_either_target():
    line = {"name": "train step, stage1_sketch", "shape": "2B, 49x480x720, batch 1", "train": "2b-480x720x49"}
    line |= {"stage": "stage1_sketch", "mfu": 0.39, "ours": 1.0}
    stage, shape = (
        next(stage for stage in doctor.STAGES if stage.name == "stage1_sketch"),
        FULL.train["2b-480x720x49"],
    )
    assert table.lines({"train": done(line)}, FULL)[-1]["met"] is True
    found = table.lines({"roofline": roofline(), "train": done(line | {"mfu": 0.3})}, FULL)[-1]
    assert found["met"] is False
    assert found["bound"] == pytest.approx(flops.train_step(stage, shape.model, shape.latents, 1) / 500e12)
    near = line | {"mfu": 0.3, "ours": found["bound"] / 0.95}
    assert table.lines({"roofline": roofline(), "train": done(near)}, FULL)[-1]["met"] is True


def test_a_clip_is_also_the_sum_of_its_parts():
    each = [step(0.5) | {"name": name} for name in table.PARTS]
    found = table.lines({"roofline": roofline(), "parts": done(*each)}, FULL)[-1]
    assert found["name"] == "clip, sum of its parts" and found["ours"] == pytest.approx((50 + 5) * 0.5)
    assert found["share"] == pytest.approx(0.6 / 0.5)


def test_a_clip_is_no_sum_of_parts_from_several_devices():
    first, *others = [step(0.5) | {"name": name} for name in table.PARTS]
    held = {"first": done(first, device="NVIDIA H100 PCIe"), "others": done(*others)}
    assert len(table.lines(held, FULL)) == len(table.PARTS)


def test_the_target_of_a_clip_is_not_that_of_its_stages():
    names = ("clip, blocks in 17 of 50 steps", "clip, blocks in 17 of 50 steps: decode", "clip, exact")
    held = {"clip": done(*({"name": name, "shape": "2b", "ours": 20.0} for name in names))}
    assert [line["met"] for line in table.lines(held, FULL)] == [None, None, True]  # no dB of the first


def test_rows_not_run_say_why():
    held = {
        "roofline": roofline(),
        "cogvideox-eager": {"state": "lacking", "reason": "a | b"},
    }
    known = rows(FULL)
    reasons = table.not_run(held, known)
    assert len(reasons) == len(known) - 1 and set(reasons.values()) == {
        "no slice has come to it yet",
        "a | b",
    }
    text = table.markdown(table.lines(held, FULL), reasons).splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text if line.startswith("| ")]
    assert len(cells) == 1 + len(RATES) + len(reasons) and len(set(cells)) == 1
    assert any("2026-01-02 03:04 UTC, jax 1, torch 2, diffusers none" in line for line in text)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", COMPONENTS)
def test_random_networks_have_the_leaves_of_the_full_size(name):
    shapes = networks.abstract(name, getattr(FULL.model, name))
    key = jax.random.key(0)
    for leaf, shape in shapes.items():
        made = jax.eval_shape(
            lambda leaf=leaf, shape=shape: networks.random_leaf(leaf, shape, key, "bfloat16")
        )
        assert made.shape == shape.shape
        assert made.dtype == ("bfloat16" if jnp.issubdtype(shape.dtype, jnp.floating) else shape.dtype)


def command(*arguments):
    words = [
        sys.executable,
        "-m",
        "animecolor_jax.measuring",
        "--size",
        "tiny",
        "--json",
        *map(str, arguments),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_unknown_rows_are_refused(tmp_path):
    code, report, _ = command("--out", tmp_path / "out", "--rows", "clip", "nothing")
    assert code == 2 and report["error"]["where"] == "--rows" and "nothing" in report["error"]["what"]
    assert not (tmp_path / "out").exists()


def test_a_row_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    pytest.importorskip("torch")
    found = row.measure("cogvideox-eager", "tiny")
    assert (
        found["state"] == "lacking" and "pip download diffusers" in found["reason"] and found["lines"] == []
    )


def test_it_starts_on_a_bare_machine_and_leaves_the_device_alone():
    blocked = ("grain", "av", "tyro", "tensorflow_datasets", "array_record", "diffusers", "torch")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import animecolor_jax.measuring.__main__, animecolor_jax.measuring.row
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_one_row_end_to_end(tmp_path):
    code, report, _ = command("--out", tmp_path, "--rows", "text")
    assert code == 0 and "text" not in report["left"]
    line = report["lines"][0]
    assert line["name"] == "text encoder" and line["ours"] > 0 and line["where"]["device"] == "cpu"
    assert line["tflop"] == {"products": 2 * flops.t5(TINY.model.text_encoder, 192) / 1e12}
    assert "text encoder" in (tmp_path / "table.md").read_text()
    assert slices.Results(tmp_path, "tiny").left(["text"]) == []


@pytest.mark.slow
@pytest.mark.torch
def test_every_row_runs_and_the_table_is_whole(tmp_path):
    pytest.importorskip("diffusers")
    code, report, said = command("--out", tmp_path, "--minutes", 60)
    assert code == 0, said
    assert report["left"] == [] and report["not_run"] == {}
    names = [line["name"] for line in report["lines"]]
    assert set(table.PARTS) <= set(names) and names[-1] == "clip, sum of its parts"
    assert sum(name.startswith("train step") for name in names) == 4
    for line in report["lines"]:
        assert math.isfinite(line["ours"]) and line["met"] is None
        assert (line["share"] is None) or line["share"] > 0
        assert line["ours"] > 0 or "more in the first call" in line["name"]
    assert all(
        line["share"] for line in report["lines"] if "tflop" in line and "attention " not in line["name"]
    )
    compared = [line for line in report["lines"] if "against" in line["name"]]
    assert len(compared) == 3 and all(line["ratio"] > 0 for line in compared)
