"""Drawn clips as arrays on disk, so that every slice of the recipe sees the same pixels at once."""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from animecolor_jax.replacing import replacing
from data_pipeline.toon import draw_clip

SPLITS = ("train", "validation", "test", "swap")
OTHER_PALETTE = 1_000_000  # what is added to a test clip's seed for the palette of its twin in "swap"


class Clips(NamedTuple):
    """Clips of one split.

    Attributes:
        color: [N, T, H, W, 3] uint8. sketch: [N, T, H, W] uint8, 255 paper and 0 line.
        captions: N texts.
    """

    color: np.ndarray
    sketch: np.ndarray
    captions: list[str]

    def first(self, count):
        """The first `count` clips."""
        return Clips(self.color[:count], self.sketch[:count], self.captions[:count])


def draw_split(folder, config, split, size):
    """The clips of a split, drawn now unless they are in `folder` already. "swap" holds the clips of "test"
    in other colours.

    Args:
        config: ClipsConfig. split: one of `SPLITS`. size: (height, width) in pixels.
    """
    folder = Path(folder) / split
    if not folder.exists():
        with replacing(folder) as partial_folder:
            partial_folder.mkdir()
            _draw(partial_folder, config, split, size)
    color, sketch = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("color", "sketch"))
    return Clips(color, sketch, json.loads((folder / "captions.json").read_text(encoding="utf-8")))


def _draw(folder, config, split, size):
    source = "test" if split == "swap" else split
    count, first = getattr(config, source), getattr(config, f"{source}_seed")
    toon = config.toon if split == "train" else config.test_toon
    shape = (count, config.frames, *size)
    color = np.lib.format.open_memmap(folder / "color.npy", "w+", np.uint8, (*shape, 3))
    sketch = np.lib.format.open_memmap(folder / "sketch.npy", "w+", np.uint8, shape)
    captions = []
    draw = partial(
        _draw_one, size=size, frames=config.frames, fps=config.fps, toon=toon, swapped=split == "swap"
    )
    # spawned: a process forked from one in which JAX runs can hang
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        drawn = pool.map(draw, range(first, first + count), chunksize=16)
        bar = tqdm(drawn, desc=f"draw {split}", total=count, disable=not sys.stderr.isatty())
        for number, (frames, lines, caption) in enumerate(bar):
            color[number], sketch[number] = frames, lines
            captions.append(caption)
    color.flush()
    sketch.flush()
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def _draw_one(seed, *, size, frames, fps, toon, swapped):
    palette_seed = seed + OTHER_PALETTE if swapped else None
    clip = draw_clip(frames, *size, seed, palette_seed, fps=fps, config=toon)
    return clip.color, clip.sketch, clip.caption
