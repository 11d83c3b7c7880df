"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder named after its step, written with Orbax, on a local or `gs://` path:

    500/state/        trainable, opt_state, ema, frozen, key, ...: a zarr array per leaf, in OCDBT files
    500/data_state/   JSON: the data iterator
    500/run_config/   JSON: the resolved config
    500/contents/     JSON: name, shape, dtype and checksum of every array, checksums of the other JSON parts

Orbax's v1 functions write and read single checkpoints, and this module keeps their sequence. After a failed
save, Orbax's own keepers of sequences (`training.Checkpointer` over `CheckpointManager`) refuse the next one
too, forget checkpoints that are still there and leave the half-written one. Nor does Orbax notice changed
bytes inside array data, hence the checksums: they are taken on the devices, do not depend on the mesh and
cost one pass over the state.

Every process of a multi-host run makes the same calls in the same order, with one shared directory.
"""

import json
import os
import sys
import threading
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.experimental import multihost_utils

from animecolor_jax.errors import InputError

JSON_PARTS = ("data_state", "run_config", "contents")
COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint where a folder cannot be renamed
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError, NotADirectoryError)
NO_DAMAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
TIMEOUT = 2 * 60 * 60  # seconds that writing a checkpoint may take
SHOWN = 10  # names that an error lists of each kind


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any
    data_state: dict
    run_config: dict


class Damaged(Exception):
    """A checkpoint that cannot be used; the message says why."""


class Checkpoints:
    """The checkpoints of one run.

    Checkpoints that a killed run left half-written are deleted here; they never count.

    Args:
        directory: where the checkpoints are, local or `gs://`; made if missing, the same for all processes.
        config: `train.config.CheckpointConfig`, of which `keep` and `keep_every` are used.
    """

    def __init__(self, directory, config):
        self.directory, self.config = _path(directory), config
        self._pending = None  # (step, Orbax's response) of the save that is under way
        self._deleting = threading.Lock()
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._delete_unfinished()
        multihost_utils.sync_global_devices("checkpoints folder made")

    def save(self, step, state, data_state, run_config, wait=False):
        """Writes a checkpoint in the background.

        Returns when the arrays have been copied to the host: from then on their buffers may be donated. If
        the save before is not done yet, waits for it first. A step that has a checkpoint already keeps it.

        Args:
            step: updates made so far.
            state: pytree of jax arrays; on several hosts each is sharded or replicated over all of them.
            data_state: JSON dict; of several processes, the first one's is stored.
            run_config: JSON dict, likewise.
            wait: return only when the checkpoint is complete on disk.

        Raises:
            OSError: this save or the one before could not be written.
        """
        self.wait()
        if not _of_first_process(step in self.steps()):
            state = jax.tree.map(_without_keys, state)
            parts = {"data_state": _copy(data_state), "run_config": _copy(run_config)}
            parts["contents"] = _contents(state, parts)
            try:
                with _context():
                    response = ocp.save_checkpointables_async(
                        self.directory / str(step), {"state": state, **parts}
                    )
            except OSError as error:
                raise self._not_written(step, error) from error
            self._pending = step, response
            response.on_complete(lambda _: self._delete_old())
        if wait:
            self.wait()

    def wait(self):
        """Returns when the save under way, if any, is complete on disk.

        Raises:
            OSError: it could not be written; the checkpoints before it are as they were.
        """
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result()
        except jax.errors.JaxRuntimeError:  # another process or a device failed, not the disk
            self._pending = None
            raise
        except Exception as error:
            self._pending = None
            raise self._not_written(step, error) from error
        self._pending = None
        self._delete_old()

    def close(self):
        """Waits like `wait`; nothing else is held."""
        self.wait()

    def steps(self):
        """Steps that have a complete checkpoint, in ascending order."""
        return _steps(self.directory)

    def latest_step(self):
        """The newest step that has a complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract_state):
        """The newest checkpoint that can be read, on any mesh and any number of hosts.

        A damaged checkpoint is reported on stderr and the one before is taken. It is then renamed
        STEP.damaged, so that the run can save that step again.

        Args:
            abstract_state: `jax.ShapeDtypeStruct` with shardings, of the structure that was saved.

        Returns:
            `Restored`, or None if there is no checkpoint.

        Raises:
            InputError: every checkpoint is damaged, or the newest readable one holds another state.
        """
        self.wait()
        damaged, before = {}, float("inf")
        while True:
            step = max((step for step in self.steps() if step < before), default=-1)
            step = before = _of_first_process(step)
            if step < 0:
                break
            try:
                restored = self._restore_step(step, abstract_state)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise InputError(
                f"every checkpoint is damaged: {reasons}",
                where=self.directory,
                expected="at least one checkpoint that can be read",
                fix="put back a copy of the folder, or move it away to start the run from the beginning",
            )
        return None

    def _restore_step(self, step, abstract_state):
        """`Restored` of one step; all processes raise Damaged, or none."""
        path = self.directory / str(step)
        raw = jax.tree.map(_abstract_without_keys, abstract_state)
        for leaf in jax.tree.leaves(raw):
            leaf.sharding.shard_shape(leaf.shape)  # raises ValueError, which would otherwise look like damage
        why, contents, parts, state = "", None, None, None
        try:
            parts, contents = _read_json(path)
            _check_state(raw, contents["state"], path)
            state = _read_state(path, raw)
        except Damaged as error:
            why = str(error)
        _agree(why)
        _check_arrays(state, contents["state"])
        state = jax.tree.map(_with_key, abstract_state, state)
        return Restored(step, state, parts["data_state"], parts["run_config"])

    def _set_aside(self, damaged, used):
        """Reports damaged checkpoints and renames them STEP.damaged."""
        for step, why in damaged.items() if jax.process_index() == 0 else ():
            path = self.directory / str(step)
            aside = self.directory / f"{step}.damaged"
            print(
                f"checkpoint {path} is damaged ({why}): renamed {aside.name}, using step {used} instead",
                file=sys.stderr,
                flush=True,
            )
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")

    def _delete_old(self):
        """Deletes all but the newest `keep` and the multiples of `keep_every`."""
        if jax.process_index() == 0:
            with self._deleting:
                every = self.config.keep_every
                for step in self.steps()[: -self.config.keep]:
                    if not (every and step % every == 0):
                        (self.directory / str(step)).rmtree()

    def _delete_unfinished(self):
        complete = {str(step) for step in self.steps()}
        for path in self.directory.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and path.name not in complete):
                path.rmtree()

    def _not_written(self, step, error):
        """The OSError of a save that failed; gives the space it took back."""
        if jax.process_index() == 0:
            self._delete_unfinished()
        return OSError(
            f"{self.directory / str(step)}: the checkpoint of step {step} could not be written: "
            f"{_reason(error)}\n  fix: free space or lower checkpoint.keep, and run the same command again: "
            f"it goes on from step {self.latest_step() or 0}"
        )


