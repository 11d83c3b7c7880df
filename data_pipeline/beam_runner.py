"""Runs tasks with Apache Beam, so that neither a crash nor a dead worker stops or blocks the rest.

Beam's direct runner waits for ever for a worker that died. Tasks, which decode files from anywhere, therefore
run in a process of their own beside each worker; and if a worker does die, the run ends with an error.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import psutil

from animecolor_jax.errors import InputError
from data_pipeline.storage import is_remote

IN_MEMORY = "--direct_running_mode=in_memory"  # everything in this process

_pools = threading.local()  # one a thread, because a crash breaks all that waits in a pool


def run_guarded(task, function, lost, job):
    """`function(task, job)` in another process; `lost(task, job)` if that process dies."""
    if getattr(_pools, "pool", None) is None:
        context = multiprocessing.get_context("spawn")
        _pools.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
    try:
        _pools.pool.submit(function, task, job).result()
    except BrokenProcessPool:
        _pools.pool = None
        lost(task, job)


def _end_with_parent():
    """Ends this process when the worker that started it is gone, killed or not."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def import_beam():
    """Apache Beam, imported where it is needed: that takes seconds, and warns of missing Google services."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam
        import apache_beam.options.pipeline_options
    except ImportError as error:
        raise InputError(
            "Apache Beam is not installed", where="data preparation", fix='pip install -e ".[data]"'
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def check_beam_flags(flags):
    """Raises InputError for flags that Beam does not know either; by itself it would pass over them."""
    PipelineOptions = import_beam().options.pipeline_options.PipelineOptions
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    try:
        _, unknown = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise InputError(str(error), where="arguments", expected="a value that Apache Beam takes") from error
    if unknown:
        raise InputError(
            f"unknown: {' '.join(unknown)}",
            where="arguments",
            expected="what --help lists, or a flag of Apache Beam",
            fix="see --help",
        )


def run_on_beam(function, lost, tasks, job, flags, count_done, label, progress, total=None):
    """Runs `function(task, job)` for all tasks with Apache Beam.

    Args:
        function: importable by name; its result is ignored.
        lost: function(task, job) that is called where the process of a task died.
        tasks: small picklable values: they travel inside the pipeline.
        flags: Beam's own flags, such as ("--runner=FlinkRunner", ...); () is the direct runner on all cores.
        count_done: function -> how many results are there; drives the progress bar.
        progress: tqdm or the like, called with total= and desc=.
        total: number of results; default: of tasks.

    Raises:
        OSError: a task failed for reasons other than its input, such as a full disk; or a worker died.
    """
    if not tasks:
        return
    flags = _with_defaults(flags)
    beam = import_beam()
    quiet = logging.getLogger("apache_beam")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    flags = ["--default_sdk_harness_log_level=ERROR", *flags]
    options = beam.options.pipeline_options.PipelineOptions(flags)
    if IN_MEMORY in flags:
        step = beam.Map(function, job)
    else:
        step = beam.Map(run_guarded, function, lost, job)
    interval = 15 if is_remote(job.out) else 2  # listing 100,000 files takes a while

    def run():
        with beam.Pipeline(options=options) as pipeline:
            _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | step

    try:
        with _polling(count_done, total or len(tasks), interval, label, progress):
            _run_watched(run, label)
    except RuntimeError as error:  # Beam's, around whatever happened in a worker
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{label} stopped: {reason}; what was finished is kept") from error
    finally:
        quiet.setLevel(level)


def _with_defaults(flags):
    """Beam's flags; for the direct runner with a process for each core that this one may use."""
    text = " ".join(flags)
    if "--runner" in text and "DirectRunner" not in text:
        return tuple(flags)
    defaults = {
        "--runner": "DirectRunner",
        "--direct_running_mode": "multi_processing",
        "--direct_num_workers": len(os.sched_getaffinity(0)),
    }
    return (*(f"{name}={value}" for name, value in defaults.items() if name not in text), *flags)


def _run_watched(run, label):
    """`run()` in a thread of its own, which is left alone when a worker of the direct runner dies: OSError.

    Its workers are ended on any exception, Ctrl-C included.
    """
    earlier, died, failed = threading.excepthook, [], []

    def hook(thread):
        if thread.thread.name == "run_worker":  # Beam's, one for each worker process
            died.append(thread.exc_value)
        else:
            earlier(thread)

    def work():
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name=label, daemon=True)
    threading.excepthook = hook
    try:
        thread.start()
        while thread.is_alive() and not died:
            thread.join(0.2)
        if failed:
            raise failed[0]
        if thread.is_alive():
            raise OSError(f"{label} stopped: a worker died ({died[0]}); what was finished is kept")
    except BaseException:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "sdk_worker_main" in " ".join(process.cmdline()):
                    process.kill()  # or the interpreter would wait for it when it exits
        raise
    finally:
        threading.excepthook = earlier


@contextlib.contextmanager
def _polling(count_done, total, interval, label, progress):
    """A progress bar that counts finished files: workers may be on other computers."""
    before, stop = count_done(), threading.Event()
    with progress(total=total, desc=label) as bar:

        def poll():
            while not stop.wait(interval):
                bar.n = min(total, count_done() - before)
                bar.refresh()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.n = min(total, count_done() - before)
            bar.refresh()


