"""One row in a process of its own: `python -m animecolor_jax.measuring.row NAME SIZE RESULT`.

RESULT is a JSON file that is written at the end. `slices` calls it.
"""

import datetime
import importlib.metadata
import json
import sys
import time
from collections import Counter

import jax

from animecolor_jax import doctor
from animecolor_jax.measuring.rows import Lacking, rows
from animecolor_jax.measuring.sizes import SIZES
from animecolor_jax.platforms import GIB
from animecolor_jax.replacing import replacing


def measure(name, size):
    """The row's result.

    Returns:
        {"state" ("done", or "lacking" with "reason"), "lines", "peak_gib" (of the device; None where it
        keeps none), "compiled" and "from_cache" (numbers of programs), "row_seconds", "where" (see there)}.
    """
    began, events = time.perf_counter(), Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    found = {"state": "done"}
    try:
        found["lines"] = rows(SIZES[size])[name].measure(SIZES[size])
    except Lacking as lacking:
        found = {"state": "lacking", "reason": str(lacking), "lines": []}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | {
        "peak_gib": peak and peak / GIB,
        "compiled": events["cache_misses"],
        "from_cache": events["cache_hits"],
        "row_seconds": time.perf_counter() - began,
        "where": where(),
    }


def where():
    """{"device", "date" (UTC), versions, ...}; None for what is not installed."""
    about = doctor.environment()
    found = {name: about[name] for name in ("device", "devices", "memory_gib", "python", "jax")}
    for package in ("flax", "torch", "diffusers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")}


def main(name, size, result):
    """Measures and writes."""
    found = json.dumps(measure(name, size), allow_nan=False)
    with replacing(result) as partial:
        partial.write_text(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