def read_params(directory, step=None):
    """Parameters of a checkpoint on one host, without the run's mesh and without reading its optimiser state.

    Args:
        directory: the run's checkpoints.
        step: which; the newest if None.

    Returns:
        (step, {name: array} of what was trained, or of its moving average where the run keeps one,
        {name: array} of what was frozen, run_config); arrays are NumPy's, with the stored dtypes.

    Raises:
        InputError: no such checkpoint, or it is damaged.
    """
    directory = _path(directory)
    steps = _steps(directory) if directory.exists() else []
    wanted = max(steps, default=None) if step is None else step
    if wanted not in steps:
        raise InputError(
            "no checkpoint" if step is None else f"no checkpoint of step {step}",
            where=directory,
            expected=f"one of the steps {steps}" if steps else "the checkpoints folder of a training run",
        )
    path = directory / str(wanted)
    try:
        parts, contents = _read_json(path)
        trained = "ema" if any(name.startswith("ema/") for name in contents["state"]) else "trainable"
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = {trained: {}, "frozen": {}}
        for full_name, spec in contents["state"].items():
            part, _, name = full_name.partition("/")
            if part in abstract:
                abstract[part][name] = jax.ShapeDtypeStruct(spec["shape"], spec["dtype"], sharding=sharding)
        state = _read_state(path, abstract, partial=True)
        _check_arrays(state, contents["state"])
    except Damaged as error:
        raise InputError(
            f"the checkpoint is damaged: {error}",
            where=path,
            expected="a complete checkpoint",
            fix=f"use another of the steps {steps}",
        ) from error
    state = jax.tree.map(np.asarray, state)
    return wanted, state[trained], state["frozen"], parts["run_config"]


@jax.jit
def checksum(array):
    """Checksum of an array's bits and their places, the same for every sharding.

    Sum modulo 2**32, over all words, of a one-to-one mixture of the word and its place: one changed word
    always shows, several but for one chance in 2**32. The mixture is MurmurHash3's finaliser (A. Appleby).

    Args:
        array: of any real dtype and shape.

    Returns:
        [] uint32.
    """
    if array.dtype == bool:
        words = array
    else:
        words = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}")
    place = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words.astype(jnp.uint32) + place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _checksums(state):
    """{name: checksum} of a pytree. One after the other: several CPU devices that have more than 32 programs
    to do can wait for each other for ever."""
    return {name: int(checksum(array)) for name, array in _named(state).items()}


def _path(directory):
    directory = os.fspath(directory)
    return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def _steps(directory):
    paths = [path for path in directory.iterdir() if path.name.isdigit()]
    if "://" in str(directory):
        paths = [path for path in paths if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in paths)


