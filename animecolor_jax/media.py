"""Videos, folders of frames and images as uint8 RGB arrays; `media_writing` is the way back.

Reading turns whatever a studio hands over (alpha, rotation tags, 16 bit, palettes, any colour matrix)
into plain [T, H, W, 3] RGB, or refuses with an `InputError`; nothing is dropped or repaired silently.
"""

import contextlib
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image, UnidentifiedImageError

from animecolor_jax.errors import InputError

DEFAULT_FPS = 24.0  # of whatever has no clock of its own: images and folders of frames
IMAGE_SUFFIXES = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".tga", ".ppm", ".pgm"]
    + [".pbm", ".pnm", ".avif"]
)

# Recognised by their first bytes. TGA has none to go by, so it needs its suffix.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_MULTI_FRAME = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")  # not MPO: its second picture is a preview

# Containers that hold the frames themselves. FFmpeg's other demuxers follow playlists to other files
# and addresses, or draw text files as video.
_CONTAINERS = (
    "mov,matroska,avi,asf,flv,mpegts,mpeg,mpegvideo,m4v,mxf,nut,ogg,ivf,yuv4mpegpipe,h264,hevc,mjpeg"
)
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
# tags that are not UTF-8 are no reason to refuse a video; PyAV 19 never does, and takes no such argument
_TAG_ERRORS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Bilinear chroma with exact rounding: swscale's defaults are off by up to 3 levels on flat colours.
SCALING = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
# ITU-T H.273 matrix coefficients -> swscale's.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_FORBIDDEN_IN_NAL = re.compile(rb"\0\0[\0-\2]")
_UNTAGGED = (0, 2, 3)  # 0 is RGB, which a YUV frame cannot be

# How stored pixels become upright ones: (transpose, then flip up-down, then flip left-right).
_EXIF_ORIENTATION = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Video:
    """A clip: frames [T, H, W, 3] uint8 RGB at `fps` frames a second (the average, if it varies)."""

    frames: np.ndarray
    fps: float


class VideoStream:
    """A clip that is decoded while it is iterated over.

    Attributes:
        frames: iterator of [H, W, 3] uint8 RGB, upright, all of one size. Damage raises InputError where it
            is met, a missing end only there.
        fps: frames a second; the file's own statement until all frames are read, then the true average.
    """

    def __init__(self, fps=DEFAULT_FPS):
        self.fps = fps
        self.frames = iter(())


@contextlib.contextmanager
def open_video(path):
    """Opens what `read_video` reads, to be read frame by frame: memory does not grow with its length.

    Yields:
        `VideoStream`.

    Raises:
        InputError: as `read_video`; what only decoding shows is raised by `frames`.
    """
    path = _existing(path)
    image = None if path.is_dir() else _open_image(path)
    stream = VideoStream()
    if path.is_dir():
        stream.frames = _folder_frames(path)
        yield stream
    elif image is not None:
        with image:
            stream.frames = _animation_frames(image, path, stream)
            yield stream
    else:
        with _open_container(path) as container:
            video = _video_stream(container, path)
            stream.fps = float(_stated_rate(video))
            stream.frames = _container_frames(container, video, path, stream)
            yield stream


def read_video(path):
    """Reads a video file, a folder of frames, or an image (one frame, or all of an animated one).

    A folder is read in natural order (`frame10` after `frame9`); hidden files and files that are not
    images are passed over. Alpha is composited over white; rotation tags are applied; every decoded
    frame is kept, in presentation order. YUV is converted with the matrix and range that the file is
    tagged with; untagged video is limited range, BT.601 up to 576 lines and BT.709 above, as players do
    (untagged grey is full range).

    Returns:
        `Video`.

    Raises:
        InputError: the path is missing or empty, holds no video or image, is truncated or damaged, or
            its frames differ in size.
    """
    with open_video(path) as stream:
        frames = np.stack(list(stream.frames))
        return Video(frames, stream.fps)


def read_image(path):
    """Reads an image (of an animated one, the first frame) as [H, W, 3] uint8 RGB.

    Alpha is composited over white and the EXIF orientation applied.

    Raises:
        InputError: the path is missing, empty, no image, or truncated.
    """
    path = _existing(path)
    image = None if path.is_dir() else _open_image(path)
    if image is None:
        raise InputError(
            "is a folder" if path.is_dir() else "is not an image",
            where=path,
            expected="one image: png, jpg, webp, bmp, tiff, tga ...",
        )
    with image:
        return _pillow_frame(image, 0, path)


