"""Colours a line-art clip from a reference image.

    python tools/colorize.py --demo
    python tools/colorize.py --sketch sketch.mp4 --reference front.png --out colored.mp4
    python tools/colorize.py --weights weights/ --jobs clips.csv
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from animecolor_jax import cli
from animecolor_jax.colorize import Colorizer, Job, check_flags, read_jobs, read_prompt
from animecolor_jax.demo import run_demo
from animecolor_jax.pipeline import NEGATIVE_PROMPT


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
    """Weights directory (tools/convert_torch.py, tools/train.py); default: the small ones of the package."""
    out: Path | None = None
    """.mp4, .webm, .gif, .mkv (lossless), or a folder of PNGs."""
    comparison: Path | None = None
    """Also write sketch, reference and result side by side."""
    steps: int | None = None
    """Denoising steps; default: what the weights name, else 50."""
    guidance: float | None = None
    """Guidance scale; 1 turns guidance off and halves the time; default: what the weights name, else 6."""
    dynamic_guidance: bool = False
    """Let the guidance scale rise with the step."""
    seed: int = 43
    """The same seed repeats a run bit for bit on the same device."""
    sampler: str = "ddim"
    """ddim, ddim-cog, dpm-cog, dpmpp-2m, euler, euler-a or pndm."""
    size: str | None = None
    """HEIGHTxWIDTH to stretch the sketch to; default: its own size."""
    fps: float | None = None
    """Frame rate of the result; default: the sketch's."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Invert the line art; auto makes light lines on dark into dark lines on light."""
    window: int | None = None
    """Frames of one window; longer clips are coloured in overlapping windows; default: what the weights name,
    else 49."""
    overlap: int | None = None
    """Frames by which windows overlap; default: what the weights name, else 16."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the weights' own."""
    mesh: str = ""
    """Devices, e.g. data=2,context=4; default: one device."""
    step_cache: float = 0.0
    """Skip the denoiser's blocks in steps whose timestep's embedding has changed by less than this; 0 runs
    them in every step, which alone is exact."""
    offload: Literal["auto", "yes", "no"] = "auto"
    """Keep networks in the host's memory while others compute, for a device with little; auto: where all take
    more than half of its memory."""
    quantize: Literal["int8"] | None = None
    """Keep the matrices of the networks' blocks in int8 and compute as before: half of bfloat16's memory, not
    faster. Needs qwix (the extra "quantize")."""
    devices: int = 1
    """With --jobs: so many devices colour a clip each, at the same time."""
    num_processes: int = 1
    """With --jobs: so many processes, of this computer or others, share the clips."""
    process_id: int = 0
    """Which of them this is, from 0."""
    noise: Path | None = None
    """safetensors with ref_noise and init_latents of a run of the reference implementation."""
    strict_reference: bool = False
    """Treat sizes as the official script does: the reference's is the canvas, 4k+1 frames, at most 49."""
    jobs: Path | None = None
    """CSV of many clips: columns sketch, reference (several separated by ;), out, and any of prompt,
    negative_prompt, comparison, seed, steps, guidance, fps, invert. Clips already there are skipped."""
    demo: bool = False
    """Colour a cartoon that is drawn on the spot, from its own first frame."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Colours one clip, the demo, or the clips of a CSV file."""
    check_flags(args)
    process, processes = cli.parse_share(args)
    cli.check_dtype(args.dtype)
    values = {field.name: getattr(args, field.name) for field in fields(Job)}
    values["size"] = None if args.size is None else cli.parse_size(args.size)
    if args.prompt_file is not None:
        values["prompt"] = read_prompt(args.prompt_file)
    colorizer = Colorizer(args.weights, args.dtype, args.mesh, args.offload, args.devices, args.quantize)
    weights = str(colorizer.weights.directory)
    if args.demo:
        job, report = run_demo(values, colorizer)
    elif args.jobs is not None:
        jobs = read_jobs(args.jobs, values)
        report = colorizer.run_all(dict(list(jobs.items())[process::processes]))
        return {**report, "weights": weights}, not report["failed"]
    else:
        job = Job(**values)
        report = colorizer.run(job, colorizer.read(job))
    print(*filter(None, (job.out, job.comparison)), sep="\n")
    return {**report, "weights": weights}, True


if __name__ == "__main__":
    cli.main(run, Arguments)
