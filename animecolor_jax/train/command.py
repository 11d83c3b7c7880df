"""What tools/train.py does before there is a run: the config file, its overrides, the other processes."""

import importlib.util
import os
import sys
from pathlib import Path

import jax

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.train import peers
from animecolor_jax.train.config import TrainConfig


def read_config(path, kind=TrainConfig):
    """The `CONFIG` of a Python file, of the class `kind`; InputError where there is none."""
    path = Path(path)
    fix = "see configs/stage1_sketch.py"
    if path.suffix != ".py" or not path.is_file():
        raise InputError("is no such Python file", where=path, expected="a file with CONFIG", fix=fix)
    spec = importlib.util.spec_from_file_location(f"animecolor_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"cannot be run: {error!r}", where=path, expected="a Python file", fix=fix
        ) from error
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, kind):
        raise InputError(
            f"CONFIG is {type(config).__name__}", where=path, expected=f"CONFIG, a {kind.__name__}", fix=fix
        )
    return config


def override(config, flags):
    """`config` with values replaced by flags, ["--optimizer.learning-rate", "1e-5"]; InputError for unknown
    ones."""
    return cli.parse(TrainConfig, flags, default=config)


def leave(code):
    """Ends a process of several at once after a failure: the others need not wait for it to say goodbye."""
    if code and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def distribute(coordinator="", num_processes=None, process_id=None, peer_timeout=30):
    """Joins the processes of a run.

    Args:
        coordinator: "" for one process; "auto" where JAX finds out by itself (TPU pods, SLURM, GKE, Open
            MPI); else HOST:PORT of process 0.
        peer_timeout: seconds without a sign of life after which a process counts as dead; the others then
        end.

    Raises:
        InputError: the values do not belong together, or the processes did not come together.
    """
    explicit = num_processes is not None and process_id is not None
    if not coordinator:
        if num_processes is None and process_id is None:
            return
        raise InputError("is missing", where="--coordinator", expected="HOST:PORT of process 0")
    if coordinator != "auto" and (not explicit or not 0 <= process_id < num_processes):
        raise InputError(
            f"process {process_id} of {num_processes}", where="--coordinator",
            expected="with HOST:PORT, --num-processes N and --process-id from 0 to N - 1",
        )  # fmt: skip
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator, num_processes, process_id,
            heartbeat_timeout_seconds=2 * peer_timeout, shutdown_timeout_seconds=peer_timeout,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes did not come together: {error}", where="--coordinator",
            expected="the same HOST:PORT for all processes, all of them started within five minutes",
        ) from error  # fmt: skip
    if jax.process_count() > 1:
        peers.watch(peer_timeout)
