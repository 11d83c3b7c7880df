"""What tools/colorize.py does: files in, files out, around `Pipeline`."""

import csv
import io
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from animecolor_jax import canvas, denoise, media, media_writing, safetensors_io, sharding, weights
from animecolor_jax.config import CONFIG_CLASSES
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NEGATIVE_PROMPT, Noise, NonFiniteError, Pipeline, make_plan
from animecolor_jax.quantization import check_mode
from animecolor_jax.tokenizer import Tokenizer

VISIBLE_HEIGHT = 256  # of a side-by-side that shows the truth, at least
AREA_RATIO = 1.5  # colours suffer where frames are this much larger or smaller than those trained on


@dataclass(frozen=True)
class Job:
    """One clip to colour; paths and numbers as on the command line, sizes (height, width).

    Of `weights.Inference`, what is None is as the weights say.
    """

    sketch: Path
    reference: tuple[Path, ...]
    out: Path
    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    comparison: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    dynamic_guidance: bool = False
    seed: int = 43
    sampler: str = "ddim"
    size: tuple[int, int] | None = None
    fps: float | None = None
    invert: str = "auto"
    window: int | None = None
    overlap: int | None = None
    noise: Path | None = None
    strict_reference: bool = False
    step_cache: float = 0.0

    def completed(self, inference):
        """The job with every number that is None taken from `inference`, the weights' own."""
        names = ("steps", "guidance", "window", "overlap")
        return replace(self, **inference.filled(**{name: getattr(self, name) for name in names}))

    def options(self):
        """What `make_plan` and `Pipeline` are called with, beside arrays."""
        return {
            "prompt": self.prompt, "negative_prompt": self.negative_prompt, "num_steps": self.steps,
            "guidance_scale": self.guidance, "sampler": self.sampler, "window": self.window,
            "overlap": self.overlap, "strict_reference": self.strict_reference,
        }


class Inputs(NamedTuple):
    """A job's files, read.

    Attributes:
        sketch: [T, H, W, 3] uint8, dark lines on white; references: list of [H, W, 3] uint8.
        fps: frames a second of the result.
        inverted: whether the sketch was light on dark.
        noise: `Noise` or None.
        truth: the coloured clip, [T, H, W, 3] uint8, if the sketch was made from one.
    """

    sketch: np.ndarray
    references: list[np.ndarray]
    fps: float
    inverted: bool
    noise: Noise | None
    truth: np.ndarray | None = None


