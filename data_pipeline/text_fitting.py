"""Drawn clips with and without writing, to fit the text detector to and to measure it on.

"toon" clips are cartoons as data_pipeline.toon draws them, and half of their subtitles are draw_subtitle's.
"adversarial" clips hold what is easily taken for writing (fences, windows, grass ...), closer cameras, noise
and compression, and subtitles of more kinds, smaller and anywhere.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from animecolor_jax.errors import InputError
from data_pipeline.toon import draw_clip, draw_subtitle

KINDS = ("toon", "adversarial")
FRAMES, FPS = 6, 4
FINE = 4  # letters are drawn this many times larger

_TALK = (
    "Why are you so late? I said wait, please stop! We never believe what our teacher won't say about magic "
    "swords. It's time to listen carefully, everyone: look out over there! The cherry blossoms can't return "
    "before next spring... Hey brother, run home; nothing was my fault in the end. Tomorrow, sister?"
)
_SHORT = ("Hey!", "Wait!", "What?", "Stop it!", "No way!")
_KANA = [chr(code) for start in (0x3042, 0x30A2) for code in range(start, start + 76)]
_HAN = list(
    "世界你好我的是不了在人有他这中大来上国和地到以说时要就出会可也对生能子那得于着下自之年过发后作里用道行所然家"
    "种事成方多经么去法学如都同现当没动面起看定天分还进小部其些主样理心她本前开但因只从想实日意无力它与长把机十"
)
_STYLES = {
    "outline": 0.35, "yellow": 0.15, "plain": 0.12, "box": 0.14, "color_outline": 0.12, "dark": 0.06,
    "shadow": 0.06,
}  # fmt: skip
_UNSEEN_ON_PAPER = ("plain", "shadow")


@dataclass(frozen=True)
class TextClip:
    """A clip, and where its writing is.

    Attributes:
        frames: [T, H, W, 3] uint8 RGB.
        box: left, top, right, bottom of the writing in pixels; None without any.
        shown: [T] bool, in which frames it is there.
    """

    frames: np.ndarray
    box: tuple | None
    shown: np.ndarray


def draw_text_clip(kind, seed, with_text, size=None, fonts=()):
    """Draws a clip of FRAMES frames; the same arguments give the same pixels.

    Args:
        kind: one of KINDS.
        seed: of scene, writing and the rest.
        with_text: whether to write into it.
        size: (height, width) in pixels; by default one of several, 180 to 320 lines.
        fonts: paths of TrueType fonts for Latin letters, besides those that Pillow and OpenCV bring along.

    Returns:
        `TextClip`.

    Raises:
        InputError: OpenCV is older than 5, and has no font with Chinese and Japanese characters.
    """
    if not hasattr(cv2, "FontFace"):
        raise InputError(
            f"is {cv2.__version__}", where="OpenCV", expected="5.0 or later, for its fonts",
            fix="pip install 'opencv-python-headless>=5'",
        )  # fmt: skip
    rng = np.random.default_rng([seed, 2 + KINDS.index(kind)])
    adversarial = kind == "adversarial"
    if size is None:
        height = int(rng.choice([180, 216, 240, 270, 288, 320] if adversarial else [180, 240, 270]))
        size = height, round(height * (rng.choice([16 / 9, 16 / 9, 4 / 3, 1.5]) if adversarial else 16 / 9))
    on_paper = rng.random() < (0.15 if adversarial else 0.2)
    frames = _scene(rng, seed, size, on_paper, rng.choice([1, 1, 1.4, 2, 2.6]) if adversarial else 1)
    if adversarial:
        frames = _with_patterns(frames, rng, on_paper)
        frames = _compressed(frames, rng)
        if rng.random() < 0.2:
            frames = np.clip(frames + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
    if not with_text:
        return TextClip(frames, None, np.zeros(FRAMES, bool))
    if adversarial or rng.random() < 0.5:
        titled = draw_hard_subtitle(frames, rng, on_paper, fonts)
    else:
        titled = draw_subtitle(frames, _latin_sentence(rng), rng)
    changed = (titled != frames).any(-1)
    rows, columns = (np.flatnonzero(changed.any(axes)) for axes in ((0, 2), (0, 1)))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return TextClip(_compressed(titled, rng) if adversarial else titled, box, changed.any((1, 2)))


def _scene(rng, seed, size, on_paper, zoom):
    """A cartoon, or its line art; with `zoom` a part of it, as from a camera that is closer and pans."""
    height, width = size
    clip = draw_clip(FRAMES, int(height * zoom), int(width * zoom), seed=seed, fps=FPS)
    frames = clip.line_art if on_paper else clip.color
    if zoom == 1:
        return frames
    top = int(rng.integers(frames.shape[1] - height + 1))
    left = int(rng.integers(frames.shape[2] - width + 1))
    lefts = left + np.arange(FRAMES) * rng.choice([0, 0, 2, -3]) * height / 270
    lefts = np.clip(lefts, 0, frames.shape[2] - width).astype(int)
    parts = [frame[top : top + height, x : x + width] for frame, x in zip(frames, lefts, strict=True)]
    return np.stack(parts)


def _compressed(frames, rng):
    """Half of the time as after a JPEG of some quality."""
    if rng.random() < 0.5:
        return frames
    flags = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))]
    return np.stack([cv2.imdecode(cv2.imencode(".jpg", frame, flags)[1], 1) for frame in frames])


# ---------------------------------------------------------------- subtitles


def _latin_sentence(rng):
    low, high = ((1, 3), (3, 8), (8, 14))[rng.choice(3, p=[0.27, 0.46, 0.27])]
    text = " ".join(rng.choice(_TALK.split(), rng.integers(low, high)))
    if len(text) < 4:
        return str(rng.choice(_SHORT))
    text = text[0].upper() + text[1:] + rng.choice([".", "!", "?", "...", ""])
    return text.upper() if rng.random() < 0.07 else text


def draw_hard_subtitle(frames, rng, on_paper=False, fonts=()):
    """Writes a line or two of Latin, Chinese or Japanese: more styles, sizes and places than draw_subtitle's.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        rng: NumPy generator.
        on_paper: the frames are line art: white letters without an edge are left out.
        fonts: as for `draw_text_clip`.

    Returns:
        [T, H, W, 3] uint8, a copy; the writing is there in half of the frames or more.
    """
    num_frames, height, width, _ = frames.shape
    size = max(7, round(height * rng.uniform(0.035, 0.1)))
    letters = _letters(rng, size, width, fonts)
    layers = _layers(letters, size, rng, on_paper)
    shape = layers[0][0].shape
    x, y = ((side - part) // 2 for side, part in ((width, shape[1]), (height, shape[0])))
    if rng.random() > 0.75:
        x = int(rng.integers(width - shape[1] + 1))
    if rng.random() < 0.75:
        y = max(0, int(height * rng.uniform(0.97, 1)) - shape[0])
    else:
        y = int(rng.integers(height - shape[0] + 1))
    first, last = 0, num_frames
    if rng.random() < 0.3:
        length = int(rng.integers((num_frames + 1) // 2, num_frames + 1))
        first = int(rng.integers(num_frames - length + 1))
        last = first + length
    part = np.s_[first:last, y : y + shape[0], x : x + shape[1]]
    drawn = frames.copy()
    region = drawn[part].astype(np.float32)
    for cover, color in layers:
        region += (np.float32(color) - region) * cover[..., None]
    drawn[part] = np.rint(region)
    return drawn


def _letters(rng, size, width, fonts):
    """The lines' letters [H, W] uint8, FINE times as large and with a margin; they fit a frame of `width`."""
    asian = rng.random() < 0.25
    if asian:
        words, space = list(rng.choice(_KANA if rng.random() < 0.5 else _HAN, rng.integers(2, 14))), ""
    else:
        words, space = _latin_sentence(rng).split(), " "
    most = max(4, int(0.9 * width / (size if asian else 0.58 * size)))
    lines = [""]
    for word in words:
        longer = lines[-1] + (space if lines[-1] else "") + word
        if lines[-1] and len(longer) > most:
            lines.append(word)
        else:
            lines[-1] = longer
    draw = _typeface(rng, asian, size * FINE, fonts)
    parts = []
    for line in lines[:2]:
        row = draw(line)
        inked = np.flatnonzero(row.max(0))
        parts.append(row[:, inked[0] : inked[-1] + 1])
    wide = max(part.shape[1] for part in parts)
    sides = [(wide - part.shape[1]) // 2 for part in parts]
    padded = [
        np.pad(part, ((0, 0), (side, wide - part.shape[1] - side)))
        for part, side in zip(parts, sides, strict=True)
    ]
    letters = np.concatenate(padded)
    inked = np.flatnonzero(letters.max(1))
    letters = np.pad(letters[inked[0] : inked[-1] + 1], 3 * size * FINE // 8)[:, : int(0.97 * width) * FINE]
    return letters[: letters.shape[0] // FINE * FINE, : letters.shape[1] // FINE * FINE]


def _typeface(rng, asian, size, fonts):
    """Function of a line -> [H, W] uint8, letters `size` pixels high."""

    def by_opencv(line, *font):
        canvas = np.zeros((int(1.5 * size), size * (len(line) + 2)), np.uint8)
        cv2.putText(canvas, line, (size // 2, int(1.1 * size)), *font)
        return canvas

    def by_pillow(line, font):
        canvas = Image.new("L", (size * (len(line) + 2), int(1.5 * size)))
        ImageDraw.Draw(canvas).text((size // 2, size // 8), line, fill=255, font=font)
        return np.asarray(canvas)

    choice, weight = (0, 0) if asian else rng.random(2)
    name = "uni" if choice < 0.12 else str(rng.choice(["sans", "italic", "uni"]))  # uni has all scripts
    font, weight = cv2.FontFace(name), int(300 + 400 * weight)
    if choice < 0.12:
        return lambda line: by_opencv(line, 255, font, size, weight)
    if choice < 0.22:
        faces = cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX
        face = int(rng.choice(faces))
        return lambda line: by_opencv(line, face, size / 34, 255, max(1, size // 12))
    if choice < 0.5:
        return lambda line: by_pillow(line, ImageFont.load_default(size))
    if fonts:
        path = str(fonts[rng.integers(len(fonts))])
        return lambda line: by_pillow(line, ImageFont.truetype(path, size))
    return lambda line: by_opencv(line, 255, font, size, weight)


def _layers(letters, size, rng, on_paper):
    """What is painted, lowest first: pairs of cover [H, W] float32 in [0, 1] and RGB colour."""
    chances = {name: p for name, p in _STYLES.items() if not (on_paper and name in _UNSEEN_ON_PAPER)}
    style = rng.choice(list(chances), p=np.array(list(chances.values())) / sum(chances.values()))
    white = (255, 255, 255) if rng.random() < 0.7 else tuple(rng.integers(225, 256, 3))
    yellow = (255, rng.integers(210, 256), rng.integers(90))
    fill = {"yellow": yellow, "dark": (20, 20, 25)}.get(style, white)
    if style in ("plain", "box") and rng.random() < 0.35:
        fill = yellow
    size *= FINE
    layers = []
    if style in ("outline", "yellow", "color_outline"):
        edge = 2 * max(1, round(size * rng.uniform(0.05, 0.11))) + 1
        outline = cv2.dilate(letters, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (edge, edge)))
        layers.append((outline, tuple(rng.integers(140, size=3)) if style == "color_outline" else (0, 0, 0)))
    elif style == "shadow":
        layers.append((np.roll(letters, (size // 14, size // 14), (0, 1)), (0, 0, 0)))
    elif style == "box":
        inset = 3 * size // 16
        box = np.zeros_like(letters)
        box[inset:-inset, inset:-inset] = 255 * rng.choice([1, 0.75, 0.6])
        layers.append((box, (0, 0, 0)))
    small = letters.shape[1] // FINE, letters.shape[0] // FINE
    return [
        (cv2.resize(cover, small, interpolation=cv2.INTER_AREA).astype(np.float32) / 255, color)
        for cover, color in [*layers, (letters, fill)]
    ]


# ---------------------------------------------------------------- what is easily taken for writing


@dataclass(frozen=True)
class _Paint:
    """RGBA colours, opaque, and a line's width in pixels."""

    main: tuple
    dark: tuple
    light: tuple
    line: int

    def block(self, layer, left, top, width, height, fill, edged=True):
        corners = (int(left), int(top)), (int(left + width), int(top + height))
        cv2.rectangle(layer, *corners, fill, -1)
        if edged:
            cv2.rectangle(layer, *corners, self.dark, self.line, cv2.LINE_AA)


def _with_patterns(frames, rng, on_paper):
    """Draws one or two patterns over the frames, still or passing by."""
    if on_paper and rng.random() < 0.5:
        return frames
    num_frames, height, width, _ = frames.shape
    shift = int(rng.choice([0, 0, 1, 3, -4, 9]))  # pixels per frame
    for _ in range(1 + (rng.random() < 0.3)):
        choice = int(rng.integers(len(_PATTERNS) + 1))
        if choice == len(_PATTERNS):
            continue
        # Drawn over nothing, edges are smoothed towards 0 in all four channels: premultiplied alpha.
        layer = np.zeros((height, 2 * width, 4), np.uint8)
        main, light = rng.integers(256, size=3), rng.integers(180, 256, 3)
        colors = [(*(int(v) for v in color), 255) for color in (main, 0.45 * main, light)]
        top, paint = int(height * rng.uniform(0.1, 0.85)), _Paint(*colors, max(1, height // 200))
        _PATTERNS[choice](layer, rng, top, paint)
        lefts = (np.arange(num_frames) * shift) % width
        passing = np.stack([layer[:, x : x + width] for x in lefts])
        share = passing[..., 3:].astype(np.float32) / 255
        frames = np.minimum(frames * (1 - share) + passing[..., :3] + 0.5, 255).astype(np.uint8)
    return frames


def _fence(layer, rng, top, paint):
    height, length = layer.shape[:2]
    tall, step = height * rng.uniform(0.06, 0.3), int(height * rng.uniform(0.03, 0.09)) + 2
    wide = max(2, int(step * rng.uniform(0.3, 0.7)))
    for x in range(0, length, step):
        paint.block(layer, x, top, wide, tall, paint.main)
    if rng.random() < 0.7:
        for share in (0.25, 0.7):
            paint.block(layer, 0, top + tall * share, length, max(1, wide // 2), paint.main, edged=False)


def _windows(layer, rng, top, paint):
    height, length = layer.shape[:2]
    tall = int(height * rng.uniform(0.3, 0.8))
    top = int(rng.integers(height - tall // 2))
    paint.block(layer, 0, top, length, tall, paint.main, edged=False)
    wide = int(height * rng.uniform(0.025, 0.1))
    high = int(wide * rng.uniform(0.8, 1.8))
    step_x, step_y = int(wide * rng.uniform(1.4, 2.2)), int(high * rng.uniform(1.4, 2.2))
    lit = rng.choice([0.3, 0.7, 1])
    for y in range(top + step_y // 3, top + tall - high, step_y):
        for x in range(0, length, step_x):
            paint.block(layer, x, y, wide, high, paint.light if rng.random() < lit else paint.dark)
            if rng.random() < 0.5:
                cv2.line(layer, (x + wide // 2, y), (x + wide // 2, y + high), paint.dark, paint.line)


def _bricks(layer, rng, top, paint):
    height, length = layer.shape[:2]
    tall, high = int(height * rng.uniform(0.2, 0.6)), max(4, int(height * rng.uniform(0.02, 0.06)))
    paint.block(layer, 0, top, length, tall, paint.main, edged=False)
    for row, y in enumerate(range(top, top + tall, high)):
        cv2.line(layer, (0, y), (length, y), paint.dark, paint.line)
        for x in range(row % 2 * high, length, 2 * high):
            cv2.line(layer, (x, y), (x, y + high), paint.dark, paint.line)


def _grass(layer, rng, top, paint):
    height, length = layer.shape[:2]
    for _ in range(int(rng.integers(40, 300))):
        x, y = int(rng.integers(length)), int(top + rng.normal() * 0.02 * height)
        blade = height * rng.uniform(0.02, 0.07)
        tip = int(x + rng.normal() * 0.4 * blade), int(y - blade)
        cv2.line(layer, (x, y), tip, paint.dark, int(rng.integers(1, 3)), cv2.LINE_AA)


def _hair(layer, rng, top, paint):
    height, length = layer.shape[:2]
    left, phase = rng.uniform(0, length / 2), rng.uniform(0, 6)
    for strand in range(int(rng.integers(8, 30))):
        y = np.linspace(top, top + height * rng.uniform(0.2, 0.5), 20)
        x = left + strand * height * rng.uniform(0.01, 0.03) + 0.03 * height * np.sin(8 * y / height + phase)
        color = paint.light if rng.random() < 0.2 else paint.dark
        line = np.stack([x, y], 1).astype(np.int32)[None]
        cv2.polylines(layer, line, False, color, int(rng.integers(1, 3)), cv2.LINE_AA)


def _stripes(layer, rng, top, paint):
    """Upright or slanted stripes, or the slats of a blind."""
    height, length = layer.shape[:2]
    tall, step = int(height * rng.uniform(0.1, 0.4)), max(4, int(height * rng.uniform(0.015, 0.06)))
    paint.block(layer, 0, top, length, tall, paint.main, edged=False)
    if rng.random() < 0.5:
        lines = [((0, y), (length, y)) for y in range(top, top + tall, step)]
    else:
        slant = int(tall * rng.choice([0, 0.3]))
        lines = [((x, top), (x + slant, top + tall)) for x in range(0, length, step)]
    for line in lines:
        cv2.line(layer, *line, paint.light, max(1, step // 3))


def _beads(layer, rng, top, paint):
    height, length = layer.shape[:2]
    radius = max(2, int(height * rng.uniform(0.012, 0.045)))
    sway = rng.choice([0, 0, 0.03]) * height
    for x in range(0, length, int(radius * rng.uniform(2.2, 4))):
        center = x, int(top + sway * np.sin(3 * x / height))
        cv2.circle(layer, center, radius, paint.light, -1)
        cv2.circle(layer, center, radius, paint.dark, paint.line, cv2.LINE_AA)


def _leaves(layer, rng, top, paint):
    height, length = layer.shape[:2]
    for _ in range(int(rng.integers(40, 250))):
        y = np.clip(top + rng.normal() * 0.12 * height, 0, height - 1)
        center = float(rng.integers(length)), float(y)
        long = 2 * height * rng.uniform(0.012, 0.035)
        leaf = center, (long, long * rng.uniform(0.3, 0.6)), rng.uniform(0, 180)
        cv2.ellipse(layer, leaf, paint.light if rng.random() < 0.3 else paint.main, -1)
        cv2.ellipse(layer, leaf, paint.dark, paint.line)


_PATTERNS = (_fence, _windows, _bricks, _grass, _hair, _stripes, _beads, _leaves)
