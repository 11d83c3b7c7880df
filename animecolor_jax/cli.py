"""What all tools share: arguments, exit codes, the JSON line, the compilation cache.

Exit code 0: done, and what was checked holds. 1: done, but the check failed. 2: bad arguments or input.
Results go to stdout, diagnostics to stderr; with --json the last line of stdout is one strict JSON object.
"""

import contextlib
import io
import json
import re
import sys

from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NonFiniteError, use_compilation_cache

MAX_SIDE = 16384  # of an H.264 picture


def main(run, arguments, hands_on_unknown=False):
    """Parses the command line into the dataclass `arguments`, runs `run(args)`, and exits.

    Args:
        run: function of the parsed arguments -> (JSON-ready dict, whether the check holds).
        arguments: dataclass with a field `json: bool`; its docstring is the tool's description.
        hands_on_unknown: call `run(args, unknown)` with the list of arguments that are not ours, instead of
            refusing them.
    """

    def call():
        args, unknown = _parse(arguments, sys.argv[1:], hands_on_unknown)
        return run(args, unknown) if hands_on_unknown else run(args)

    finish(call)


def finish(call):
    """Runs `call()` -> (JSON-ready dict, whether the check holds), says what went wrong if anything did, and
    exits."""
    try:
        use_compilation_cache()
        result, holds = call()
        code = 0 if holds else 1
    except InputError as error:
        code, result = _failure(2, error)
    except (NonFiniteError, OSError) as error:  # bad weights; a full disk and its like
        code, result = _failure(1, InputError(str(error)))
    except KeyboardInterrupt:
        code, result = _failure(130, InputError("interrupted; what was finished is kept"))
    if "--json" in sys.argv[1:]:
        print(json.dumps(result, allow_nan=False))
    sys.exit(code)


def _failure(code, error):
    print(f"error: {error}", file=sys.stderr)
    return code, {"error": error.as_dict()}


def _parse(arguments, argv, hands_on_unknown):
    """`argv` as an instance of `arguments`, and what of it is none; InputError if it does not parse."""
    if hands_on_unknown:
        args, unknown = _call_tyro(arguments, argv, return_unknown_args=True)
    else:
        args, unknown = _call_tyro(arguments, argv), []
    flags = [text.partition("=")[0].replace("_", "-") for text in argv if text.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1 and not any(text.replace("_", "-").startswith(flag) for text in unknown):
            raise InputError(  # tyro would take the last
                f"is given {flags.count(flag)} times",
                where=flag,
                expected="every flag once",
                fix=f"several values follow one flag: {flag} A B",
            )
    return args, unknown


def parse(cls, argv, default):
    """`default`, an instance of the dataclass `cls`, with values replaced by flags; InputError if they do not
    fit.

    Nested fields have dotted names: --optimizer.learning-rate 1e-5.
    """
    return _call_tyro(cls, argv, default=default)


def _call_tyro(arguments, argv, **options):
    import tyro  # not above: tools that parse by themselves run without it

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments, args=argv, **options)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        lines = [line.strip("│─ ") for line in said.getvalue().splitlines() if line[:1] not in "╭╰"]
        what = " ".join(filter(None, lines)).partition(" For full helptext")[0]
        raise InputError(what, where="arguments", expected="what --help lists", fix="see --help") from None


def parse_size(text, where="--size"):
    """`"480x720"` -> (480, 720); InputError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < max(size) <= MAX_SIDE:
        raise InputError(
            f"{text!r}", where=where, expected=f"HEIGHTxWIDTH in pixels, sides from 1 to {MAX_SIDE}",
            fix="for example 480x720",
        )
    return size


def parse_share(args):
    """(process, processes) of a tool's --process-id and --num-processes, checked."""
    if not 0 <= args.process_id < args.num_processes:
        raise InputError(
            f"process {args.process_id} of {args.num_processes}", where="--process-id",
            expected="from 0 to --num-processes - 1",
        )  # fmt: skip
    return args.process_id, args.num_processes


def check_dtype(dtype):
    """Raises InputError unless `dtype` is None or a dtype that networks compute in."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(
            f"{dtype!r}", where="--dtype", expected="float32, bfloat16 or float16",
            fix="leave it out to compute as the weights are stored",
        )
    return dtype
