"""Compares this implementation with recorded fixtures of the PyTorch reference, output by output.

python tools/check_parity.py tests/fixtures/*.safetensors
python tools/check_parity.py recording.safetensors --weights weights/ --dtype bfloat16 --backend cudnn
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.models.attention import BACKENDS, PLATFORM_OF
from animecolor_jax.parity.check import check_fixture


@dataclass
class Arguments:
    """Check this implementation against recorded fixtures of the PyTorch reference."""

    fixtures: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """FIXTURE.safetensors, each with its FIXTURE.json beside it."""
    backend: str = "auto"
    """Attention backend: auto, chunked, cudnn, packed, splash or xla."""
    dtype: str = "float32"
    """float32, or bfloat16 (compared with the reference's own bfloat16 error)."""
    tolerance: float | None = None
    """Tolerance for every output, in place of the fixture's."""
    weights: Path | None = None
    """Weights directory, for recordings of the real model, which hold none."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Checks every fixture; passes if every output of every case is within its tolerance."""
    if not args.fixtures:
        raise InputError("no fixture given", where="arguments", expected="FIXTURE.safetensors...")
    if args.backend not in BACKENDS:
        raise InputError(f"{args.backend!r}", where="--backend", expected=f"one of {', '.join(BACKENDS)}")
    platform = jax.default_backend()
    if PLATFORM_OF.get(args.backend, platform) != platform:
        raise InputError(
            f"{args.backend} does not run on {platform}", where="--backend", fix="use it where the device is"
        )
    if args.dtype not in ("float32", "bfloat16"):
        raise InputError(f"{args.dtype!r}", where="--dtype", expected="float32 or bfloat16")
    jax.config.update("jax_default_matmul_precision", "highest")
    results = []
    print(f"{'fixture':24} {'outputs':>7} {'error/tolerance':>15} {'error':>9}  worst output")
    for path in args.fixtures:
        result = check_fixture(
            path, dtype=args.dtype, attention=args.backend, tolerance=args.tolerance, weights=args.weights
        )
        ratio, error, name = result.worst
        verdict = "" if result.passed else "  FAILED"
        print(
            f"{result.name:24} {len(result.errors):7} {ratio:15.3f} {error:9.1e}  {name}{verdict}", flush=True
        )
        results.append(result)
    ratio, error, name = max(result.worst for result in results)
    report = {
        "fixtures": len(results),
        "outputs": sum(len(result.errors) for result in results),
        "worst": ratio if math.isfinite(ratio) else None,
        "worst_error": error if math.isfinite(error) else None,
        "worst_name": name,
        "not_compared": [f"{result.name}/{name}" for result in results for name in result.not_compared],
        "passed": all(result.passed for result in results),
    }
    return report, report["passed"]


if __name__ == "__main__":
    cli.main(run, Arguments)
