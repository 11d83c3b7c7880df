"""What all tools share: arguments, exit codes, the JSON line, the compilation cache.

Exit code 0: done, and what was checked holds. 1: done, but the check failed. 2: bad arguments or input.
Results go to stdout, diagnostics to stderr; with --json the last line of stdout is one strict JSON object.
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
import tyro

from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NonFiniteError


def main(run, arguments):
    """Parses the command line into the dataclass `arguments`, runs `run(args)`, and exits.

    Args:
        run: function of the parsed arguments -> (JSON-ready dict, whether the check holds).
        arguments: dataclass with a field `json: bool`; its docstring is the tool's description.
    """
    wants_json = "--json" in sys.argv[1:]
    try:
        args = tyro.cli(arguments)
    except SystemExit as stop:
        if stop.code not in (0, None):
            error = InputError("the arguments do not parse", where=" ".join(sys.argv[1:]), fix="see --help")
            _refuse(error, wants_json, say=False)
        raise
    try:
        _use_compilation_cache()
        result, holds = run(args)
    except InputError as error:
        _refuse(error, args.json)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    sys.exit(0 if holds else 1)


def _refuse(error, wants_json, say=True):
    if say:
        print(f"error: {error}", file=sys.stderr)
    if wants_json:
        print(json.dumps({"error": error.as_dict()}))
    sys.exit(2)


def _use_compilation_cache():
    """Compiled programs survive the process, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "animecolor_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def parse_size(text, where="--size"):
    """`"480x720"` -> (480, 720); InputError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"{text!r}", where=where, expected="HEIGHTxWIDTH in pixels", fix="for example 480x720")
    return int(match[1]), int(match[2])


def check_dtype(dtype):
    """Raises InputError unless `dtype` is None or a dtype that networks compute in."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"{dtype!r}", where="--dtype", expected="float32, bfloat16 or float16")
    return dtype