class Colorizer:
    """Colours jobs with the networks of a weights directory, which are loaded after all checks.

    Args:
        directory: of the weights; None for those that come with the package.

    Raises:
        InputError: no weights directory, one that lacks a network, a mesh or number of devices that are not
            there; see `quantization.check_mode`.
    """

    def __init__(self, directory=None, dtype=None, mesh="", offload="auto", devices=1, quantize=None):
        check_mode(quantize)
        self.devices = _devices(devices, mesh)
        self.mesh = sharding.make_mesh(**sharding.parse_mesh(mesh)) if mesh else None
        self.is_bundled = directory is None
        self.weights = weights.Weights(_bundled() if directory is None else directory)
        self.dtype, self.offload, self.quantize = dtype, offload, quantize
        self.weights.require(*CONFIG_CLASSES)
        self.tokenizer = Tokenizer.load(self.weights.directory / "tokenizer")
        self.pipeline = None

    def load(self):
        """Loads the networks, once; InputError if they are damaged."""
        if self.pipeline is None:
            if self.is_bundled:
                print(_describe(self.weights), file=sys.stderr)
            self.pipeline = Pipeline.load(
                self.weights.directory, dtype=self.dtype, mesh=self.mesh, offload=self.offload,
                quantize=self.quantize,
            )

    def read(self, job):
        """Reads a job's files and checks all that can be known without the networks.

        Raises:
            InputError: a file that cannot be used, an output that could not be written, an impossible number.
        """
        inputs = _read_inputs(job)
        try:
            make_plan(
                self.weights.config, self.tokenizer, inputs.sketch, inputs.references, noise=inputs.noise,
                **job.completed(self.weights.inference).options(),
            )
        except InputError as error:
            raise _moved(error, _FLAGS.get(error.where, error.where)) from error
        return inputs

    def run(self, job, inputs, progress=None, pipeline=None):
        """Colours one clip and writes its files.

        Args:
            pipeline: by default the one of `load`.

        Returns:
            {"out", "frames", "height", "width", "seconds", "seconds_per_step"}.
        """
        if inputs.inverted and job.invert == "auto":
            print(f"{job.sketch}: light lines on dark; inverted (--invert no to keep)", file=sys.stderr)
        if advice := _size_advice(job, inputs.sketch.shape[1:3], self.weights.inference.size):
            print(advice, file=sys.stderr)
        self.load()
        pipeline, job = pipeline or self.pipeline, job.completed(self.weights.inference)
        began = time.perf_counter()
        video = pipeline(
            inputs.sketch, inputs.references, noise=inputs.noise, dynamic_guidance=job.dynamic_guidance,
            key=jax.random.key(job.seed), step_cache=job.step_cache, progress=progress, **job.options(),
        )
        if job.comparison is not None:  # first, so that where `out` is, nothing is missing
            media_writing.write_video(job.comparison, _comparison(inputs, video), inputs.fps)
        media_writing.write_video(job.out, video, inputs.fps)
        return {
            "out": str(job.out),
            "frames": len(video), "height": video.shape[1], "width": video.shape[2],
            "seconds": round(time.perf_counter() - began, 3),
            "seconds_per_step": round(pipeline.seconds["denoise"] / job.steps, 4),
        }

    def run_all(self, jobs):
        """Colours the jobs whose output is not there yet; one that fails does not stop the others.

        Args:
            jobs: from `read_jobs`.

        Returns:
            {"clips": reports of `run`, "skipped": outputs that were there, "failed": {output: why}}.

        Raises:
            InputError: a job that cannot be run, before the first one is; damaged weights.
        """
        todo = {where: job for where, job in jobs.items() if not _is_there(job.out)}
        skipped = [str(job.out) for where, job in jobs.items() if where not in todo]
        for where, job in todo.items():  # read again later: together they may not fit into memory
            try:
                self.read(job)
            except InputError as error:
                raise _moved(error, f"{where}: {error.where}") from error
        done, failed = [], {}
        with tqdm(total=len(todo), desc="clips", disable=not sys.stderr.isatty()) as bar:
            for job, result in self._run_each(list(todo.values())):
                if isinstance(result, Exception):
                    failed[str(job.out)] = str(result)
                    print(f"error: {job.out}: {result}", file=sys.stderr)
                else:
                    done.append(result)
                    print(job.out, flush=True)
                bar.update()
        return {"clips": done, "skipped": skipped, "failed": failed}

    def _run_each(self, jobs):
        """Yields (job, report of `run` or why it failed) as they finish, a clip on each device at a time."""
        if not jobs:
            return
        self.load()  # damaged weights fail all jobs alike
        others = self.devices[1 : len(jobs)]
        idle = queue.SimpleQueue()
        for pipeline in (self.pipeline, *(self.pipeline.copy_to(device) for device in others)):
            idle.put(pipeline)

        def run(job):
            pipeline = idle.get()
            try:
                return job, self.run(job, self.read(job), progress=False, pipeline=pipeline)
            except (InputError, NonFiniteError, OSError, jax.errors.JaxRuntimeError) as error:
                return job, error
            finally:
                idle.put(pipeline)

        if not others:
            yield from map(run, jobs)
            return
        with ThreadPoolExecutor(1 + len(others)) as pool:
            running = [pool.submit(run, job) for job in jobs]
            try:
                yield from (each.result() for each in as_completed(running))
            except BaseException:  # Ctrl-C: clips that have begun are finished
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _devices(count, mesh):
    """The first `count` devices, of which each colours a clip."""
    there = jax.local_devices()
    if not 1 <= count <= len(there):
        raise InputError(
            f"{count}", where="--devices", expected=f"1 to {len(there)}, the devices of this computer"
        )
    if count > 1 and mesh:
        raise InputError(
            f"{count} with --mesh {mesh}", where="--devices", expected="one of the two",
            fix="--devices for a clip on each device, --mesh for one clip on all",
        )
    return there[:count]


def _bundled():
    """The bundled weights; InputError if the package came without."""
    if not weights.BUNDLED.is_dir():
        raise InputError(
            "the weights that come with the package are missing", where=weights.BUNDLED,
            expected="a complete installation", fix="install the package again, or give --weights",
        )
    return weights.BUNDLED


def _describe(bundled):
    """What the bundled weights are, in one line."""
    size, frames = bundled.inference.size, bundled.inference.window
    trained = "" if size is None else f" of {size[0]}x{size[1]} pixels, {frames} frames"
    return (
        f"bundled weights ({bundled.config.preset}): small, trained on drawn cartoons{trained}; "
        "--weights for others"
    )