def _existing(path):
    path = Path(path)
    if not path.exists():
        raise InputError("does not exist", where=path, expected="a video, an image or a folder of frames")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(
            "is empty (0 bytes)", where=path, expected="a video or an image", fix="copy it again"
        )
    if not path.is_file() and not path.is_dir():
        raise InputError(
            "is neither a file nor a folder", where=path, expected="a video, an image or a folder"
        )
    return path


def _natural_key(path):
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def _folder_frames(folder):
    visible = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    paths = sorted((path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES), key=_natural_key)
    if not paths:
        raise InputError(
            f"holds no frames ({len(visible)} other files)" if visible else "is an empty folder",
            where=folder,
            expected="numbered images, such as 00000.png, 00001.png ...",
        )
    first = None
    for index, path in enumerate(paths):
        frame = read_image(path)
        first = frame.shape if first is None else first
        _check_size(frame, index, first, path, f"the size of {paths[0].name}")
        yield frame


def _check_size(frame, index, first, where, whose):
    if frame.shape != first:
        (height, width), (first_height, first_width) = frame.shape[:2], first[:2]
        raise InputError(
            f"frame {index} is {height}x{width} (height x width)",
            where=where,
            expected=f"{first_height}x{first_width}, {whose}",
            fix="bring all frames to one size, or remove the odd one",
        )


# ---------------------------------------------------------------- images, by Pillow


