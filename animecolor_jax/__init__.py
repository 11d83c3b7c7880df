"""AnimeColor-JAX: reference-based animation colourisation in JAX.

import jax, animecolor_jax as ac

ac.convert_checkpoint("AnimeColor/", "weights/")
pipeline = ac.Pipeline.load("weights/")
sketch, reference = ac.read_video("sketch.mp4"), ac.read_image("reference.png")
video = pipeline(sketch.frames, reference, prompt="...", key=jax.random.key(43))
ac.write_video("out.mp4", video, fps=sketch.fps)
"""

import importlib

# Public names and where they live. They are imported on first use: drawing a clip or reading a config
# needs no
# JAX, and a computer without PyAV can still run the networks.
_PUBLIC = {
    "AnimeColorConfig": "config",
    "InputError": "errors",
    "Noise": "pipeline",
    "Pipeline": "pipeline",
    "Video": "media",
    "Weights": "weights",
    "convert_checkpoint": "convert.checkpoint",
    "export_checkpoint": "convert.export",
    "make_mesh": "sharding",
    "preset": "config",
    "read_image": "media",
    "read_video": "media",
    "write_video": "media_writing",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