def _size_advice(job, size, trained):
    """A line about frames of `size` that are far from the area of the size `trained`, else None."""
    if trained is None or job.strict_reference:  # the reference then sets the size
        return None
    area = trained[0] * trained[1]
    if 1 / AREA_RATIO <= size[0] * size[1] / area <= AREA_RATIO:
        return None
    height, width = canvas.size_of_area(*size, area)
    return (
        f"{job.sketch}: {size[0]}x{size[1]}, but the weights were trained at {trained[0]}x{trained[1]} and "
        f"colour best near that: --size {height}x{width}"
    )


# ---------------------------------------------------------------- flags and files


_FLAGS = {  # of what `make_plan` complains about by the name of its argument
    "num_steps": "--steps", "guidance_scale": "--guidance", "sampler": "--sampler", "prompt": "--prompt",
}
_NEEDED = {
    "sketch": ("the line art: a video, a folder of frames, or an image", "see --help, or try --demo"),
    "reference": ("one or more coloured images", "for example --reference front.png back.png"),
    "out": ("where to write the result", "for example --out colored.mp4"),
}


def check_flags(args):
    """Raises InputError for a flag that is missing, or that has no meaning beside another."""
    mode = "--demo" if args.demo else "--jobs" if args.jobs is not None else None
    needed, refused = {
        None: (("sketch", "reference", "out"), ()),
        "--demo": ((), ("sketch", "reference", "jobs")),
        "--jobs": ((), ("sketch", "reference", "out", "comparison")),
    }[mode]
    for name in needed:
        if not getattr(args, name):
            expected, fix = _NEEDED[name]
            raise InputError("is missing", where=f"--{name}", expected=expected, fix=fix)
    for name in ("devices", "num_processes"):
        if getattr(args, name) > 1 and mode != "--jobs":
            raise InputError(
                f"{getattr(args, name)}", where=f"--{name.replace('_', '-')}", expected="1 without --jobs",
                fix="--mesh shares one clip",
            )
    clashes = [(f"--{name}", mode) for name in refused if getattr(args, name)]
    clashes += [("--prompt", "--prompt-file")] if args.prompt and args.prompt_file is not None else []
    clashes += [("--size", "--strict-reference")] if args.size is not None and args.strict_reference else []
    for flag, other in clashes:
        raise InputError(
            f"is given together with {other}, which leaves it no effect", where=flag,
            expected="one of the two", fix=f"leave out {flag} or {other}",
        )


def read_prompt(path):
    """The text of a prompt file; InputError if it is missing or not UTF-8."""
    return _read_text(path).strip()


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {error}", where=path, expected="a UTF-8 text file", fix="save it again as UTF-8"
        ) from error


def _read_inputs(job):
    _check_outputs(job)
    if not 0 <= job.seed < 2**32:
        raise InputError(
            f"{job.seed}", where="--seed", expected=f"a whole number from 0 to {2**32 - 1}",
            fix="for example --seed 43",
        )
    denoise.check_step_cache(job.step_cache, job.sampler)
    if job.fps is not None and not 0 < job.fps <= 1000:
        raise InputError(
            f"{job.fps}", where="--fps", expected="frames a second, above 0 and at most 1000",
            fix="leave it out to keep the sketch's",
        )
    clip = media.read_video(job.sketch)
    sketch, inverted = canvas.normalise_polarity(clip.frames, job.invert)
    if job.size is not None:
        sketch = np.stack([canvas.resize_exact(frame, job.size) for frame in sketch])
    references = [media.read_image(path) for path in job.reference]
    noise = None if job.noise is None else read_noise(job.noise)
    return Inputs(sketch, references, job.fps or clip.fps, inverted, noise)


def _check_outputs(job):
    for path in filter(None, (job.out, job.comparison)):
        if path.name in ("", ".."):
            raise InputError(
                "names no file", where=path, expected="a file or a new folder", fix="for example colored.mp4"
            )
        media_writing.check_output(path)
        for source in filter(None, (job.sketch, *job.reference, job.noise)):
            if _holds(path, source):
                raise InputError(
                    f"would replace the input {source}", where=path, expected="a name of its own",
                    fix="choose another name",
                )
    if job.comparison is not None and (_holds(job.out, job.comparison) or _holds(job.comparison, job.out)):
        raise InputError(
            f"{job.comparison} and --out {job.out} are in each other's place", where="--comparison",
            expected="two names", fix="choose another name",
        )


def _holds(path, other):
    """Whether replacing `path` replaces `other`."""
    path, other = path.resolve(), other.resolve()
    return path == other or path in other.parents


