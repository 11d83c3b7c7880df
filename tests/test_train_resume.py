"""A run of tools/train.py survives anything and ends as if it had not happened; the impossible is refused."""

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from small_datasets import WIDE
from train_runs import STEPS, TOOL, Child, flags_of, history, metrics, write_inputs

from animecolor_jax import cli, safetensors_io
from animecolor_jax.train.checkpoints import read_params
from animecolor_jax.train.run_directory import read_run
from animecolor_jax.weights import Weights

EVERY = 3  # steps between checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def start(folder):
    """Function of a run directory and more flags -> a process over it."""
    children = []

    def call(out, *more):
        children.append(Child(flags_of(folder, out, *more)))
        return children[-1]

    yield call
    for child in children:
        child.process.kill()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    report = start(run).finish()
    assert report["step"] == STEPS and report["weights"] == str(run / "weights")
    return run


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tools_train", TOOL)
    module = sys.modules["tools_train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tool, folder, tmp_path, monkeypatch, capsys):
    """Function of flags -> (exit code, JSON, stderr) of a run in this process, on its eight devices."""

    def call(*more, out=tmp_path / "run", flags=None):
        words = flags_of(folder, out, *more) if flags is None else [*map(str, flags), "--json"]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main(tool.run, tool.Arguments, hands_on_unknown=True)
        out, err = capsys.readouterr()
        return stop.value.code, json.loads(out.splitlines()[-1]), err

    return call


def assert_same_end(run, whole):
    """Every step once, with the clips, losses and gradient norms of the run that nothing interrupted, and its
    weights, bit for bit."""
    assert history(run) == history(whole)
    assert [step for step, *_ in history(run)] == list(range(1, STEPS + 1))
    name = "denoiser.safetensors"
    assert (run / "weights" / name).read_bytes() == (whole / "weights" / name).read_bytes()


# ---------------------------------------------------------------- goes on


def half_written(run):
    folder = run / "checkpoints"
    return [name for name in (os.listdir(folder) if folder.exists() else ()) if not name.isdigit()]


def test_a_killed_run_ends_as_if_nothing_had_happened(start, whole, tmp_path):
    """Three kills at random steps, the last two of them while a checkpoint is written."""
    chance, met = random.Random(4), 0
    for number in range(3):
        child = start(tmp_path)
        first = number * STEPS // 4
        child.wait_for(f"step {chance.randint(first + EVERY + 1, first + EVERY + 4)}/")
        if number == 0:
            time.sleep(chance.uniform(0, 0.1))
        deadline = time.monotonic() + 60
        while number > 0 and not half_written(tmp_path) and time.monotonic() < deadline:
            pass
        child.process.kill()
        assert child.end()[0] == -signal.SIGKILL, "it had ended already"
        met += bool(half_written(tmp_path))
    assert met, "no kill met a half-written checkpoint: the test shows too little"
    assert start(tmp_path).finish()["step"] == STEPS
    assert_same_end(tmp_path, whole)
    assert len(read_run(tmp_path)["resumed"]) == 3


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_the_run_goes_on(start, whole, tmp_path):
    child = start(tmp_path)
    child.wait_for("step 4/")
    child.process.terminate()
    code, report = child.end()
    assert code == 0 and report["weights"] is None, child.said
    assert 4 <= report["step"] < STEPS and report["checkpoint"].endswith(f"/{report['step']}")
    assert "stopping: saving a checkpoint first" in child.said
    assert [step for step, *_ in history(tmp_path)] == list(range(1, report["step"] + 1))

    child = start(tmp_path)
    child.wait_for(f"step {report['step'] + 1}/")
    child.process.send_signal(signal.SIGINT)
    code, said = child.end()
    assert code == 130 and "interrupted" in said["error"]["what"] and "Traceback" not in child.said
    step = read_params(tmp_path / "checkpoints")[0]
    assert report["step"] < step < STEPS and history(tmp_path)[-1][0] == step

    child = start(tmp_path)
    assert child.finish()["step"] == STEPS
    assert not any(line.startswith(f"step {step}/") for line in child.lines)
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(start, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "weights")
    largest = max((run / "checkpoints" / str(STEPS)).rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    child = start(run)
    assert child.finish()["step"] == STEPS
    assert f"{STEPS} is damaged" in child.said and f"using step {STEPS - EVERY} instead" in child.said
    assert any(line.startswith(f"step {STEPS - EVERY + 1}/") for line in child.lines)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_another_mesh_gives_the_same_next_losses(train, tmp_path):
    """Eight devices; from step 1 on two by two by two of them; from step 3 on one."""
    steps = "--steps", "4", "--checkpoint.every", "1", "--checkpoint.keep", "9"
    run = tmp_path / "run"
    assert train(*steps, "--compute.mesh", "fsdp=8")[0] == 0
    for mesh, step in (("data=2,fsdp=2,context=2", 1), ("data=1", 3)):
        other = tmp_path / mesh
        ignored = shutil.ignore_patterns("weights", *map(str, range(step + 1, 5)))
        shutil.copytree(run, other, ignore=ignored)
        code, report, _ = train(*steps, "--compute.mesh", mesh, out=other)
        assert code == 0 and report["step"] == 4
        assert [line[:2] for line in history(other)] == [line[:2] for line in history(run)]
        assert [record["compiled"] for record in metrics(other)][step], "it was trained, not copied"
        losses, expected = ([line[2:] for line in history(each)] for each in (other, run))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_steps(train, tmp_path):
    run = tmp_path / "run"
    assert train("--steps", "2")[1]["step"] == 2
    before = history(run)
    code, report, err = train("--steps", "2")
    assert code == 0 and report["step"] == 2 and history(run) == before and "step 1/" not in err
    code, report, _ = train("--steps", "3")
    assert code == 0 and report["step"] == 3 and history(run)[:2] == before and len(history(run)) == 3
    assert Weights(run / "weights").values["provenance"]["denoiser"]["trained"]["steps"] == 3
    assert Weights(run / "weights_2").values["provenance"]["denoiser"]["trained"]["steps"] == 2


# ---------------------------------------------------------------- on record


def test_a_run_directory_says_what_made_it(whole, folder):
    run = read_run(whole)
    assert run["config"]["steps"] == STEPS and run["config"]["optimizer"]["learning_rate"] == 1e-3
    assert run["config"]["checkpoint"]["every"] == EVERY
    assert run["versions"]["jax"] == jax.__version__ and run["devices"]["count"] == 2
    assert {"revision", "dirty"} == set(run["git"] or {"revision", "dirty"})
    assert run["command"][1:] == flags_of(folder, whole)
    assert run["inputs"].keys() == {"init.base", "data", "precomputed"}
    assert sorted(map(int, os.listdir(whole / "checkpoints"))) == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]


def test_the_log_has_every_clip_equally_often(whole):
    used = [clip for _, clips, *_ in history(whole) for clip in clips]
    counts = [used.count(clip) for clip in range(11)]
    assert sum(counts) == len(used) == 8 * STEPS and max(counts) - min(counts) <= 1


def test_weights_are_those_of_the_checkpoint_and_export_writes_them_too(start, whole):
    report = start(whole, "--export").finish()
    assert (report["step"], report["weights"]) == (STEPS, str(whole / f"weights_{STEPS}"))
    assert report["checkpoint"] == str(whole / "checkpoints" / str(STEPS)) and report["loss"] is None
    step, trained, _, _ = read_params(whole / "checkpoints")
    assert step == STEPS
    for name in ("weights", f"weights_{STEPS}"):
        weights = Weights(whole / name)
        written = weights.read("denoiser", lambda _: "float32")
        assert {f"denoiser/{leaf}" for leaf in written} >= set(trained)
        for leaf, value in trained.items():
            np.testing.assert_array_equal(written[leaf.removeprefix("denoiser/")], value)
        weights.require("vae", "scheduler")


# ---------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite_stops_the_run(train, folder, tmp_path):
    bad = shutil.copytree(folder / "weights", tmp_path / "bad")
    path = bad / "denoiser.safetensors"
    with safetensors_io.Reader(path) as reader:
        specs, leaves = dict(reader.specs), {name: np.array(reader.read(name)) for name in reader.specs}
    next(iter(leaves.values())).flat[0] = np.nan
    safetensors_io.write(path, specs, leaves.items(), {"format": "animecolor-jax"})
    flags = flags_of(folder, tmp_path / "run")[:-1]
    flags[flags.index("--init") + 1] = bad
    code, report, err = train(flags=flags)
    message = report["error"]["what"]
    assert code == 1 and "loss nan" in message and "in step 1 (" in message, err
    clips = message.partition("clips ")[2].partition(")")[0].split(", ")
    assert len(clips) == 8 and all(clip.startswith(f"{WIDE}-train-") for clip in clips)
    assert "last good checkpoint: none yet" in message
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


@pytest.mark.slow
def test_no_checkpoint_holds_what_is_not_finite(train, tmp_path):
    """The first update is none, by the warm-up; the second makes all parameters infinite."""
    flags = "--optimizer.learning-rate", "3e38", "--optimizer.warmup-steps", "1"
    flags += "--optimizer.weight-decay", "100", "--checkpoint.every", "1"
    code, report, err = train(*flags)
    assert code == 1, err
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/1." in report["error"]["what"]
    step, trained, frozen, _ = read_params(tmp_path / "run" / "checkpoints")
    assert step == 1 and all(np.isfinite(leaf).all() for leaf in (*trained.values(), *frozen.values()))


# ---------------------------------------------------------------- refused before anything is compiled


@pytest.fixture
def refused(train, monkeypatch):
    """Function of flags -> the error object of a run that is refused at once."""

    def compile_(*args, **kwargs):
        raise AssertionError("a step was made")

    def call(*more, **options):
        monkeypatch.setattr("animecolor_jax.train.loop.make_train_step", compile_)
        code, report, err = train(*more, **options)
        assert code == 2 and err.startswith("error: ") and "Traceback" not in err
        assert report.keys() == {"error"} and report["error"].keys() == {"what", "where", "expected", "fix"}
        return report["error"]

    return call


@pytest.mark.parametrize(
    ("flags", "what", "remedy"),
    [
        (["--data.batch-size", "6", "--compute.mesh", "fsdp=4"], "6 rows on data=1 x fsdp=4", "of 4"),
        (["--optimizer.accumulate", "2", "--compute.mesh", "fsdp=8"], "4 rows", "multiple of 8"),
        (["--compute.mesh", "fsdp=16"], "needs 16 devices, there are 8", "use fewer"),
        (["--compute.mesh", "fdsp=2"], "fdsp=2", "for example"),
        (["--compute.memory-gib", "0.0001"], "takes an estimated", "--optimizer.accumulate 8"),
        (["--optimizer.learnin-rate", "1"], "--optimizer.learnin-rate", "--help"),
        (["--optimizer.learning-rate", "fast"], "fast", "--help"),
        (["--coordinator", "localhost:1234"], "process None of None", "--num-processes"),
        (["--num-processes", "2", "--process-id", "0"], "is missing", "HOST:PORT"),
        (["--stage.conditions", "text", "sketch", "hce"], "lacks hce", "convert"),
        (["--precomputed", "latents", "text", "sound"], "sound", "--help"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(refused, flags, what, remedy):
    error = refused(*flags, "--compute.mesh", "data=1") if "memory" in flags[0] else refused(*flags)
    assert what in error["what"] + error["where"]
    assert remedy in error["expected"] + error["fix"]


@pytest.mark.parametrize(
    ("flag", "path", "expected"),
    [
        ("--config", "gone.py", "CONFIG"),
        ("--data", "gone", "prepare_data"),
        ("--init", "gone", "convert_torch"),
        ("--init", "data", "convert_torch"),
    ],
)
def test_missing_inputs_are_named(refused, folder, tmp_path, flag, path, expected):
    flags = flags_of(folder, tmp_path / "run")[:-1]
    flags[flags.index(flag) + 1] = folder / path
    error = refused(flags=flags)
    assert path in error["where"] + error["what"]
    assert expected in error["expected"] + error["fix"]
    assert not (tmp_path / "run").exists()


def test_data_precomputed_by_other_weights_are_refused(refused, folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    path = next(data.rglob("encoded.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": {"vae": "another"}}))
    flags = flags_of(folder, tmp_path / "run")[:-1]
    flags[flags.index("--data") + 1] = data
    error = refused(flags=flags)
    assert "made with another vae" in error["what"] and "--precompute" in error["fix"]


def test_a_run_is_not_resumed_as_another(refused, train, folder, tmp_path):
    assert train("--steps", "1")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    error = refused("--optimizer.learning-rate", "2e-3")
    assert "optimizer.learning-rate: was 0.001, now 0.002" in error["what"] and "--out" in error["fix"]

    shutil.copytree(folder / "data", tmp_path / "other")
    for closing in ("dataset.json", "encoded.json"):  # the digest of the clips, in both
        path = next((tmp_path / "other").rglob(closing))
        path.write_text(path.read_text().replace('"clips"', '"others"').replace('"others":', '"clips":'))
    shutil.copytree(folder / "weights", tmp_path / "weights")
    values = json.loads((tmp_path / "weights" / "config.json").read_text())
    values["provenance"]["denoiser"] = {"trained": "elsewhere"}
    (tmp_path / "weights" / "config.json").write_text(json.dumps(values))
    for flag, path, name in (("--data", "other", "inputs.data"), ("--init", "weights", "inputs.init.base")):
        flags = flags_of(folder, tmp_path / "run", "--steps", "1")[:-1]
        flags[flags.index(flag) + 1] = tmp_path / path
        error = refused(flags=flags)
        assert name in error["what"] and "--out" in error["fix"]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_another_folder_is_not_taken_over(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    error = refused()
    assert "notes.txt" in error["what"] and "--out" in error["fix"]
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_export_without_a_checkpoint_is_refused(refused, tmp_path):
    assert "no checkpoint" in refused("--export")["what"]
