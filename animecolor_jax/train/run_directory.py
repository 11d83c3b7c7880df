"""The identity of a training run: RUN/run.json says what made it, so that only the same run goes on there."""

import dataclasses
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax

from animecolor_jax.errors import InputError
from animecolor_jax.params import first_match
from data_pipeline.storage import Storage, is_remote

FORMAT_VERSION = 1
NAME = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
SAME = (
    (r"config\.(log_every|(checkpoint|validation|data\.load)\..*)", False),
    (r"config\.compute\.(mesh|memory_gib|attention|remat)", False),
    (r".*", True),
)
"""Rules over the dotted names of a run's settings: True where a resumed run must have the value it was
started with. `config.steps` may grow besides, if the learning rate's schedule does not depend on it."""


def describe_run(config, command, inputs=None):
    """What makes a run, ready for JSON. Only the command line may name folders of the machine.

    Args:
        config: TrainConfig.
        command: the command line, a list of str.
        inputs: whatever else decides the result, such as hashes of the data set and of the weights.

    Returns:
        dict: format_version, config, inputs, command, git ({revision, dirty}, or None when this package is
        not tracked by git), versions, devices, time (UTC).
    """
    description = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "inputs": inputs or {},
        "command": list(command),
        "git": _git(),
        "versions": _versions(),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.loads(json.dumps(description, allow_nan=False))


def open_run(directory, description, *, same=SAME, leader=True):
    """Starts a run in a directory, or makes sure that it is the run that was started there.

    A resumed run's run.json holds the new config, and what changed is added to its list `resumed`: {time,
    command, changes ({name: {was, now}}), git, versions, devices}.

    Args:
        directory: RUN, a local path or a URL; it may be missing or empty.
        description: of `describe_run`.
        same: rules as `SAME`.
        leader: whether this process writes; the others only compare, where they see the directory.

    Returns:
        The contents of run.json as they are now.

    Raises:
        InputError: the directory holds other things, or a run with other settings that change its result; or
            it cannot be written.
    """
    storage = Storage(directory)
    if storage.exists(NAME):
        run = read_run(directory)
        changes = _changes(run, description, same, directory)
        event = {key: description[key] for key in ("time", "command", "git", "versions", "devices")}
        run = {**run, "config": description["config"], "inputs": description["inputs"]}
        run["resumed"] = [*run["resumed"], {**event, "changes": changes}]
    else:
        if leader:
            _check_empty(storage)
        run = {**description, "resumed": []}
    if leader:
        try:
            storage.write(NAME, (json.dumps(run, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"cannot be written ({error.strerror or error})",
                where=directory,
                expected="a folder with write permission and free space",
            ) from error
    return run


def read_run(directory):
    """The contents of a run's run.json.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    try:
        run = json.loads(Storage(directory).read(NAME))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"holds no {NAME}", where=directory, expected="the directory of a training run"
        ) from error
    except ValueError as error:
        raise InputError(f"{NAME} is no JSON: {error}", where=directory, expected="an intact run") from error
    found = run.get("format_version") if isinstance(run, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{NAME} has format_version {found!r}",
            where=directory,
            expected=f"{FORMAT_VERSION}",
            fix="resume it with the version of this package that made it",
        )
    return run


def _check_empty(storage):
    path = Path(storage.root)
    if is_remote(storage.root):
        found = storage.names(recursive=True)
    elif path.exists() and not path.is_dir():
        raise InputError("is a file", where=path, expected="a new or empty folder", fix="use another --out")
    else:
        # Not hidden names: a killed process may have left a half-written run.json.
        found = sorted(child.name for child in path.glob("[!.]*"))
    if found:
        raise InputError(
            f"holds {found[0]!r} but no {NAME}: not a training run",
            where=storage.root,
            expected="a new or empty folder, or a run to resume",
            fix="use another --out",
        )


def _changes(run, description, same, directory):
    """{name: {"was", "now"}} of the settings that differ, all of them allowed to."""
    was, now = (
        {**_flat(facts["config"], "config"), **_flat(facts["inputs"], "inputs")}
        for facts in (run, description)
    )
    differing = [
        name for name in {**was, **now} if name not in was or name not in now or was[name] != now[name]
    ]
    may_grow = now["config.optimizer.schedule"] == "constant"
    refused = []
    for name in differing:
        if name == "config.steps" and may_grow and now[name] > was[name]:
            continue
        if first_match(same, name, "same"):
            refused.append(name)
    if refused:
        lines = [f"{_flag(name)}: was {_text(was, name)}, now {_text(now, name)}" for name in refused]
        raise InputError(
            "\n  ".join(["a run with other settings is there", *lines]),
            where=directory,
            expected="the config this run was started with",
            fix="use another --out, or the same settings",
        )
    return {name: {"was": was.get(name), "now": now.get(name)} for name in differing}


def _flat(value, name):
    """{dotted name: value} of nested dicts, `name` in front; lists are values."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for child in value for key, leaf in _flat(value[child], f"{name}.{child}").items()}


def _flag(name):
    """A dotted name as it is written on the command line."""
    return name.removeprefix("config.").replace("_", "-")


def _text(flat, name):
    return f"{flat[name]!r}" if name in flat else "nothing"


def _git():
    """Revision of the repository that tracks this package; None where there is none, or no git."""
    folder, this = Path(__file__).parent, Path(__file__).parents[1] / "__init__.py"

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(this))  # a repository around site-packages is not ours
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions():
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
