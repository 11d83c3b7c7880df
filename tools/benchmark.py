"""Measures this implementation, and beside it PyTorch or itself without caching.

python tools/benchmark.py forward --against torch
python tools/benchmark.py vae --against torch
python tools/benchmark.py denoise --against torch
python tools/benchmark.py denoise --against uncached
python tools/benchmark.py attention --against torch
python tools/benchmark.py train --against torch
python tools/benchmark.py train --shape 2b-480x720x49
python tools/benchmark.py data
python tools/benchmark.py metrics --against torch
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro

from animecolor_jax import benchmarks, benchmarks_attention, benchmarks_train, cli
from animecolor_jax.errors import InputError


def data(against, repeats):
    """Data loading; its libraries are an extra."""
    from animecolor_jax import benchmarks_data

    return benchmarks_data.data(repeats)


def metrics(against, repeats):
    """Metrics of evaluation; line art comes from data preparation."""
    from animecolor_jax import benchmarks_metrics

    return benchmarks_metrics.metrics(against, repeats)


MEASURES = {
    "forward": benchmarks.forward,
    "vae": benchmarks.vae,
    "denoise": benchmarks.denoising,
    "attention": benchmarks_attention.attention,
    "data": data,
    "metrics": metrics,
}


@dataclass
class Arguments:
    """Measure speed; with --against, both sides in one run, alternating. Ratios are theirs / ours:
    above 1 we win."""

    measure: Annotated[
        Literal["forward", "vae", "denoise", "attention", "train", "data", "metrics"], tyro.conf.Positional
    ]
    """What to measure."""
    against: Literal["none", "torch", "uncached"] = "none"
    """The other side; "uncached" (denoise only) makes the reference's keys and values anew in every step.
    data has its own: each line says what against what."""
    shape: Literal["small", "2b-480x720x49", "2b-320x512x49"] = "small"
    """Of train: what is trained; 2b is for a GPU or TPU."""
    batch_size: int = 1
    """Of train."""
    repeats: int = 5
    """Rounds after the warm-up."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Prints a line for each result."""
    if args.against == "uncached" and args.measure != "denoise":
        raise InputError("uncached", where="--against", expected="none or torch", fix="use it with denoise")
    if args.measure == "data" and args.against != "none":
        raise InputError(args.against, where="--against", expected="none", fix="leave --against out")
    for name in ("repeats", "batch_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{getattr(args, name)}", where=flag, expected="1 or more")
    if args.measure == "train":
        results = benchmarks_train.train(args.against, args.repeats, args.shape, args.batch_size)
    elif (args.shape, args.batch_size) != ("small", 1):
        raise InputError(
            f"{args.shape}, {args.batch_size}", where="--shape, --batch-size", expected="small and 1",
            fix="use them with train",
        )  # fmt: skip
    else:
        results = MEASURES[args.measure](args.against, args.repeats)
    for line in results:
        against = (
            "" if line["ratio"] is None else f"   theirs {line['theirs']:.4g}   ratio {line['ratio']:.2f}"
        )
        more = f"   {benchmarks_train.describe(line)}" if args.measure == "train" else ""
        print(f"{line['name']} ({line['shape']}): {line['ours']:.4g} {line['unit']}{against}{more}")
    ratios = [line["ratio"] for line in results if line["ratio"] is not None]
    return {
        "device": jax.devices()[0].device_kind,
        "results": results,
        "ratio": min(ratios, default=None),
    }, True


if __name__ == "__main__":
    cli.main(run, Arguments)
