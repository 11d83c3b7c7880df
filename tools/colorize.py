"""Colours a line-art clip from a reference image.

    python tools/colorize.py --demo
    python tools/colorize.py --sketch sketch.mp4 --reference reference.png --weights weights/ --out colored.mp4
    python tools/colorize.py --jobs clips.csv --weights weights/
"""

import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from animecolor_jax import cli
from animecolor_jax.colorize import Inputs, Job, colorize, open_pipeline, read_jobs, write_demo_inputs
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NEGATIVE_PROMPT
from animecolor_jax.sampling import SAMPLERS


@dataclass
class Arguments:
    """Colour a line-art clip from a reference image."""

    sketch: Path | None = None
    """The line art: a video, a folder of frames, or one image."""
    reference: tuple[Path, ...] = ()
    """Coloured reference image, or several."""
    prompt: str = ""
    """What the clip shows."""
    prompt_file: Path | None = None
    """Text file to read the prompt from."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What the clip should not show."""
    weights: Path | None = None
    """Weights directory (tools/convert_torch.py)."""
    out: Path | None = None
    """.mp4, .webm, .gif, .mkv (lossless), or a folder of PNGs."""
    comparison: Path | None = None
    """Also write sketch, reference and result side by side."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 6.0
    """Guidance scale; 1 turns guidance off and halves the time."""
    dynamic_guidance: bool = False
    """Let the guidance scale rise with the step."""
    seed: int = 43
    """The same seed repeats a run bit for bit on the same device."""
    sampler: str = "ddim"
    """ddim, ddim-cog, dpm-cog, dpmpp-2m, euler, euler-a or pndm."""
    size: str | None = None
    """HEIGHTxWIDTH to resize the sketch to; default: its own size."""
    fps: float | None = None
    """Frame rate of the result; default: the sketch's."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Invert the line art; auto makes light lines on dark into dark lines on light."""
    window: int = 49
    """Frames of one window; longer clips are coloured in overlapping windows."""
    overlap: int = 16
    """Frames by which windows overlap."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the weights' own."""
    mesh: str = ""
    """Devices, e.g. data=2,context=4; default: one device."""
    noise: Path | None = None
    """safetensors with ref_noise and init_latents of a run of the reference implementation."""
    strict_reference: bool = False
    """Treat sizes as the official script does: the reference's size is the canvas, 4k+1 frames, at most 49."""
    jobs: Path | None = None
    """CSV of many clips (columns sketch, reference, out, prompt, ...); clips already there are skipped."""
    demo: bool = False
    """Colour a clip that is drawn on the spot, with small weights made on the spot."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Colours one clip, the demo, or the clips of a CSV file."""
    cli.check_dtype(args.dtype)
    if args.sampler not in SAMPLERS:
        raise InputError(f"{args.sampler!r}", where="--sampler", expected=f"one of {', '.join(SAMPLERS)}")
    if args.prompt_file is not None:
        args.prompt = _read_prompt(args.prompt_file)
    if args.demo:
        return _run_demo(args), True
    if args.weights is None:
        raise InputError(
            "is missing", where="--weights", expected="a weights directory",
            fix="convert a checkpoint with tools/convert_torch.py, or try --demo",
        )
    if args.jobs is not None:
        return _run_jobs(args)
    for name in ("sketch", "out"):
        if getattr(args, name) is None:
            raise InputError("is missing", where=f"--{name}", expected="a path", fix="see --help")
    job = Job(**_job_values(args))
    inputs = Inputs(job)
    with open_pipeline(args.weights, dtype=args.dtype, mesh=args.mesh) as pipeline:
        report = colorize(pipeline, job, inputs)
    print(report["out"])
    return {**report, "weights": str(args.weights)}, True


def _job_values(args):
    values = {field.name: getattr(args, field.name) for field in fields(Job)}
    values["size"] = None if args.size is None else cli.parse_size(args.size)
    return values


def _read_prompt(path):
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=path, expected="a UTF-8 text file") from error


def _run_demo(args):
    args.out = args.out or Path("demo.mp4")
    args.comparison = args.comparison or args.out.with_name(f"{args.out.stem}_comparison{args.out.suffix}")
    print(
        "demo: these weights are untrained (random), so the result is noise; it shows that every part runs.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as folder:
        args.sketch, reference = write_demo_inputs(folder)
        args.reference = (reference,)
        job = Job(**_job_values(args))
        inputs = Inputs(job)
        with open_pipeline(None, dtype=args.dtype, mesh=args.mesh, demo=True) as pipeline:
            report = colorize(pipeline, job, inputs)
    print(f"{job.out}\n{job.comparison}")
    return {**report, "weights": "tiny, untrained"}


def _run_jobs(args):
    jobs = read_jobs(args.jobs, _job_values(args))
    todo = [job for job in jobs if not job.out.exists()]
    done, failed = [], {}
    for job in todo:  # all inputs are looked at before any work
        Inputs(job)
    with open_pipeline(args.weights, dtype=args.dtype, mesh=args.mesh) as pipeline:
        for job in tqdm(todo, desc="clips", disable=not sys.stderr.isatty()):
            try:
                done.append(colorize(pipeline, job, Inputs(job), progress=False))
                print(job.out, flush=True)
            except (InputError, FloatingPointError) as error:
                failed[str(job.out)] = str(error)
                print(f"error: {job.out}: {error}", file=sys.stderr)
    report = {"clips": done, "skipped": len(jobs) - len(todo), "failed": failed, "weights": str(args.weights)}
    return report, not failed


if __name__ == "__main__":
    cli.main(run, Arguments)
