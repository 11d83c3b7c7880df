"""Held-out clips side by side, as every row of the table colours them: a moving picture and a still one."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from animecolor_jax.replacing import replacing

ENLARGED = 2  # pixels are repeated, so that frames of 64x96 can be seen
GAP = 4  # pixels between pictures
HEADER = 14  # pixels above the columns, for their names


def draw_frame(videos, clips, numbers, frame, names):
    """One frame of some clips.

    Args:
        videos: {row: [N, T, H, W, 3] uint8}. clips: Clips. numbers: of the clips, each a line.
        frame: its number. names: {row: what its column is called}.

    Returns:
        [h, w, 3] uint8: line art, reference, the rows, and the truth.
    """
    columns = {
        "line art": np.repeat(clips.sketch[numbers, frame][..., None], 3, axis=-1),
        "reference": clips.color[numbers, 0],
        **{names[row]: video[numbers, frame] for row, video in videos.items()},
        "truth": clips.color[numbers, frame],
    }
    height, width = clips.sketch.shape[2:]
    tall, wide = ENLARGED * height + GAP, ENLARGED * width + GAP
    image = Image.new("RGB", (wide * len(columns), HEADER + tall * len(numbers)), "white")
    for place, (name, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(image).text((place * wide, 1), name, fill="black")
        for line, picture in enumerate(pictures):
            large = picture.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
            image.paste(Image.fromarray(large), (place * wide, HEADER + line * tall))
    return image


def write_pictures(folder, videos, clips, numbers, names, fps):
    """FOLDER/clips.png, the last frame, and FOLDER/clips.gif, all frames; arguments as of `draw_frame`."""
    count = clips.sketch.shape[1]
    frames = [draw_frame(videos, clips, numbers, frame, names) for frame in range(count)]
    with replacing(Path(folder) / "clips.png") as partial:
        frames[-1].save(partial)
    # without dithering, which would make a large file of flat colours
    first, *rest = (frame.quantize(256, dither=Image.Dither.NONE) for frame in frames)
    with replacing(Path(folder) / "clips.gif") as partial:
        first.save(partial, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
