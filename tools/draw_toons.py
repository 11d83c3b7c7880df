"""Draws a folder of cartoon clips with captions, to try tools/prepare_data.py on.

python tools/draw_toons.py --out toons/ --clips 100
python tools/draw_toons.py --out toons/ --clips 100 --size 480x848 --frames 49 --sketch toon_lines/
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.media_writing import check_output, write_video
from data_pipeline.toon import ToonConfig, draw_clip


@dataclass
class Arguments:
    """Draw cartoon clips: toonSEED.mp4, its caption in toonSEED.txt. Clips that are there are skipped."""

    out: Path
    """Folder to write to."""
    clips: int = 100
    """How many."""
    size: str = "320x512"
    """HEIGHTxWIDTH in pixels."""
    frames: int = 49
    """Frames of a clip."""
    fps: float = 24.0
    """Frames a second."""
    seed: int = 0
    """Seed of the first clip; the others follow."""
    sketch: Path | None = None
    """Another folder, for the line art: toonSEED.mkv (lossless). Not inside --out, or it would be taken for
    clips."""
    max_characters: int = ToonConfig.max_characters
    """A clip shows one to this many."""
    motion: float = ToonConfig.motion
    """Scales speed and reach of all motion."""
    late_entry: float = ToonConfig.late_entry
    """Probability that a character after the first comes in only after the first frame."""
    lighting: float = ToonConfig.lighting
    """Probability that the light changes."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Writes the clips that are missing."""
    height, width = cli.parse_size(args.size)
    for name, least in (("clips", 1), ("frames", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"{getattr(args, name)}", where=f"--{name}", expected=f"{least} or more")
    config = ToonConfig(
        max_characters=args.max_characters, motion=args.motion, late_entry=args.late_entry,
        lighting=args.lighting,
    )
    digits = max(5, len(str(args.seed + args.clips - 1)))
    check_output(args.out / "toon.mp4")
    if args.sketch is not None:
        check_output(args.sketch / "toon.mkv")
        if args.out.resolve() in (args.sketch.resolve(), *args.sketch.resolve().parents):
            raise InputError(
                f"{args.sketch} lies in --out", where="--sketch", expected="a folder of its own",
                fix=f"for example {args.out}_lines",
            )
    drawn = skipped = 0
    for seed in tqdm(range(args.seed, args.seed + args.clips), unit="clip", disable=not sys.stderr.isatty()):
        name = f"toon{seed:0{digits}}"
        caption = args.out / f"{name}.txt"
        sketch = None if args.sketch is None else args.sketch / f"{name}.mkv"
        if caption.exists() and (sketch is None or sketch.exists()):  # the caption is written last
            skipped += 1
            continue
        clip = draw_clip(args.frames, height, width, seed, fps=args.fps, config=config)
        write_video(caption.with_suffix(".mp4"), clip.color, args.fps)
        if sketch is not None:
            write_video(sketch, clip.line_art, args.fps)
        caption.write_text(clip.caption + "\n", encoding="utf-8")
        drawn += 1
    print(f"{args.out}: {drawn} clips drawn, {skipped} skipped")
    return {"out": str(args.out), "drawn": drawn, "skipped": skipped}, True


if __name__ == "__main__":
    cli.main(run, Arguments)
