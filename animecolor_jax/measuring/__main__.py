"""The command: see the package."""

import argparse
import signal
import sys

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.measuring import slices, table
from animecolor_jax.measuring.rows import rows
from animecolor_jax.measuring.sizes import SIZES
from animecolor_jax.replacing import replacing

TABLE = "table.md"


class Parser(argparse.ArgumentParser):
    """Says what is wrong as every tool does."""

    def error(self, message):
        raise InputError(message, where="arguments", expected="what --help lists", fix="see --help")


def parse():
    """The command line's values; InputError for what is not to be measured."""
    parser = Parser(
        "python -m animecolor_jax.measuring",
        description="Measure, on one GPU, all that needs one: rates, seconds per clip and its parts, memory, "
        "diffusers beside ours, training. The same command again goes on with the rows that are left. "
        "Exit code 1: a row failed, something for it is not installed, or a target is missed.",
    )
    parser.add_argument("--out", required=True, help="folder of results.json, table.md and compiled programs")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this slice; what runs then is ended")
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="by default all, those that matter most first"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="2b", help="tiny tries everything on a CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    known = rows(SIZES[args.size])
    unknown = sorted(set(args.rows or ()) - known.keys())
    if unknown:
        raise InputError(
            f"no row {', '.join(unknown)}", where="--rows", expected=f"some of {', '.join(known)}"
        )
    if not 0 <= args.minutes < float("inf"):
        raise InputError(f"{args.minutes:g}", where="--minutes", expected="a number of at least 0")
    return args, known


def run():
    """Measures for one slice; the table is of all slices. Returns (JSON, whether all is well)."""
    args, known = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a row's process ends, too
    results = slices.Results(args.out, args.size)
    size = SIZES[args.size]
    for name in args.rows or ():  # what was lacking may be there now
        if results.rows.get(name, {}).get("state") == "lacking":
            del results.rows[name]
    expected = {name: size.row_seconds or known[name].seconds for name in args.rows or known}
    slices.run(results, expected, 60 * args.minutes)
    in_order = {name: results.rows[name] for name in known if name in results.rows}
    found, reasons = table.lines(in_order, size), table.not_run(in_order, known)
    text = table.markdown(found, reasons)
    with replacing(results.folder / TABLE) as partial:
        partial.write_text(text)
    print(text)
    missed = [line["name"] for line in found if line["met"] is False]
    wrong = [name for name, row in in_order.items() if row["state"] in ("failed", "lacking")]
    report = {
        "size": args.size,
        "left": results.left(known),
        "missed": missed,
        "lines": found,
        "not_run": reasons,
    }
    return report, not missed and not wrong


if __name__ == "__main__":
    cli.finish(run)