def _context(alone=False, partial=False):
    """Orbax's settings.

    Args:
        alone: no process waits for another, so that one of them can fail by itself.
        partial: not all of what is stored is asked for.
    """
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in JSON_PARTS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    context.asynchronous.timeout_secs = TIMEOUT
    # Floats hardly shrink, and the processor has batches to make.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    if alone:
        process = jax.process_index()
        context.multiprocessing.primary_host = process
        context.multiprocessing.active_processes = {process}
        context.multiprocessing.barrier_sync_key_prefix = f"process_{process}"
    return context


def _copy(value):
    """A JSON value as it will be read back, which later changes by the caller do not reach."""
    return json.loads(json.dumps(value, allow_nan=False))


def _crc(value):
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _named(tree):
    """{name: leaf} of any pytree; names join the path's keys with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract_without_keys(leaf):
    if not _is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _with_key(abstract, leaf):
    if not _is_key(abstract):
        return leaf
    kind = []
    jax.eval_shape(
        lambda key: kind.append(jax.random.key_impl(key)), abstract
    )  # it takes no ShapeDtypeStruct
    return jax.random.wrap_key_data(leaf, impl=kind[0])


def _contents(state, parts):
    """The JSON part `contents`."""
    arrays = _named(state)
    sums = _checksums(state)
    contents = {
        "state": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums[name]}
            for name, array in arrays.items()
        },
        "parts": {name: _crc(value) for name, value in parts.items()},
    }
    return {**contents, "checksum": _crc(contents)}


def _read_json(path):
    """(parts but contents, contents) of the checkpoint at `path`; raises Damaged."""
    read = {}
    for name in JSON_PARTS:
        file = path / name / "data.json"
        try:
            read[name] = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise Damaged(f"{name}/data.json: {_reason(error)}") from error
    contents = read.pop("contents")
    if not isinstance(contents, dict) or contents.pop("checksum", None) != _crc(contents):
        raise Damaged("contents/data.json: its checksum does not fit")
    for name, value in read.items():
        if contents["parts"][name] != _crc(value):
            raise Damaged(f"{name}/data.json: its checksum does not fit")
    return read, contents


def _check_state(abstract, stored, path):
    """Raises InputError unless names, shapes and dtypes are those stored."""
    wanted = _named(abstract)
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "different": [
            f"{name} is {stored[name]['dtype']}{stored[name]['shape']}, "
            f"expected {leaf.dtype}{list(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in stored
            and (stored[name]["dtype"], stored[name]["shape"]) != (str(leaf.dtype), list(leaf.shape))
        ],
    }
    if any(problems.values()):
        raise InputError(
            "the checkpoint holds another state: "
            + ", ".join(f"{kind} {_some(names)}" for kind, names in problems.items() if names),
            where=path,
            expected="the arrays of the stage, model and optimiser that the config describes",
            fix="continue with the config that the run began with (its run.json), or start in a new folder",
        )


def _some(names):
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"[{', '.join(names[:SHOWN])}]{more}"


def _read_state(path, abstract, partial=False):
    """The arrays of the checkpoint at `path`, laid out as `abstract` says; raises Damaged."""
    context = _context(alone=True, partial=partial)
    try:
        with context:
            state = ocp.load_checkpointables(path, {"state": abstract})["state"]
    except Exception as error:
        first = _first(error)  # Orbax wraps whatever happens, an interrupt or a lack of memory as well
        if not isinstance(first, DAMAGE) or str(first).startswith(NO_DAMAGE):
            raise first from error
        raise Damaged(f"state: {_reason(error)}") from error
    unread = [name for name, leaf in _named(state).items() if not isinstance(leaf, jax.Array)]
    if unread:  # Orbax hands back what it was asked for where its index of names has changed
        raise Damaged(f"state: not found: {_some(unread)}")
    return state


def _check_arrays(state, stored):
    """Raises Damaged unless all arrays have their stored checksums."""
    sums = _checksums(state)
    changed = [name for name, value in sums.items() if value != stored[name]["checksum"]]
    if changed:
        raise Damaged(f"state: checksums do not fit for {_some(changed)}")


def _of_first_process(value):
    """The first process's int, on all of them: the others may see another state of a shared file system."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _agree(why):
    """Raises Damaged on all processes if any of them has a reason `why`."""
    text = np.zeros(256, np.uint8)
    encoded = why.encode()[:256]
    text[: len(encoded)] = list(encoded)
    rows = np.reshape(multihost_utils.process_allgather(text), (-1, 256))
    reasons = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
    if any(reasons):
        raise Damaged(next(reason for reason in reasons if reason))


def _first(error):
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error):
    """Kind and first line of the error that began it all."""
    error = _first(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
