"""Writes clips as videos or folders of PNGs, and lays them side by side.

Writing is atomic: a name appears only when all of the file is there.
"""

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.media import SCALING
from animecolor_jax.replacing import replacing


@dataclass(frozen=True)
class _Encoding:
    codec: str
    pixel_format: str
    options: dict = field(default_factory=dict)
    container_options: dict = field(default_factory=dict)


_ENCODINGS = {
    ".mp4": _Encoding("libx264", "yuv420p", {"crf": "15", "preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": _Encoding("libvpx-vp9", "yuv420p", {"crf": "18", "b": "0", "row-mt": "1"}),
    ".gif": _Encoding("gif", "pal8"),
    ".mkv": _Encoding("ffv1", "bgr0", {"level": "3", "slicecrc": "1"}),
}
_FRAME_NAME = re.compile(r"\d{5,}\.png")


def check_output(path):
    """Checks, before any long work, that `write_video` can write to `path`.

    Raises:
        InputError: the suffix names no format, its encoder is missing, the parent folder cannot be
            made or written to, or the name is taken by a folder with other contents.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in _ENCODINGS:
        raise InputError(
            f"unknown video format {suffix!r}",
            where=path,
            expected=f"one of {' '.join(_ENCODINGS)}, or a name without suffix for a folder of PNGs",
        )
    if suffix:
        codec = _ENCODINGS[suffix].codec
        try:
            av.codec.Codec(codec, "w")
        except ValueError as error:  # av.codec.codec.UnknownCodecError
            raise InputError(
                f"the encoder {codec!r} for {suffix} is missing",
                where=path,
                expected="PyAV with that encoder",
                fix="install PyAV from PyPI (pip install av), or write .mkv or a folder of PNGs",
            ) from error
    if path.is_dir():
        others = sorted(name for name in os.listdir(path) if not _FRAME_NAME.fullmatch(name))
        if suffix or others:
            raise InputError(
                f"is a folder that holds {others[0]!r}" if others else "is a folder",
                where=path,
                expected="a new name" if suffix else "a new name, or a folder of nothing but our frames",
                fix="choose another name",
            )
    elif path.exists() and not suffix:
        raise InputError("is a file", where=path, expected="a folder for PNGs, or a name with a video suffix")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            "the folder cannot be written to" if folder.is_dir() else f"{folder} is not a folder",
            where=path,
            expected="a folder that exists or can be made, with write permission",
        )


def write_video(path, frames, fps):
    """Writes a clip; the suffix names the format.

    `.mp4` H.264, `.webm` VP9, `.gif`, `.mkv` FFV1 (lossless RGB), none: a folder of PNGs (lossless,
    `00000.png` ...). MP4 and WebM are 4:2:0, limited range, BT.709, and tagged so. H.264 counts 4:2:0
    frames in whole chroma samples, so an MP4 with an odd side is 4:4:4 instead: its size stays exact, but
    Safari and Firefox do not play it. Missing parent folders are made; an existing file is replaced,
    and only once the new one is complete.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        fps: frames a second; 23.976 and the like mean 24000/1001.

    Raises:
        InputError: as `check_output` does, or `fps` is no positive number.
        ValueError: `frames` is not [T, H, W, 3] uint8 with at least one frame and pixel.
        OSError: the disk is full, or the like; nothing is left under the final name.
    """
    path = Path(path)
    check_output(path)
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{fps} frames a second", where="fps", expected="a positive number")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3], none of them 0"
        )
    with replacing(path) as partial:
        if path.suffix:
            _encode(partial, frames, _exact_rate(fps), _ENCODINGS[path.suffix.lower()])
        else:
            partial.mkdir()
            for index, frame in enumerate(frames):
                Image.fromarray(frame).save(partial / f"{index:05d}.png")


def _exact_rate(fps):
    """fps as a fraction; within 0.02% of n * 1000/1001 (NTSC) it is that."""
    ntsc = Fraction(max(1, round(fps * 1.001)) * 1000, 1001)
    if abs(fps / ntsc - 1) < 2e-4:
        return ntsc
    return Fraction(fps).limit_denominator(1001) or Fraction(1, 1001)


def _encode(path, frames, rate, encoding):
    _, height, width, _ = frames.shape
    pixel_format = encoding.pixel_format
    if encoding.codec == "libx264" and (height % 2 or width % 2):
        pixel_format = "yuv444p"
    is_yuv = pixel_format.startswith("yuv")
    palette = _shared_palette(frames) if pixel_format == "pal8" else None
    with av.open(f"file:{path}", "w", options=encoding.container_options) as container:
        stream = container.add_stream(encoding.codec, rate=rate, options=encoding.options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if is_yuv:
            context = stream.codec_context
            context.color_range = ColorRange.MPEG
            context.colorspace = Colorspace.ITU709
            context.color_primaries = ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
        for index, pixels in enumerate(frames):
            if palette is not None:
                frame = _palette_frame(pixels, palette)
            else:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                    format=pixel_format,
                    dst_colorspace=Colorspace.ITU709 if is_yuv else None,
                    dst_color_range=ColorRange.MPEG if is_yuv else None,
                    interpolation=SCALING,
                )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _shared_palette(frames):
    """One palette of 256 colours for all frames, so that flat areas do not flicker."""
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: -(-len(pixels) // 2_000_000)]
    return Image.fromarray(pixels[None]).quantize(256, method=Image.Quantize.MEDIANCUT)


def _palette_frame(pixels, palette):
    indices = np.asarray(Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE))
    colors = np.array(palette.getpalette("RGB"), np.uint8).reshape(-1, 3)
    argb = np.full((256, 4), 255, np.uint8)
    argb[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((indices, argb), format="pal8")


def side_by_side(videos):
    """Clips next to each other, such as sketch, reference and result.

    Args:
        videos: arrays [T, H, W, 3] uint8; one with a single frame is held for the whole clip, and other
            heights are scaled (bicubic, aspect kept) to that of the first.

    Returns:
        [T, H, W', 3] uint8 with the first one's H.

    Raises:
        ValueError: two of them have different numbers of frames, neither of them 1.
    """
    lengths = {len(video) for video in videos} - {1}
    if len(lengths) > 1:
        raise ValueError(f"videos have {[len(video) for video in videos]} frames, expected one number (or 1)")
    length, height = max(lengths, default=1), videos[0].shape[1]
    columns = []
    for video in videos:
        if video.shape[1] != height:
            width = max(1, round(video.shape[2] * height / video.shape[1]))
            resized = [
                Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in video
            ]
            video = np.stack(resized)
        columns.append(np.broadcast_to(video, (length, *video.shape[1:])))
    return np.concatenate(columns, axis=2)
