"""One slice of the measurement: rows that are left, each in a process of its own, until the time is over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from animecolor_jax.errors import InputError
from animecolor_jax.replacing import replacing

RESULTS = "results.json"
LOGS = "rows"
ANEW = "run the command again"


class Results:
    """What has been measured into a folder, at one size.

    Attributes:
        rows: {name: result of `row.measure`}, also of rows that "failed" or were "stopped", with "reason".

    Raises:
        InputError: the folder holds results of another size, or something else by that name.
    """

    def __init__(self, folder, size):
        self.folder, self.size, self.rows = Path(folder), size, {}
        path = self.folder / RESULTS
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text())
            held_size, self.rows = held["size"], dict(held["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot be read: {error}",
                where=path,
                expected="results of this command",
                fix="use another --out",
            ) from error
        if held_size != size:
            raise InputError(
                f"size {size}", where="--size", expected=f"{held_size}, as the results in {self.folder}",
                fix="use another --out",
            )  # fmt: skip

    def put(self, name, result):
        """Adds a row's result and writes all of them at once."""
        self.rows[name] = result
        with replacing(self.folder / RESULTS) as partial:
            partial.write_text(json.dumps({"size": self.size, "rows": self.rows}, indent=1, allow_nan=False))

    def left(self, names):
        """Those of `names` that are neither done nor lack something, those never tried first."""
        return sorted(
            (name for name in names if self.rows.get(name, {}).get("state") not in ("done", "lacking")),
            key=self.rows.__contains__,
        )


def run(results, rows, seconds, start=None, clock=time.monotonic):
    """Measures rows that are left until `seconds` are over.

    A row is begun where the time left is as long as it is expected to take, the slice's first row in any
    case, and ended when the time is over.

    Args:
        rows: {name: expected seconds}. start: function of name and seconds left -> result, by default
            `in_a_process`.
    """
    start = start or (lambda name, left: in_a_process(results.folder, name, results.size, left))
    deadline, first = clock() + seconds, True
    for name in results.left(rows):
        left = deadline - clock()
        if left <= 0 or (left < rows[name] and not first):
            print(f"{name}: left for another slice, it takes about {rows[name]} s", file=sys.stderr)
            continue
        print(f"{name}: about {rows[name]} s, {left:.0f} s left", file=sys.stderr)
        result, first = start(name, left), False
        results.put(name, result)
        print(
            f"{name}: {result['state']}{': ' * ('reason' in result)}{result.get('reason', '')}",
            file=sys.stderr,
        )


def in_a_process(folder, name, size, seconds):
    """The result of a row, of a process that ends within `seconds`.

    JAX leaves memory to PyTorch. Compiled programs stay in the folder, so that a row that was stopped gets
    further the next time.
    """
    folder = folder.resolve()
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    result, log = (folder / LOGS / f"{name}.{kind}" for kind in ("json", "log"))
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, "-m", "animecolor_jax.measuring.row", name, size, str(result)]
    with open(log, "w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {
                "state": "stopped",
                "reason": f"not finished within the {seconds:.0f} s that were left: {ANEW}",
            }
        finally:
            if process.poll() is None:  # with the compilers that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return json.loads(result.read_text())
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return {
        "state": "failed",
        "reason": f"{lines[-1].strip()[:300] if lines else 'no message'} ({log.relative_to(folder)})",
    }
