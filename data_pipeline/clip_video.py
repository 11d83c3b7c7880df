"""The encoded video of a record: H.264 of a bucket's size with frequent keyframes, or PNG of one image."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.media import SCALING, frame_to_rgb


@dataclass(frozen=True)
class ClipEncoding:
    """How clips are stored."""

    crf: int = 14
    """Quality of H.264, 0 (lossless) to 51; 14 is visually lossless on line art."""
    preset: str = "medium"
    """x264 preset: slower ones make smaller files."""
    keyframe_interval: int = 24
    """Frames between keyframes; a window is decoded from the keyframe before it."""
    chroma: str = "420"
    """420 halves the colour's resolution, as nearly every source does; 444 keeps it, at more bytes, for clips
    that were never compressed."""

    def __post_init__(self):
        if not (0 <= self.crf <= 51 and self.keyframe_interval >= 1 and self.chroma in ("420", "444")):
            raise InputError(
                f"crf {self.crf}, a keyframe every {self.keyframe_interval} frames, chroma {self.chroma}",
                where="encoding",
                expected="crf from 0 to 51, keyframe_interval 1 or more, chroma 420 or 444",
            )


def encode(frames, fps, encoding):
    """Encodes a clip; the same frames give the same bytes on one version of PyAV.

    Args:
        frames: iterable of [H, W, 3] uint8 RGB, H and W even.
        fps: frames a second.

    Returns:
        Bytes of an MP4 (H.264, BT.709, limited range).
    """
    file = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    options = {"crf": str(encoding.crf), "preset": encoding.preset, "g": str(encoding.keyframe_interval)}
    # Macroblock-tree rate control reads uninitialised memory in x264: bytes would differ from run to run. It
    # also spends its bits on the frames that others refer to, where training draws all frames alike.
    options["x264-params"] = "mbtree=0"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = f"yuv{encoding.chroma}p"
        context = stream.codec_context
        context.thread_count = 1  # one clip a core; and the bytes do not depend on the machine's cores
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format=stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def encode_image(pixels):
    """[H, W, 3] uint8 RGB -> bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def decode(data, indices, where="record"):
    """Chosen frames of a stored clip; only the frames from the keyframe before the first are decoded.

    Args:
        data: bytes that `encode` or `encode_image` made.
        indices: frame numbers in any order, repeats allowed.

    Returns:
        [len(indices), H, W, 3] uint8 RGB.

    Raises:
        InputError: the clip has no such frame, or its bytes are damaged.
    """
    if data[:4] == b"\x89PNG":
        frames = {0: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))}
    else:
        frames = _decode_video(data, set(indices), where)
    missing = sorted(set(indices) - set(frames))
    if missing:
        raise InputError(f"has no frame {missing[0]}", where=where, expected="frames of the clip")
    return np.stack([frames[index] for index in indices])


def _decode_video(data, wanted, where):
    frames = {}
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # workers are processes; threads inside would only contend
            ticks = 1 / (stream.average_rate * stream.time_base)
            if min(wanted) > 0:
                container.seek(int(min(wanted) * ticks), stream=stream)
            for frame in container.decode(stream):
                index = round(frame.pts / ticks)
                if index in wanted:
                    frames[index] = frame_to_rgb(frame, where)
                    if len(frames) == len(wanted):
                        break
    except av.FFmpegError as error:
        raise InputError(f"is damaged: {error}", where=where, expected="a clip as it was stored") from error
    return frames
