"""Tasks for Beam workers, which import them by name."""

import os
import signal
import time
from pathlib import Path

import psutil


def crash_on_three(task, job):
    """Writes a file for every task; the third one ends its process as a broken decoder would."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    Path(job.out, str(task)).touch()


def kill_worker_on_three(task, job):
    """The third task kills the worker beside whose process it runs, and should not outlive it."""
    if task == 3:
        psutil.Process(os.getppid()).kill()
        time.sleep(60)
    Path(job.out, str(task)).touch()


def full_on_three(task, job):
    """The third task finds the disk full."""
    if task == 3:
        raise OSError(28, "No space left on device")
    Path(job.out, str(task)).touch()


def lost(task, job):
    """Writes a file for a task whose process died."""
    Path(job.out, f"{task} lost").touch()