def _open_image(path):
    """The image at `path`, opened but not decoded; None where it could yet be a video."""
    suffix = path.suffix.lower()
    try:
        return Image.open(path, formats=(*_IMAGE_FORMATS, "TGA") if suffix == ".tga" else _IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        if suffix in IMAGE_SUFFIXES:
            raise _damaged(path, f"is not a readable {suffix} image", error) from error
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(path, "cannot be opened", error) from error


def _damaged(path, what, error=None):
    return InputError(
        f"{what} ({error})" if error else what,
        where=path,
        expected="a complete, undamaged file",
        fix="copy or export it again; check that it opens in another program",
    )


def _animation_frames(image, path, stream):
    """All frames of an image; the rate comes from their durations."""
    if image.format == "GIF" and path.read_bytes().rstrip(b"\0\r\n ")[-1:] != b";":
        raise _damaged(path, "is a truncated GIF: its end marker is missing")  # Pillow would not notice
    try:
        count = image.n_frames if image.format in _MULTI_FRAME else 1
    except Exception as error:
        raise _damaged(path, "cannot be decoded", error) from error
    first, seconds = None, 0.0
    for index in range(count):
        frame = _pillow_frame(image, index, path)
        first = frame.shape if first is None else first
        _check_size(frame, index, first, path, "the size of the first")
        duration = image.info.get("duration", 0) / 1000
        seconds += duration if duration > 0.01 else 0.1  # browsers' rule for frames without one
        yield frame
    if count > 1 and "duration" in image.info:
        stream.fps = count / seconds


def _pillow_frame(image, index, path):
    """Frame `index` of an open image as [H, W, 3] uint8, upright and over white."""
    try:
        image.seek(index)
        image.load()
        rgb = _image_to_rgb(image, path)
        orientation = image.getexif().get(0x0112, 1)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise _damaged(path, "cannot be decoded", error) from error
    return _orient(rgb, _EXIF_ORIENTATION.get(orientation, _EXIF_ORIENTATION[1]))


def _image_to_rgb(image, path):
    if image.format == "PNG" and getattr(image, "n_frames", 1) == 1 and _png_bit_depth(path) == 16:
        return _over_white(_decode_png16(path))
    if image.mode.startswith("I"):  # 16-bit grey
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError("has 32-bit pixels", where=path, expected="8 or 16 bits a channel")
        return np.repeat(_to_uint8(levels, 65535)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise InputError("has floating-point pixels", where=path, expected="8 or 16 bits a channel")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # have no alpha, and no direct way to RGBA
        return np.array(image.convert("RGB"))
    return _over_white(np.asarray(image.convert("RGBA")))


def _png_bit_depth(path):
    with path.open("rb") as file:
        return file.read(25)[24]


def _decode_png16(path):
    """[H, W, 4] uint16. By FFmpeg, because Pillow keeps only the high byte of 16-bit colour."""
    decoder = av.CodecContext.create("png", "r")
    frame = [*decoder.decode(av.Packet(path.read_bytes())), *decoder.decode(None)][0]
    return frame.to_ndarray(format="rgba64le")


def _over_white(rgba):
    """[..., 4] uint8 or uint16 with straight alpha -> [..., 3] uint8 on a white ground."""
    peak = np.iinfo(rgba.dtype).max
    alpha = rgba[..., 3:].astype(np.float32) / peak
    return _to_uint8(peak + (rgba[..., :3].astype(np.float32) - peak) * alpha, peak)


def _to_uint8(levels, peak):
    return np.rint(levels * np.float32(255 / peak)).astype(np.uint8)


def _orient(frame, steps):
    transpose, flip_rows, flip_columns = steps
    frame = frame.swapaxes(0, 1) if transpose else frame
    return frame[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


# ---------------------------------------------------------------- videos, by FFmpeg


def _open_container(path):
    try:
        # "file:" so that a colon in the name is not taken for a protocol
        return av.open(f"file:{path}", options=_OPEN_OPTIONS, **_TAG_ERRORS)
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            "cannot be opened: not a video or image, or cut off",
            where=path,
            expected="a video (mp4, mov, webm, mkv, avi ...), an image, or a folder of images",
            fix="check that the file is complete and plays in a video player",
        ) from error


def _video_stream(container, path):
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # cover art of music
            return stream
    raise InputError("holds no video stream", where=path, expected="a video or an image")


def _container_frames(container, video, path, stream):
    """All frames in presentation order; sets `stream.fps` to their true rate at the end."""
    try:
        yield from _decode(container, video, path, stream)
    except av.FFmpegError as error:
        raise _damaged(path, "stops decoding: truncated or damaged", error) from error


def _decode(container, video, path, stream):
    decoder = video.codec_context
    alpha_decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if alpha_decoder and video.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(alpha_decoder, "r")  # FFmpeg's own decoders leave the alpha out
    decoder.options = {"err_detect": "crccheck+explode"}  # damage is an error, never concealed
    # PyAV's slice threads, not frame threads: those lose the errors of the last frames

    length_bytes = _nal_length_bytes(video.codec_context)
    first, times, packets, hidden = None, [], 0, 0
    for packet in container.demux(video):
        flush = packet.size == 0 and packet.dts is None
        packets += not flush
        if length_bytes and _breaks_nal_units(bytes(packet), length_bytes):
            raise _damaged(path, f"is damaged at frame {len(times)}: bytes that H.264 and HEVC cannot hold")
        hidden += packet.is_discard  # outside the part that the edit list shows
        if packet.size == 0 and not flush:  # AVI's way to say "the same frame again"
            hidden += 1
            continue
        for frame in decoder.decode(None if flush else packet):
            if packet.is_corrupt or frame.is_corrupt:
                raise _damaged(path, f"frame {len(times)} is damaged")
            pixels = frame_to_rgb(frame, path)
            first = pixels.shape if first is None else first
            _check_size(pixels, len(times), first, path, "the size of the first")
            times.append((frame.pts, frame.duration or 0))
            yield pixels

    declared = _declared_packets(container, video, path)
    shown = packets if video.codec_context.name == "vp8" else len(times) + hidden  # VP8 has hidden packets
    if not times or shown < declared:
        raise _damaged(path, f"is truncated: {len(times)} of {declared or '?'} frames decode")
    stream.fps = _average_rate(video, times)


def _nal_length_bytes(codec):
    """Bytes of the length in front of every NAL unit of H.264 and HEVC in MP4 and Matroska; 0 elsewhere.

    Source: ISO/IEC 14496-15, the records avcC and hvcC.
    """
    place = {"h264": 4, "hevc": 21}.get(codec.name)
    header = codec.extradata
    if place is None or not header or header[0] != 1 or len(header) <= place:
        return 0
    return (header[place] & 3) + 1


def _breaks_nal_units(data, length_bytes):
    """Whether a packet holds 00 00 00, 00 00 01 or 00 00 02 inside a NAL unit, where encoders escape them.

    The zeros that an interrupted copy leaves are such. FFmpeg decodes on through them, into garbage.
    """
    position = 0
    while position + length_bytes <= len(data):
        end = position + length_bytes + int.from_bytes(data[position : position + length_bytes], "big")
        if _FORBIDDEN_IN_NAL.search(data, position + length_bytes, end):
            return True
        position = end
    return False


def _declared_packets(container, stream, path):
    """How many packets the container says the stream has; 0 where it does not say."""
    if "matroska" in container.format.name:
        blocks = _matroska_blocks(path)
        return blocks if len(container.streams) == 1 else 0
    if "mov" in container.format.name and stream.frames:
        return len(stream.index_entries)  # what is left of stream.frames after edit lists
    return stream.frames


def _matroska_blocks(path):
    """Counts the blocks of all tracks of a Matroska or WebM file.

    Raises:
        InputError: an element runs past the end of the file, is none, or fails its checksum. (FFmpeg
            passes over all of that.)
    Source: RFC 8794 (EBML) and RFC 9559 (Matroska).
    """
    segment, cluster, simple_block, block_group = 0x18538067, 0x1F43B675, 0xA3, 0xA0
    blocks, position, end = 0, 0, path.stat().st_size
    with path.open("rb") as file:
        while position < end:
            file.seek(position)
            header = file.read(12)
            id_length = 9 - header[0].bit_length()
            has_size = id_length <= 4 and id_length < len(header)
            size_length = 9 - header[id_length].bit_length() if has_size else 9
            if size_length > 8 or id_length + size_length > len(header):
                raise _damaged(path, f"is truncated or damaged at byte {position}")
            element = int.from_bytes(header[:id_length], "big")
            size = int.from_bytes(header[id_length : id_length + size_length], "big")
            size &= (1 << 7 * size_length) - 1  # without the marker bit
            unknown = size == (1 << 7 * size_length) - 1  # live streams do not know their sizes
            position += id_length + size_length
            if position + size > end and not (unknown and element in (segment, cluster)):
                raise _damaged(path, f"is truncated: {position + size - end} bytes are missing")
            blocks += element in (simple_block, block_group)
            if element == cluster and not unknown:
                file.seek(position)
                checksum = file.read(6)
                checked = checksum[:2] == b"\xbf\x84"  # a CRC-32 element comes first; WebM has none
                if checked and zlib.crc32(file.read(size - 6)) != int.from_bytes(checksum[2:], "little"):
                    raise _damaged(path, f"fails its checksum between bytes {position} and {position + size}")
            if element not in (segment, cluster):  # these two are entered, all others stepped over
                position += size
    return blocks


def _stated_rate(stream):
    return stream.average_rate or stream.guessed_rate or Fraction(DEFAULT_FPS)


def _average_rate(stream, times):
    """Frames a second over the whole clip; `times` are (start or None, duration or 0) in stream ticks."""
    stated = _stated_rate(stream)
    starts = [start for start, _ in times]
    if len(starts) < 2 or None in starts or starts[-1] <= starts[0]:
        return float(stated)
    span = starts[-1] - starts[0]
    seconds = (span + (times[-1][1] or span / (len(starts) - 1))) * stream.time_base
    # The stated rate is exact where timestamps are rounded (24000/1001 in WebM), and a guess where they vary.
    if abs(len(starts) / stated - seconds) <= 0.5 / stated:
        return float(stated)
    return float(len(starts) / seconds)


def frame_to_rgb(frame, path):
    """An FFmpeg frame as [H, W, 3] uint8 RGB, upright and over white."""
    kind = frame.format
    has_alpha = kind.has_palette or any(component.is_alpha for component in kind.components)
    matrix, full_range = frame.colorspace, frame.color_range == ColorRange.JPEG
    if kind.is_rgb or len(kind.components) < 3:  # no chroma: the matrix is idle
        matrix = Colorspace.ITU709
        full_range = kind.is_rgb or kind.has_palette or frame.color_range != ColorRange.MPEG
    elif matrix in _UNTAGGED:
        matrix = Colorspace.ITU709 if frame.height > 576 or frame.width >= 1280 else Colorspace.ITU601
    elif matrix in _MATRICES:
        matrix = _MATRICES[matrix]
    else:
        raise InputError(
            f"has the unusual colour matrix {int(matrix)} of ITU-T H.273",
            where=path,
            expected="BT.601, BT.709 or BT.2020",
            fix="convert it, for instance with ffmpeg -vf scale=out_color_matrix=bt709",
        )
    pixels = frame.to_ndarray(
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=SCALING,
    )
    return _orient(_over_white(pixels) if has_alpha else pixels, _display_steps(frame, path))


def _display_steps(frame, path):
    """The frame's display matrix (x' = a x + c y, y' = b x + d y) as steps of `_orient`."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return False, False, False
    a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5]
    if a and d and not (b or c):
        return False, bool(d < 0), bool(a < 0)
    if b and c and not (a or d):
        return True, bool(b < 0), bool(c < 0)
    raise InputError(
        "is tagged with a slanted rotation",
        where=path,
        expected="a rotation tag of 0, 90, 180 or 270 degrees",
        fix="turn the frames themselves and drop the tag",
    )
