"""The other processes of a run: who is there, and that nobody waits for one that died.

A collective operation or a barrier may wait for ever for a process that is gone. JAX ends a process that has
not heard of another for long, without a word about the run; `watch` comes before it, and says what to do.
"""

import os
import re
import sys
import threading
import time

import jax

BEAT_KEYS = "animecolor_alive/"
BEATS = 5  # signs of life within the time after which a process counts as dead


class _Watch:
    """What the watching thread says besides who died."""

    last_checkpoint = staticmethod(lambda: None)


def keep(last_checkpoint):
    """`last_checkpoint()` is the path that a death's message names, or None."""
    _Watch.last_checkpoint = staticmethod(last_checkpoint)


def _client():
    from jax._src import distributed  # nowhere public

    return distributed.global_state.client


def missing(wait_seconds=5):
    """Numbers of the processes that do not answer, as far as the first one can tell: [] where it is gone
    itself, None where all answer."""
    try:
        _client().wait_at_barrier("who is there", 1000 * wait_seconds)
    except jax.errors.JaxRuntimeError as error:
        return sorted({int(number) for number in re.findall(r"task:(\d+)", str(error))})
    return None


def wait_for_all(name, hours=3):
    """Returns when every process has come here: what one of them does meanwhile may take long, such as
    writing weights, and a process that ended would be taken for dead."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, int(hours * 3600 * 1000))


def describe_death(gone, why=""):
    """What a user reads when the processes `gone` ([]: any other) do not answer."""
    count, own = jax.process_count(), jax.process_index()
    gone = gone or [number for number in range(count) if number != own]
    kept = _Watch.last_checkpoint() or "none yet"
    return (
        f"process {' or '.join(map(str, gone))} of {count} died or cannot be reached, so process {own} "
        f"stops{f' ({why})' if why else ''}; last checkpoint: {kept}. Look at the output of that process, "
        "and start the same command again everywhere: it goes on"
    )


def watch(timeout):
    """Ends this process, with a message, when another has given no sign of life for `timeout` seconds."""
    threading.Thread(target=_watch, args=(timeout,), name="peers", daemon=True).start()


def _watch(timeout):
    client, own = _client(), jax.process_index()
    last, beat = {}, 0  # process -> (its beat, when that came)
    while True:
        beat += 1
        try:
            client.key_value_set(f"{BEAT_KEYS}{own}", str(beat), allow_overwrite=True)
            found = dict(client.key_value_dir_get(BEAT_KEYS))
        except jax.errors.JaxRuntimeError:
            return  # the first process is gone, or all are finished: JAX itself sees to that at once
        now = time.monotonic()
        for key, value in found.items():
            number = int(key.rpartition("/")[2])
            if last.get(number, ("",))[0] != value:
                last[number] = value, now
        gone = sorted(number for number, (_, since) in last.items() if now - since > timeout)
        if gone:
            print(f"error: {describe_death(gone)}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(timeout / BEATS)
