"""What `tools/colorize.py --demo` colours: a cartoon drawn on the spot, of the weights' favourite size."""

import tempfile
from pathlib import Path

from animecolor_jax import media_writing
from animecolor_jax.colorize import Job
from animecolor_jax.mini.recipe import ClipsConfig
from data_pipeline.toon import draw_clip

SEED = 9_000_031  # test clips have the seeds from 9 000 000 on: no model of ours is trained on them
FPS = 8
SHAPE = (17, (96, 160))  # frames and size, for weights that do not say what they were trained on


def run_demo(values, colorizer):
    """Colours a clip that is drawn on the spot, of the size and length that the weights were trained on.

    Args:
        values: fields of `Job`; sketch and reference are set here, out and comparison unless they are given.

    Returns:
        The job and what `Colorizer.run` returns.
    """
    out = values["out"] or Path("demo.mp4")
    comparison = values["comparison"] or out.with_name(f"{out.stem}_comparison{out.suffix}")
    inference = colorizer.weights.inference
    frames, size = SHAPE if inference.size is None else (inference.window, inference.size)
    drawn = ClipsConfig()  # as the bundled weights were trained on; shown slower
    clip = draw_clip(frames, *size, seed=SEED, fps=drawn.fps, config=drawn.toon)
    with tempfile.TemporaryDirectory() as folder:
        sketch, references = Path(folder, "sketch.mkv"), Path(folder, "references")
        media_writing.write_video(sketch, clip.line_art, fps=FPS)
        media_writing.write_video(references, clip.reference[None], fps=FPS)
        paths = {"sketch": sketch, "reference": tuple(references.iterdir())}
        job = Job(**{**values, **paths, "out": out, "comparison": comparison})
        return job, colorizer.run(job, colorizer.read(job)._replace(truth=clip.color))
