"""Subtitles drawn into frames, to try detectors of on-screen text on."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from animecolor_jax.errors import InputError

STYLES = ("white", "yellow", "boxed", "shadowed")
_FILL = {
    "white": (255, 255, 255),
    "yellow": (255, 224, 60),
    "boxed": (245, 245, 245),
    "shadowed": (255, 255, 255),
}


def draw_subtitle(frames, text, rng, font=None):
    """Draws a line of text, one of the usual styles and sizes, over a clip.

    Text that does not fit the width is broken into lines, and shrunk if even a word does not.

    Args:
        frames: [T, H, W, 3] uint8.
        text: the words; Latin letters, unless `font` has others.
        rng: NumPy generator; chooses style, size and place (at the lower edge, sometimes at the upper).
        font: path of a TrueType font; default: the one that Pillow brings along.

    Returns:
        [T, H, W, 3] uint8, a copy.

    Raises:
        InputError: no text, or a font that cannot be read.
    """
    if not text.strip():
        raise InputError("is empty", where="text", expected="words to draw")
    _, height, width, _ = frames.shape
    style = STYLES[int(rng.integers(len(STYLES)))]
    size = max(7.0, rng.uniform(0.055, 0.085) * height)
    at_top = rng.random() < 0.15
    margin = rng.uniform(0.03, 0.07) * height
    face = _font(font, size)
    while size > 5 and max(map(face.getlength, text.split())) > 0.92 * width:
        size *= 0.9
        face = _font(font, size)
    lines = _broken(text, face, 0.92 * width)
    picture, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    paint, cover = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    y = margin if at_top else height - margin - 1.2 * size * len(lines)
    for line in lines:
        x = 0.5 * (width - face.getlength(line))
        _draw_line(paint, cover, (x, y), line, face, size, style)
        y += 1.2 * size
    share = np.asarray(mask, np.float32)[..., None] / 255
    ink = np.asarray(picture, np.float32)
    return (frames * (1 - share) + ink * share + 0.5).astype(np.uint8)


def _font(path, size):
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=path, expected="a TrueType font") from error


def _broken(text, face, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_line(paint, cover, place, line, face, size, style):
    x, y = place
    edge = max(1, round(size / 11))
    if style == "boxed":
        box = (x - 0.3 * size, y, x + face.getlength(line) + 0.3 * size, y + 1.2 * size)
        paint.rectangle(box, (20, 20, 20))
        cover.rectangle(box, 200)
    elif style == "shadowed":
        paint.text((x + edge, y + edge), line, (10, 10, 10), face)
        cover.text((x + edge, y + edge), line, 255, face)
    stroke = edge if style in ("white", "yellow") else 0
    paint.text(place, line, _FILL[style], face, stroke_width=stroke, stroke_fill=(10, 10, 10))
    cover.text(place, line, 255, face, stroke_width=stroke, stroke_fill=255)
