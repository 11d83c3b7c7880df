"""Drawn clips for the tests of curation: every seed is another picture, painted or as line art."""

from types import SimpleNamespace

import av
import cv2
import numpy as np

HEIGHT, WIDTH = 144, 256


def cartoon(seed=0, count=17, *, line_art=False, height=HEIGHT, width=WIDTH, recolor=None):
    """[T, H, W, 3] uint8 RGB: shapes at rest and a figure that walks; `recolor` seeds other colours."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, 1, (14, 2))
    sizes, kinds, start = rng.uniform(0.06, 0.22, (14, 2)), rng.integers(0, 2, 14), rng.uniform(0.25, 0.6, 2)
    colors = np.random.default_rng(seed if recolor is None else 1000 + recolor).integers(40, 250, (20, 3))
    frames = []
    for index in range(count):
        canvas = np.full((height, width, 3), 255 if line_art else colors[-1], np.uint8)

        def shape(kind, center, size, color, canvas=canvas):
            x, y = round(center[0] * width), round(center[1] * height)
            rx, ry = max(2, round(size[0] * height)), max(2, round(size[1] * height))
            for fill, thickness in (([255] * 3 if line_art else color.tolist(), -1), ([30, 25, 35], 1)):
                if kind:
                    cv2.ellipse(canvas, (x, y), (rx, ry), 0, 0, 360, fill, thickness, cv2.LINE_AA)
                else:
                    cv2.rectangle(canvas, (x - rx, y - ry), (x + rx, y + ry), fill, thickness)

        for kind, place, size, color in zip(kinds, places, sizes, colors, strict=False):
            shape(kind, place, size, color)
        walk = start + [0.006 * index, 0.02 * np.sin(0.8 * index)]
        shape(1, walk, (0.16, 0.2), colors[15])
        shape(1, walk - [0, 0.28], (0.12, 0.12), colors[16])
        shape(1, walk + [0.08, 0.1 * np.sin(index)], (0.1, 0.05), colors[17])
        frames.append(canvas)
    return np.stack(frames)


def stream(frames, fps=24.0):
    """What `open_video` gives, of frames that are there."""
    return SimpleNamespace(frames=iter(frames), fps=fps)


def encoded(frames, quality):
    """The frames after H.264 at CRF `quality`."""
    height, width = frames.shape[1:3]
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.framerate = width, height, "yuv420p", 24
    encoder.options = {"crf": str(quality)}
    decoder, shown = av.CodecContext.create("h264", "r"), []
    pictures = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames]
    for index, picture in enumerate(pictures):
        picture.pts = index
    for packet in [packet for picture in [*pictures, None] for packet in encoder.encode(picture)] + [None]:
        shown += decoder.decode(packet)
    return np.stack([picture.to_ndarray(format="rgb24") for picture in shown])


def resized(frames, height, width):
    """[T, height, width, 3]."""
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])
