"""What happens to a run on all cores when something dies."""

import contextlib
import os
from pathlib import Path

import beam_tasks
import psutil
import pytest
from test_prepare import no_progress

from animecolor_jax.errors import InputError
from data_pipeline.beam_runner import check_beam_flags, run_on_beam
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.curation import CurationConfig
from data_pipeline.stages import Job


def run(function, out, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())]))
    job = Job(str(out), str(out), CurationConfig(), ClipEncoding())
    count = lambda: len(os.listdir(out))  # noqa: E731
    run_on_beam(function, beam_tasks.lost, list(range(8)), job, (), count, "trying", no_progress)


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "sdk_worker_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_crash_loses_its_own_task_only(tmp_path, monkeypatch):
    run(beam_tasks.crash_on_three, tmp_path, monkeypatch)
    assert set(os.listdir(tmp_path)) == {"0", "1", "2", "3 lost", "4", "5", "6", "7"}


@pytest.mark.parametrize(
    "function, said",
    [(beam_tasks.kill_worker_on_three, "a worker died"), (beam_tasks.full_on_three, "No space left")],
)
def test_a_dead_worker_or_a_full_disk_ends_the_run_with_an_error(function, said, tmp_path, monkeypatch):
    """Beam by itself waits for ever for a dead worker."""
    with pytest.raises(OSError, match=said):
        run(function, tmp_path, monkeypatch)
    assert "3" not in os.listdir(tmp_path)
    _, alive = psutil.wait_procs(workers(), timeout=20)
    assert not alive


def test_flags_that_nobody_knows_are_refused():
    check_beam_flags(["--runner", "FlinkRunner", "--flink_master=host:8081", "--direct_num_workers", "2"])
    check_beam_flags(["--runner=DataflowRunner", "--project=p", "--region", "r", "--temp_location", "gs://b"])
    for flags, said in ((["--vidoes", "x"], "--vidoes"), (["--direct_num_workers=many"], "many")):
        with pytest.raises(InputError, match=said):
            check_beam_flags(flags)
