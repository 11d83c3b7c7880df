"""What tools/colorize.py does: files in, files out, around `Pipeline`."""

import contextlib
import csv
import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from animecolor_jax import canvas, media, safetensors_io, sharding
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NEGATIVE_PROMPT, Noise, Pipeline
from animecolor_jax.toon_clip import draw_toon_clip
from animecolor_jax.weights import write_initial


@dataclass(frozen=True)
class Job:
    """One clip to colour; paths and numbers as on the command line, sizes HEIGHTxWIDTH parsed."""

    sketch: Path
    reference: tuple[Path, ...]
    out: Path
    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    comparison: Path | None = None
    steps: int = 50
    guidance: float = 6.0
    dynamic_guidance: bool = False
    seed: int = 43
    sampler: str = "ddim"
    size: tuple[int, int] | None = None
    fps: float | None = None
    invert: str = "auto"
    window: int = 49
    overlap: int = 16
    noise: Path | None = None
    strict_reference: bool = False


class Inputs:
    """A job's files, read and checked; nothing long has happened yet.

    Raises:
        InputError: a file that cannot be used, or an output that could not be written.
    """

    def __init__(self, job):
        for path in filter(None, (job.out, job.comparison)):
            media.check_output(path)
        if not job.reference:
            raise InputError("no reference image", where="--reference", expected="one or more images")
        if job.fps is not None and not 0 < job.fps <= 1000:
            raise InputError(f"{job.fps}", where="--fps", expected="frames per second, above 0")
        if not 0 <= job.guidance < float("inf"):
            raise InputError(f"{job.guidance}", where="--guidance", expected="a number, 1 for no guidance")
        clip = media.read_video(job.sketch)
        self.fps = job.fps or clip.fps
        frames, inverted = canvas.normalise_polarity(clip.frames, job.invert)
        if inverted and job.invert == "auto":
            print(f"{job.sketch}: light lines on dark; inverted (--invert no to keep)", file=sys.stderr)
        if job.size is not None:
            frames = canvas.resize_video_bilinear(frames, job.size)
        self.sketch = frames
        self.references = [media.read_image(path) for path in job.reference]
        self.noise = None if job.noise is None else read_noise(job.noise)


def colorize(pipeline, job, inputs, progress=None):
    """Colours one clip and writes its files.

    Returns:
        {"out", "frames", "height", "width", "seconds", "seconds_per_step"}.
    """
    began = time.perf_counter()
    video = pipeline(
        inputs.sketch, inputs.references, prompt=job.prompt, negative_prompt=job.negative_prompt,
        num_steps=job.steps, guidance_scale=job.guidance, dynamic_guidance=job.dynamic_guidance,
        sampler=job.sampler, key=jax.random.key(job.seed), noise=inputs.noise, window=job.window,
        overlap=job.overlap, strict_reference=job.strict_reference, progress=progress,
    )
    media.write_video(job.out, video, inputs.fps)
    if job.comparison is not None:
        stills = [image[None] for image in inputs.references]
        media.write_video(job.comparison, media.side_by_side([inputs.sketch, *stills, video]), inputs.fps)
    return {
        "out": str(job.out),
        "frames": len(video), "height": video.shape[1], "width": video.shape[2],
        "seconds": round(time.perf_counter() - began, 3),
        "seconds_per_step": round(pipeline.seconds["denoise"] / job.steps, 4),
    }


def read_noise(path):
    """Noise recorded from the reference implementation.

    Args:
        path: safetensors with `ref_noise` (K, C, 1, h, w) and `init_latents` (1, F, C, h, w).

    Raises:
        InputError: another file, or other tensors in it.
    """
    with safetensors_io.Reader(path) as reader:
        shapes = {name: len(spec.shape) for name, spec in reader.specs.items()}
        if any(shapes.get(name) != 5 for name in ("ref_noise", "init_latents")):
            raise InputError(
                f"holds {sorted(shapes)}", where=path,
                expected="ref_noise (K, C, 1, h, w) and init_latents (1, F, C, h, w)",
                fix="save both tensors under these names",
            )
        reference, latents = reader.read("ref_noise"), reader.read("init_latents")
    return Noise(reference.transpose(0, 2, 3, 4, 1), latents[0].transpose(0, 2, 3, 1))


def read_jobs(path, template):
    """Jobs of a CSV file with a header; columns are fields of `Job`, empty cells take the command line's value.

    Args:
        template: dict of the values that the command line gives.

    Raises:
        InputError: unknown columns, or rows without sketch, reference or out.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("does not exist", where=path, expected="a CSV file with columns sketch, reference, out")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    fields = {field.name: field for field in dataclasses.fields(Job)}
    jobs = []
    for number, row in enumerate(rows, start=2):
        unknown = sorted(str(name) for name in row if name not in _COLUMNS)
        missing = [name for name in ("sketch", "reference", "out") if not row.get(name)]
        if unknown or missing:
            raise InputError(
                f"unknown columns {unknown}, missing values {missing}", where=f"{path}, line {number}",
                expected=f"sketch, reference and out, and any of {', '.join(_COLUMNS[3:])}",
                fix="several references in one cell are separated by ;",
            )
        values = dict(template)
        for name, text in row.items():
            if text:
                try:
                    values[name] = _COLUMN_TYPES.get(name, str)(text)
                except ValueError as error:
                    raise InputError(
                        f"{name} is {text!r}", where=f"{path}, line {number}", expected="a number"
                    ) from error
        jobs.append(Job(**{name: values[name] for name in fields if name in values}))
    if not jobs:
        raise InputError("has no rows", where=path, expected="one clip a row")
    outs = [job.out for job in jobs]
    if double := {str(out) for out in outs if outs.count(out) > 1}:
        raise InputError(f"writes {sorted(double)} more than once", where=path, expected="one out for each row")
    return jobs


def _paths(text):
    return tuple(Path(part) for part in text.split(";"))


_COLUMN_TYPES = {
    "sketch": Path, "out": Path, "comparison": Path, "reference": _paths, "seed": int, "steps": int, "guidance": float,
    "fps": float,
}
_COLUMNS = ("sketch", "reference", "out", "prompt", "negative_prompt", "comparison", "seed", "steps", "guidance", "fps",
            "invert")


@contextlib.contextmanager
def open_pipeline(weights, *, dtype=None, mesh=None, demo=False):
    """The pipeline of a weights directory, or for the demo of freshly made `tiny` weights."""
    placed = None if not mesh else sharding.make_mesh(**sharding.parse_mesh(mesh))
    if not demo:
        yield Pipeline.load(weights, dtype=dtype, mesh=placed)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_initial(Path(folder) / "tiny", preset("tiny"), seed=0)
        yield Pipeline.load(Path(folder) / "tiny", dtype=dtype, mesh=placed)


def write_demo_inputs(folder):
    """Draws the demo's sketch clip and reference into `folder`; returns their paths."""
    clip = draw_toon_clip()
    sketch, reference = Path(folder) / "sketch.mkv", Path(folder) / "reference"
    media.write_video(sketch, clip.sketch, fps=12)
    media.write_video(reference, clip.reference[None], fps=12)
    return sketch, next(reference.iterdir())
