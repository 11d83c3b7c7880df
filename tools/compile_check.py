"""Compiles a program of training or colouring for TPUs or GPUs that this computer does not have.

    python tools/compile_check.py --config configs/stage1_sketch.py --target tpu:v5e:4x4
    python tools/compile_check.py --config configs/stage4_joint.py --target gpu:a100-40gb:1x8 \
        --compute.remat attention
    python tools/compile_check.py --program denoise --target gpu:a100-40gb:1x1
    python tools/compile_check.py --program vae-decode --target tpu:v5e:2x4 --mesh data=2,context=4

Needs `pip install libtpu` for TPUs, and `pip install "jax[cuda13]"` for GPUs, the latter in an environment of
its own.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled here runs nowhere

import jax  # noqa: E402

from animecolor_jax import cli, sharding  # noqa: E402
from animecolor_jax.compiling import programs, report, targets  # noqa: E402
from animecolor_jax.config import preset  # noqa: E402
from animecolor_jax.errors import InputError  # noqa: E402
from animecolor_jax.train.command import override, read_config  # noqa: E402


@dataclass
class Arguments:
    """Compile the real program for devices that are not here, and say whether it fits their memory. Exit code
    1: it does not. Every value of a training config can be given as a flag, such as --compute.remat none."""

    target: str
    """tpu:KIND:CHIPS[:SLICES] or gpu:KIND:HOSTSxGPUS: tpu:v5e:4x4, tpu:v5p:2x2x4, two slices tpu:v5e:4x4:2,
    gpu:a100-80gb:1x8."""
    program: Literal["train", "text", "image", "vae-encode", "conditions", "denoise", "vae-decode"] = "train"
    """A training step; or of colouring, in this order: text and image encoder, the VAE's chunks, what is made
    of the reference, one denoising step with guidance, the VAE's chunks again."""
    config: Path | None = None
    """Of train: Python file with CONFIG, a TrainConfig, such as configs/stage1_sketch.py."""
    preset: str = "animecolor-2b"
    """The architecture."""
    mesh: str = ""
    """Such as fsdp=8,context=2; by default --compute.mesh of a training run, else fsdp over all devices of a
    slice and data over the slices; for colouring data=2, one branch of guidance each, and context."""
    batch: int = 0
    """Of train: clips of a step, all devices together; 0 takes the config's."""
    size: str = "480x720"
    """HEIGHTxWIDTH of the clip."""
    frames: int = 49
    """Of the clip, 4k + 1."""
    dtype: str = "bfloat16"
    """Of colouring; training has --compute.dtype."""
    offload: bool = False
    """Of colouring: networks wait in the host's memory, as with colorize.py --offload yes."""
    quantize: Literal["int8"] | None = None
    """Of colouring: matrices of the networks' blocks in int8, as with colorize.py --quantize int8."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args, unknown):
    """Prints a line for each program."""
    height, width = cli.parse_size(args.size)
    clip, model = programs.Clip(args.frames, height, width), preset(args.preset)
    cli.check_dtype(args.dtype)
    check_flags(args, unknown)
    jax.config.update("jax_enable_compilation_cache", False)  # cannot be read back without the devices
    target = targets.open_target(args.target)
    if args.program == "train":
        made, mesh = training(args, unknown, model, clip, target)
    else:
        count, branches = len(target.devices), 1 if len(target.devices) % 2 else 2
        sizes = sharding.parse_mesh(args.mesh) or {"data": branches, "context": count // branches}
        mesh = sharding.make_mesh(**sizes, devices=list(target.devices), whole=True)
        colouring = programs.Colouring(model, clip, mesh, args.dtype, args.offload, args.quantize)
        names = {"text": "text", "image": "image", "vae-encode": "encode", "vae-decode": "decode"}
        made = getattr(colouring, names.get(args.program, args.program))()
    found = report.check(made, target, mesh)
    for facts in found:
        print(report.describe(facts))
    worst = max(found, key=lambda facts: facts["peak_gib"])
    text = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"
    about = {"target": args.target, "devices": mesh.size, "mesh": text}
    return {**about, **worst, "programs": found}, worst["fits"]


def check_flags(args, unknown):
    """Raises InputError for a flag that is missing, or has no meaning for the program."""
    if args.program != "train" and (unknown or args.config is not None or args.batch):
        raise InputError(
            f"{' '.join(unknown) or '--config or --batch'}", where="arguments", expected="only with train",
            fix="leave it out",
        )  # fmt: skip
    if args.program == "train" and args.config is None:
        raise InputError(
            "is missing", where="--config", expected="a training config",
            fix="for example --config configs/stage1_sketch.py",
        )  # fmt: skip
    if args.program == "train" and (args.offload or args.quantize or args.dtype != "bfloat16"):
        raise InputError(
            "is of colouring", where="--offload, --quantize or --dtype", expected="none with train",
            fix="use --compute.dtype",
        )  # fmt: skip


def training(args, unknown, model, clip, target):
    """The programs of a training step, and their mesh."""
    config = override(read_config(args.config), unknown)
    data, compute = config.data, config.compute
    data = dataclasses.replace(data, batch_size=args.batch or data.batch_size)
    compute = dataclasses.replace(compute, mesh=args.mesh or compute.mesh)
    config = dataclasses.replace(config, data=data, compute=compute)
    within = {"data": target.slices, "fsdp": len(target.devices) // target.slices}
    sizes = sharding.parse_mesh(compute.mesh) or within
    mesh = sharding.make_mesh(**sizes, devices=list(target.devices), whole=True)
    return programs.train(config, model, clip, mesh), mesh


if __name__ == "__main__":
    cli.main(run, Arguments, hands_on_unknown=True)