def _is_there(out):
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _comparison(inputs, video):
    """Sketch, references and result side by side; with --strict-reference the lengths may differ a little.

    Where the truth is known it comes last, and pixels are repeated until they can be seen.
    """
    shown = np.minimum(np.arange(len(video)), len(inputs.sketch) - 1)
    stills = (image[None] for image in inputs.references)
    truth = [] if inputs.truth is None else [inputs.truth[shown]]
    frames = media_writing.side_by_side([inputs.sketch[shown], *stills, video, *truth])
    scale = 1 if inputs.truth is None else -(-VISIBLE_HEIGHT // frames.shape[1])
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _moved(error, where):
    """The same error, elsewhere."""
    return InputError(error.what, where=where, expected=error.expected, fix=error.fix)


def read_noise(path):
    """Noise recorded from the reference implementation.

    Args:
        path: safetensors with `ref_noise` (K, C, 1, h, w) and `init_latents` (1, F, C, h, w).

    Raises:
        InputError: another file, or other tensors in it.
    """
    if not Path(path).is_file():
        raise InputError(
            "is no file", where=path, expected="a safetensors file with ref_noise and init_latents",
            fix="tools/record_reference.py writes one",
        )
    with safetensors_io.Reader(path) as reader:
        shapes = {name: tuple(spec.shape) for name, spec in reader.specs.items()}
        reference, latents = shapes.get("ref_noise", ()), shapes.get("init_latents", ())
        if len(reference) != 5 or len(latents) != 5 or reference[2] != 1 or latents[0] != 1:
            raise InputError(
                f"holds {shapes}", where=path,
                expected="ref_noise (K, C, 1, h, w) and init_latents (1, F, C, h, w)",
                fix="save both tensors under these names, in these layouts",
            )
        reference, latents = reader.read("ref_noise"), reader.read("init_latents")
    return Noise(reference.transpose(0, 2, 3, 4, 1), latents[0].transpose(0, 2, 3, 1))


# ---------------------------------------------------------------- --jobs


def _paths(text):
    return tuple(Path(part.strip()) for part in text.split(";"))


_COLUMNS = {
    "sketch": Path, "reference": _paths, "out": Path, "prompt": str, "negative_prompt": str,
    "comparison": Path, "seed": int, "steps": int, "guidance": float, "fps": float, "invert": str,
}
_REQUIRED_COLUMNS = ("sketch", "reference", "out")


def read_jobs(path, template):
    """Jobs of a CSV file whose columns are fields of `Job`; empty cells take the command line's value.

    Paths are relative to the working directory.

    Args:
        template: dict of the values that the command line gives.

    Returns:
        {"FILE, line N": Job}.

    Raises:
        InputError: not such a file; unknown, double or missing columns; a missing or malformed value; two
            rows that write the same file.
    """
    reader = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
    try:
        rows = {f"{path}, line {reader.line_num}": row for row in reader}
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}", where=path, expected="a CSV file") from error
    columns = reader.fieldnames or []
    wrong = sorted({name for name in columns if name not in _COLUMNS or columns.count(name) > 1})
    wrong += [f"no {name}" for name in _REQUIRED_COLUMNS if name not in columns]
    if wrong or not rows:
        raise InputError(
            f"columns: {', '.join(wrong)}" if wrong else "has no rows", where=path,
            expected=f"columns sketch, reference, out and any of {', '.join(list(_COLUMNS)[3:])}; then rows",
            fix="several references go into one cell, separated by ;",
        )
    jobs, writers = {}, {}
    for where, row in rows.items():
        job = jobs[where] = _parse_row(row, where, template)
        for output in filter(None, (job.out, job.comparison)):
            other = writers.setdefault(output.resolve(), where)
            if other != where:
                raise InputError(
                    f"writes {output}, and so does {other}", where=where, expected="a name of its own",
                    fix="give each row another out and comparison",
                )
    return jobs


def _parse_row(row, where, template):
    values = dict(template)
    for name, text in row.items():
        if name is None or text is None:
            raise InputError(
                f"has {'more' if name is None else 'fewer'} cells than the header", where=where,
                expected="one cell for each column", fix='put quotes around cells with commas: "a, b"',
            )
        if not text and name in _REQUIRED_COLUMNS:
            raise InputError(f"{name} is empty", where=where, expected="a path", fix="fill it in")
        if text:
            try:
                values[name] = _COLUMNS[name](text)
            except ValueError as error:
                raise InputError(
                    f"{name} is {text!r}", where=where, expected="a number", fix="correct or empty the cell"
                ) from error
    return Job(**values)
