"""Looks at this computer: does it compute right, how fast, what fits, how long will training take.

    python tools/doctor.py
    python tools/doctor.py --size 320x512 --data dataset/ --json
"""

from dataclasses import dataclass
from pathlib import Path

import jax
from tqdm import tqdm

from animecolor_jax import cli, doctor
from animecolor_jax.compiling.programs import Clip
from animecolor_jax.config import preset
from animecolor_jax.parity import devices
from animecolor_jax.platforms import device_memory

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


@dataclass
class Arguments:
    """Check these devices in a few minutes: attention against float64, small networks against PyTorch's
    outputs, rates of products, attention and memory, what each stage takes, how long the paper's iterations
    last at least, and what to change. Exit code 1: a result is wrong."""

    preset: str = "animecolor-2b"
    """The architecture that is to be trained."""
    size: str = "480x720"
    """HEIGHTxWIDTH of the clips."""
    frames: int = 49
    """Of the clips, 4k + 1."""
    dtype: str = "bfloat16"
    """Of the arithmetic."""
    data: Path | None = None
    """A dataset, to see whether it is read fast enough."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Prints what it finds."""
    cli.check_dtype(args.dtype)
    model = preset(args.preset)
    latents = Clip(args.frames, *cli.parse_size(args.size)).latents(model.vae)
    about = doctor.environment()
    loader, steps = None, 4 if args.data is None else 5
    with tqdm(total=steps, desc="doctor", disable=None) as bar:
        checks = devices.attention_errors()
        bar.update()
        networks = devices.network_errors(FIXTURES, checks)
        bar.update()
        found = doctor.rates(model.denoiser, latents, args.dtype)
        bar.update()
        limit = device_memory(jax.local_devices()[0])
        stages = doctor.training(model, latents, found, about["devices"], limit)
        bar.update()
        if args.data is not None:
            quickest = min(stage["seconds_per_step"] for stage in stages.values())
            loader = doctor.loading(args.data, doctor.PAPER_BATCH / quickest)
            bar.update()
    said = doctor.advice(about, checks + networks, found, stages, loader)
    passed = all(check["passed"] is not False for check in checks + networks)
    show(about, checks + networks, found, stages, loader, said)
    report = {"parity": checks, "networks": networks, "rates": found, "training": stages, "loader": loader}
    report["advice"] = said
    return {**about, **report, "passed": passed}, passed


def show(about, checks, found, stages, loader, said):
    """The report as text."""
    size = "memory unknown" if about["memory_gib"] is None else f"{about['memory_gib']:.1f} GiB each"
    print(f"{about['devices']} x {about['device']} ({size}), JAX {about['jax']}, Python {about['python']}")
    for check in checks:
        error = "none" if check["error"] is None else f"{check['error']:.1e}"
        result = {None: "not available", True: f"error {error}, ok", False: f"error {error}, WRONG"}
        print(f"{doctor.named(check)}: {result[check['passed']]}")
    peak = "" if found["peak_tflops"] is None else f" of {found['peak_tflops']:.0f} by data sheet"
    print(
        f"TFLOP/s at {found['tokens']} tokens: products {found['matmul_tflops']:.3g}{peak}, attention "
        f"{found['attention_tflops']:.3g}, with its gradient {found['attention_backward_tflops']:.3g}; "
        f"memory {found['memory_gb']:.0f} GB/s"
    )
    for name, stage in stages.items():
        batch = "" if stage["batch"] is None else f"largest batch {stage['batch']}, "
        print(
            f"{name}: {batch}{stage['gib']:.1f} GiB a device at batch {doctor.PAPER_BATCH}; at least "
            f"{stage['seconds_per_step']:.3g} s a step, {stage['hours']:.3g} h for the paper's iterations"
        )
    if loader is not None:
        print(f"reading: {loader['clips_per_second']:.1f} clips/s, needed {loader['needed']:.1f}")
    print(*(f"- {sentence}" for sentence in said or ["nothing to change"]), sep="\n")


if __name__ == "__main__":
    cli.main(run, Arguments)
