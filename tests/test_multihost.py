"""Two real processes of four virtual devices make one run: the same as one process of eight, on record once.

What is sent between them goes through Gloo, the CPU's collectives.
"""

import os
import shutil
import signal
import socket

import numpy as np
import pytest
from train_runs import Child, flags_of, history, metrics, write_inputs

from animecolor_jax.train.checkpoints import read_params

FLAGS = (
    "--steps", "6", "--checkpoint.every", "2", "--compute.mesh", "data=4,fsdp=2",
    "--validation.every", "6", "--validation.clips", "2", "--validation.timesteps", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """Function of a run directory, the number of processes and more flags -> those processes."""
    # hosts share no folder of compiled programs
    caches = [{"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))} for _ in range(2)]
    children = []

    def call(out, processes, *more):
        if processes == 1:
            made = [Child(flags_of(folder, out, *FLAGS, *more), devices=8)]
        else:
            with socket.socket() as server:
                server.bind(("localhost", 0))
                address = f"localhost:{server.getsockname()[1]}"
            shared = "--coordinator", address, "--num-processes", processes, "--peer-timeout", "10"
            flags = flags_of(folder, out, *FLAGS, *shared, *more)
            made = [
                Child([*flags, "--process-id", str(number)], devices=4, **caches[number])
                for number in range(processes)
            ]
        children.extend(made)
        return made

    yield call
    for child in children:
        child.process.kill()


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    start(run, 1)[0].finish()
    return run


@pytest.fixture(scope="module")
def together(start, tmp_path_factory):
    """(the run of two processes, what they said on stderr)."""
    run = tmp_path_factory.mktemp("together") / "run"
    children = start(run, 2)
    reports = [child.finish() for child in children]
    assert reports[0]["step"] == reports[1]["step"] == 6
    return run, [child.said for child in children]


def assert_close(run, expected):
    """Both runs have the same clips, nearly the same losses, and nearly the same parameters at the end."""
    assert [line[:2] for line in history(run)] == [line[:2] for line in history(expected)]
    losses, wanted = ([line[2:] for line in history(each)] for each in (run, expected))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    (step, trained, *_), (same, others, *_) = (read_params(each / "checkpoints") for each in (run, expected))
    assert step == same and trained.keys() == others.keys()
    for name, leaf in trained.items():
        np.testing.assert_allclose(leaf, others[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(together, alone):
    run, (first, second) = together
    assert_close(run, alone)
    assert "step 6/6" in first and "step " not in second, "only the first process shows and writes"
    assert sorted(os.listdir(run)) == sorted(os.listdir(alone))
    for ours, wanted in zip(metrics(run, "validation"), metrics(alone, "validation"), strict=True):
        np.testing.assert_allclose(ours["losses"], wanted["losses"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_one_is_restored_by_two_and_the_other_way_round(
    start, together, alone, tmp_path, processes
):
    source = alone if processes == 2 else together[0]
    ignored = shutil.ignore_patterns("weights", "4", "6")
    run = shutil.copytree(source, tmp_path / "run", ignore=ignored)
    children = start(run, processes)
    for child in children:
        child.finish()
    assert "step 3/6" in children[0].said and "step 2/6" not in children[0].said
    assert_close(run, alone)


@pytest.mark.slow
def test_sigterm_to_one_makes_both_save_the_same_step(start, tmp_path):
    children = start(tmp_path, 2, "--steps", "100000", "--checkpoint.every", "100000")
    children[0].wait_for("step 3/")
    children[1].process.send_signal(signal.SIGTERM)
    reports = [child.finish() for child in children]
    assert reports[0]["step"] == reports[1]["step"] >= 3 and reports[0]["weights"] is None
    assert os.listdir(tmp_path / "checkpoints") == [str(reports[0]["step"])]
    assert history(tmp_path)[-1][0] == reports[0]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_stops_the_other_and_names_it(start, tmp_path, killed):
    children = start(tmp_path, 2, "--steps", "100000", "--checkpoint.every", "2")
    children[0].wait_for("step 5/")
    children[killed].process.kill()
    code, _ = children[1 - killed].end(timeout=60)
    said = children[1 - killed].said
    assert code not in (0, None), said
    if killed:
        assert "process 1 of 2 died" in said and f"last checkpoint: {tmp_path}/checkpoints/" in said, said
    else:  # JAX's client ends the process as soon as it misses its coordinator, which may come first
        assert "process 0 of 2 died" in said or "leader task was preempted/died" in said, said
