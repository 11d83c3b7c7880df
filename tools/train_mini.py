"""Makes a small model, from drawn clips to scored weights; the same command goes on where it stopped.

    python tools/train_mini.py --config configs/mini_cpu.py --out runs/mini_cpu
    python tools/train_mini.py --config configs/mini.py --out runs/mini --minutes 9

Needs JAX, Flax, Optax, OpenCV, SciPy and matplotlib; no Grain, TFDS, PyAV or tyro.
"""

import argparse
import sys

from animecolor_jax import cli
from animecolor_jax.mini.loop import Deadline, OutOfTime
from animecolor_jax.mini.recipe import MiniConfig
from animecolor_jax.mini.run import Recipe
from animecolor_jax.train.command import read_config


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="configs/mini.py, configs/mini_cpu.py, or your own")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument(
        "--minutes", type=float, help="end this slice after so many minutes; default: run to the end"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(argv)


def run(args):
    """Does what of the recipe is not done yet, as far as time allows."""
    deadline = Deadline(args.minutes)
    deadline.stop_on_signals()
    recipe = Recipe(read_config(args.config, MiniConfig), args.out, deadline)
    try:
        found = recipe.run(" ".join(["python", *sys.argv]))
    except OutOfTime:
        print("the slice is over; the same command goes on", file=sys.stderr)
        return {"done": False}, True
    print((recipe.out / "table.md").read_text())
    return {"done": True, **found}, True


if __name__ == "__main__":
    cli.finish(lambda: run(parse(sys.argv[1:])))
