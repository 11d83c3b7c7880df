"""Runs tasks with Apache Beam, so that neither a crash nor a dead worker stops or blocks the rest.

Beam's direct runner waits for ever for a worker that died. Tasks, which decode files from anywhere, therefore
run in a process of their own beside each worker; and if a worker does die, the run ends with an error.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import psutil

from animecolor_jax.errors import InputError
from data_pipeline.storage import is_remote

LOCAL_RUNNER = ("--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=0")
IN_MEMORY = "--direct_running_mode=in_memory"  # everything in this process

_pool = None


def run_guarded(task, function, lost, job):
    """`function(task, job)` in another process; `lost(task, job)` if that process dies."""
    global _pool
    if _pool is None:
        context = multiprocessing.get_context("spawn")
        _pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
    try:
        _pool.submit(function, task, job).result()
    except BrokenProcessPool:
        _pool = None
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
    if not any(flag.startswith("--runner") for flag in flags):
        flags = (*LOCAL_RUNNER, *flags)
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
    try:
        with (
            _watching_workers(label),
            _polling(count_done, total or len(tasks), interval, label, progress),
            beam.Pipeline(options=options) as pipeline,
        ):
            _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | step
    except RuntimeError as error:  # Beam's, around whatever happened in a worker
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{label} stopped: {reason}; what was finished is kept") from error
    finally:
        quiet.setLevel(level)


@contextlib.contextmanager
def _watching_workers(label):
    """Turns the death of a direct runner's worker into an OSError; ends the workers on any exception."""
    earlier, caller, died = threading.excepthook, threading.get_ident(), []

    def hook(thread):
        code = str(thread.exc_value).rpartition(" ")[2]
        if thread.thread.name != "run_worker":
            earlier(thread)
        elif code not in ("-2", "130"):  # not Ctrl-C, which reaches the caller anyway
            died.append(thread.exc_value)
            signal.pthread_kill(caller, signal.SIGINT)

    threading.excepthook = hook
    try:
        yield
    except BaseException as error:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "sdk_worker_main" in " ".join(process.cmdline()):
                    process.kill()  # or the interpreter would wait for it when it exits
        if died and isinstance(error, KeyboardInterrupt):
            raise OSError(f"{label} stopped: a worker died ({died[0]}); what was finished is kept") from error
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


