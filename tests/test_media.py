"""Every kind of file is made here, small, with PyAV, Pillow or by hand, and read back."""

import os
import resource
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from animecolor_jax import media, media_writing
from animecolor_jax.errors import InputError
from animecolor_jax.media import read_image, read_video
from animecolor_jax.media_writing import check_output, side_by_side, write_video

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLORS = np.array(
    [
        RED,
        GREEN,
        BLUE,
        WHITE,
        (0, 0, 0),
        (255, 255, 0),
        (0, 255, 255),
        (255, 0, 255),
        (200, 120, 40),
        (17, 90, 170),
        (128, 128, 128),
        (250, 220, 200),
    ],
    np.uint8,
)


def flat(colors, height=32, width=48):
    """One frame of each colour."""
    colors = np.asarray(colors, np.uint8)
    return np.broadcast_to(colors[:, None, None], (len(colors), height, width, 3)).copy()


def quarters(height=32, width=64):
    """[H, W, 3]: red and green above blue and white; every turn and mirroring of it looks different."""
    rows = [
        np.concatenate(
            [flat([left], height // 2, width // 2)[0], flat([right], height // 2, width // 2)[0]], 1
        )
        for left, right in ((RED, GREEN), (BLUE, WHITE))
    ]
    return np.concatenate(rows)


def noise(frames=5, height=32, width=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def moving(frames=24, height=64, width=96):
    """Blocks that move, so that a compressed clip has data in every frame."""
    blocks = noise(1, height // 8, width // 8)[0].repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(blocks, 3 * index, axis=1) for index in range(frames)])


def encode(
    path,
    frames,
    codec="libx264",
    pixel_format="yuv420p",
    *,
    source="rgb24",
    pts=None,
    rate=24,
    matrix=None,
    full_range=None,
    matrix_tag=2,
    range_tag=0,
    stream_setup=None,
    movflags="",
    **options,
):
    """Writes `frames` with any codec; `matrix` converts, the tags only label."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(
            codec, rate=rate, options={key.replace("_", "-"): v for key, v in options.items()}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix_tag, range_tag
        if stream_setup:
            stream_setup(stream)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=source)
            if pixel_format != source:
                frame = frame.reformat(
                    format=pixel_format,
                    dst_colorspace=matrix,
                    interpolation=media.SCALING,
                    dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
                )
            frame.colorspace, frame.color_range = matrix_tag, range_tag
            frame.pts, frame.time_base = index if pts is None else pts[index], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def packets_of(path):
    """(positions in the file, contents) of the packets of a video."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [packet.pos for packet in packets], [bytes(packet) for packet in packets]


def centre(frames):
    return frames[:, frames.shape[1] // 2, frames.shape[2] // 2].astype(int)


def png16(levels):
    """A 16-bit PNG, by hand. levels [H, W, 1, 2, 3 or 4] uint16."""
    height, width, channels = levels.shape

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".tga", ".webp"])
def test_lossless_images_are_read_exactly(tmp_path, suffix):
    frame = noise(1, 7, 9)[0]
    Image.fromarray(frame).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), frame)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    frame = noise(1, 7, 9)[0]
    Image.fromarray(frame).save(tmp_path / "a.png")
    video = read_video(tmp_path / "a.png")
    assert video.fps == 24
    np.testing.assert_array_equal(video.frames, frame[None])


def test_alpha_is_composited_over_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = [(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba).save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.png", "a.webp"):
        assert read_image(tmp_path / name)[0].tolist() == [
            [200, 100, 0],
            [255, 255, 255],
            [244, 224, 204],
        ]


def test_grey_alpha_and_transparent_palettes_are_composited(tmp_path):
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[10, 10, 10], [255, 255, 255]]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    assert read_image(tmp_path / "opaque.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    for name in ("p.png", "p.gif"):
        assert read_image(tmp_path / name).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_greyscale_and_bilevel_images_become_rgb(tmp_path):
    Image.fromarray(np.array([[0, 77, 255]], np.uint8)).save(tmp_path / "l.png")
    assert read_image(tmp_path / "l.png").tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png").tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_divided_by_257(tmp_path, channels):
    levels = np.random.default_rng(channels).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png16(levels))
    color = levels[..., :3] if channels > 2 else np.repeat(levels[..., :1], 3, axis=-1)
    alpha = levels[..., -1:] / 65535 if channels in (2, 4) else 1.0
    expected = (65535 + (color.astype(float) - 65535) * alpha) / 257
    assert np.abs(read_image(tmp_path / "a.png") - expected).max() <= 0.501


def test_16_bit_grey_tiff_and_pgm_are_divided_by_257(tmp_path):
    levels = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(2, 8)
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 8 2 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.tiff", "a.pgm"):
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 1], levels // 257)


def test_pixels_without_a_fixed_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "i.tiff")
    for name in ("f.tiff", "i.tiff"):
        with pytest.raises(InputError, match="8 or 16 bits"):
            read_image(tmp_path / name)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    image = Image.merge("CMYK", [Image.new("L", (16, 16), level) for level in (0, 255, 255, 0)])  # red
    image.save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - RED).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = quarters(16, 32)
    undo = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: np.rot90,
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright)


def test_animated_images_are_read_whole_with_their_rate(tmp_path):
    frames = noise(4, 8, 8)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=50, lossless=True)
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=[100, 100, 100, 300])
    video = read_video(tmp_path / "a.webp")
    np.testing.assert_array_equal(video.frames, frames)
    assert video.fps == pytest.approx(20)
    video = read_video(tmp_path / "a.png")
    np.testing.assert_array_equal(video.frames, frames)
    assert video.fps == pytest.approx(4 / 0.6)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), frames[0])


# ---------------------------------------------------------------- folders


def test_folder_is_read_in_natural_order(tmp_path):
    frames = flat(COLORS)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("timing sheet")
    np.testing.assert_array_equal(read_video(tmp_path).frames, frames)
    assert read_video(tmp_path).fps == 24


def test_folder_of_mixed_sizes_names_the_odd_file(tmp_path):
    for index, height in enumerate((8, 8, 9)):
        Image.fromarray(flat([RED], height, 12)[0]).save(tmp_path / f"{index}.png")
    with pytest.raises(InputError, match="9x12") as caught:
        read_video(tmp_path)
    assert caught.value.where.endswith("2.png")
    assert "8x12" in caught.value.expected


def test_folder_without_frames_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty folder"):
        read_video(tmp_path)
    (tmp_path / "a.txt").write_text("no frame")
    with pytest.raises(InputError, match="no frames"):
        read_video(tmp_path)


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize(
    "tag, matrix",
    [
        (1, Colorspace.ITU709),
        (5, Colorspace.ITU601),
        (6, Colorspace.ITU601),
        (7, Colorspace.SMPTE240M),
        (9, Colorspace.BT2020),
    ],
)
@pytest.mark.parametrize("range_tag", [1, 2])
def test_matrix_and_range_tags_are_honoured(tmp_path, tag, matrix, range_tag):
    path = encode(
        tmp_path / "a.mkv",
        flat(COLORS),
        "ffv1",
        "yuv444p",
        matrix=matrix,
        full_range=range_tag == 2,
        matrix_tag=tag,
        range_tag=range_tag,
    )
    assert np.abs(centre(read_video(path).frames) - COLORS).max() <= 2


def test_matrix_conversion_agrees_with_the_standard(tmp_path):
    """Y' Cb Cr written as plain numbers, expected RGB from the equations of BT.709."""
    y, cb, cr = 120, 90, 180
    planes = np.concatenate([np.full((32, 32), y), np.full((8, 32), cb), np.full((8, 32), cr)]).astype(
        np.uint8
    )
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.colorspace, frame.color_range = 1, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    luma, blue, red = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r, b = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
    expected = np.array([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b]) * 255
    assert np.abs(centre(read_video(path).frames)[0] - expected).max() <= 1


@pytest.mark.parametrize("height, matrix", [(576, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_video_is_601_when_small_and_709_when_large(tmp_path, height, matrix):
    path = encode(tmp_path / "a.mkv", flat(COLORS[:3], height, 16), "ffv1", "yuv444p", matrix=matrix)
    assert np.abs(centre(read_video(path).frames) - COLORS[:3]).max() <= 2


def test_10_bit_and_16_bit_video_are_scaled_to_8(tmp_path):
    for pixel_format in ("yuv420p10le", "gbrp16le"):
        path = encode(tmp_path / "a.mkv", flat(COLORS), "ffv1", pixel_format, matrix=Colorspace.ITU601)
        assert np.abs(centre(read_video(path).frames) - COLORS).max() <= 1


def test_grey_video_becomes_rgb(tmp_path):
    greys = np.repeat(np.array([[0], [77], [128], [255]], np.uint8), 3, axis=1)
    for range_tag in (0, 1, 2):
        path = encode(
            tmp_path / f"{range_tag}.mkv",
            flat(greys),
            "ffv1",
            "gray",
            full_range=range_tag != 1,
            range_tag=range_tag,
        )
        assert np.abs(centre(read_video(path).frames) - greys).max() <= 1


@pytest.mark.parametrize(
    "suffix, codec, pixel_format",
    [
        (".webm", "libvpx-vp9", "yuva420p"),
        (".mov", "prores_ks", "yuva444p10le"),
        (".mkv", "ffv1", "bgra"),
    ],
)
def test_alpha_of_a_video_is_composited_over_white(tmp_path, suffix, codec, pixel_format):
    rgba = np.concatenate([flat(COLORS), np.full((len(COLORS), 32, 48, 1), 51, np.uint8)], axis=-1)
    options = {"auto_alt_ref": "0", "crf": "10"} if codec == "libvpx-vp9" else {}
    path = encode(
        tmp_path / f"a{suffix}",
        rgba,
        codec,
        pixel_format,
        source="rgba",
        matrix=Colorspace.ITU601,
        **options,
    )
    expected = 255 + (COLORS.astype(float) - 255) * 0.2
    assert np.abs(centre(read_video(path).frames) - expected).max() <= 2.5


@pytest.mark.parametrize(
    "turns, mirrored", [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True)]
)
def test_display_matrix_of_a_video_is_applied(tmp_path, turns, mirrored):
    stored = quarters()
    path = encode(
        tmp_path / "a.mp4",
        stored[None],
        crf="5",
        stream_setup=lambda s: s.set_display_rotation(90 * turns, hflip=mirrored),
    )
    upright = np.rot90(stored, turns)
    upright = np.fliplr(upright) if mirrored else upright
    (frame,) = read_video(path).frames
    assert frame.shape == upright.shape
    corners = np.ix_([4, -5], [4, -5])
    assert np.abs(frame[corners].astype(int) - upright[corners]).max() <= 12


def test_rotation_by_other_than_right_angles_is_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", quarters()[None], stream_setup=lambda s: s.set_display_rotation(30))
    with pytest.raises(InputError, match="slanted"):
        read_video(path)


def test_variable_frame_rate_keeps_every_frame_and_averages(tmp_path):
    frames = flat(COLORS[:6])
    pts = [0, 1, 2, 12, 13, 20]
    for suffix in (".mp4", ".mkv"):
        path = encode(tmp_path / f"a{suffix}", frames, pts=pts, matrix=Colorspace.ITU601, crf="5")
        video = read_video(path)
        assert np.abs(centre(video.frames) - COLORS[:6]).max() <= 6
        assert video.fps == pytest.approx(6 / (21 / 24), rel=0.16)  # the last frame's duration is a guess


def test_frames_come_in_presentation_order(tmp_path):
    """With B-frames the file stores them in another order."""
    greys = np.repeat(np.arange(20, 240, 10, dtype=np.uint8)[:, None], 3, axis=1)
    path = encode(tmp_path / "a.mp4", flat(greys), matrix=Colorspace.ITU601, bf="3", b_adapt="0")
    assert np.abs(centre(read_video(path).frames) - greys).max() <= 3


def test_hidden_frames_of_vp8_are_no_truncation(tmp_path):
    """VP8 stores frames that are only referred to, never shown, in blocks of their own."""
    path = encode(tmp_path / "a.webm", moving(12), "libvpx", auto_alt_ref="0", b="200k")
    _, packets = packets_of(path)
    data = bytearray(path.read_bytes())
    data[data.find(packets[5])] &= ~0x10  # the bit show_frame
    path.write_bytes(data)
    assert len(read_video(path).frames) == 11


def test_frames_outside_the_edit_list_are_left_out(tmp_path):
    """As in a clip cut without encoding again: it decodes from a key frame but shows less."""
    path = encode(tmp_path / "a.mp4", flat(np.repeat(np.arange(0, 200, 10)[:, None], 3, axis=1)), bf="0")
    data = bytearray(path.read_bytes())
    start = data.find(b"elst") + 12
    duration, _ = struct.unpack(">Ii", data[start : start + 8])
    data[start : start + 8] = struct.pack(">Ii", duration * 15 // 20, 5 * 512)
    path.write_bytes(data)
    frames = read_video(path).frames
    assert len(frames) == 15
    assert abs(int(frames[0, 16, 16, 0]) - 50) <= 3


def test_trailing_padding_of_a_matroska_file_is_no_damage(tmp_path):
    write_video(tmp_path / "a.mkv", noise(2), 24)
    with open(tmp_path / "a.mkv", "ab") as file:
        file.write(b"\xec\x80")  # an empty Void element
    assert len(read_video(tmp_path / "a.mkv").frames) == 2


def test_a_colon_or_percent_in_the_name_is_just_a_name(tmp_path):
    for name in ("12:30.mp4", "50%03d.mkv"):
        write_video(tmp_path / name, noise(2), 24)
        assert len(read_video(tmp_path / name).frames) == 2


def test_a_title_that_is_not_utf8_is_no_reason_to_refuse_a_video(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf_title"
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for pixels in noise(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"caf_title") == 1
    path.write_bytes(content.replace(b"caf_title", b"caf\xe9title"))  # Latin-1
    assert len(read_video(path).frames) == 2


# ---------------------------------------------------------------- refusals


def test_missing_and_empty_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    for read in (read_video, read_image):
        with pytest.raises(InputError, match="0 bytes") as caught:
            read(tmp_path / "empty.mp4")
        assert caught.value.where.endswith("empty.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.png", "a.gif"])
def test_files_that_are_no_pictures_are_refused(tmp_path, name):
    (tmp_path / name).write_text("Dear animator,\n" * 100)
    with pytest.raises(InputError, match="not a"):
        read_video(tmp_path / name)


def test_a_playlist_is_not_followed_to_other_files(tmp_path):
    write_video(tmp_path / "secret.mp4", noise(2), 24)
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "b.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    )
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(InputError, match="not a video"):
            read_video(tmp_path / name)


def test_sound_without_picture_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="no video stream"):
        read_video(tmp_path / "a.mp4")


def test_read_image_refuses_videos_and_folders(tmp_path):
    write_video(tmp_path / "a.mp4", noise(2), 24)
    with pytest.raises(InputError, match="not an image"):
        read_image(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_videos_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    write_video(path, moving(), 24)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError) as caught:
        read_video(path)
    assert caught.value.where == str(path)


def test_an_mp4_cut_between_two_frames_is_refused(tmp_path):
    """Nothing is broken then; there is only less than the index says."""
    path = tmp_path / "a.mp4"
    write_video(path, moving(), 24)
    positions, _ = packets_of(path)
    path.write_bytes(path.read_bytes()[: max(positions)])
    with pytest.raises(InputError, match="truncated"):
        read_video(path)


@pytest.mark.parametrize("codec, pixel_format, count", [("mjpeg", "yuvj420p", 40), ("mpeg4", "yuv420p", 4)])
def test_damage_inside_a_frame_is_not_concealed(tmp_path, codec, pixel_format, count):
    """Codecs without checksums cannot notice all of it, but decoders say nothing unless asked to."""
    path = encode(tmp_path / "a.avi", moving(12), codec, pixel_format)
    intact, (_, packets) = path.read_bytes(), packets_of(path)
    refused = 0
    for packet in packets:
        start = intact.find(packet) + len(packet) // 2
        damaged = bytes(byte ^ 0xA5 for byte in intact[start : start + count])
        path.write_bytes(intact[:start] + damaged + intact[start + count :])
        try:
            read_video(path)
        except InputError as error:
            assert "damaged" in error.what
            refused += 1
    assert refused >= 7


def test_a_frame_that_lacks_its_end_is_refused(tmp_path):
    """It decodes, but for its last bytes; only the container knows."""
    path = encode(tmp_path / "a.mov", moving(3), "mjpeg", "yuvj420p", movflags="faststart")
    positions, packets = packets_of(path)
    path.write_bytes(path.read_bytes()[: positions[-1] + len(packets[-1]) - 4])
    with pytest.raises(InputError, match="damaged"):
        read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damage_in_the_middle_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(path, moving(), 24)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(byte ^ 0xA5 for byte in data[middle : middle + 300])
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged|truncated"):
        read_video(path)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_hole_of_zeros_is_found(tmp_path, suffix, codec):
    """The decoder itself goes on through it without a word."""
    frames = moving(12, 128, 192)
    path = encode(tmp_path / f"a{suffix}", frames, codec, crf="4", bf="0")
    assert len(read_video(path).frames) == 12
    positions, packets = packets_of(path)
    data = bytearray(path.read_bytes())
    place = data.index(packets[5]) + len(packets[5]) // 2
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        read_video(path)


def test_damaged_structure_of_a_webm_is_refused(tmp_path):
    """WebM has no checksums; FFmpeg skips to the next block that it understands, if any."""
    write_video(tmp_path / "a.webm", moving(), 24)
    data = bytearray((tmp_path / "a.webm").read_bytes())
    block = data.find(b"\xa3", len(data) // 3)  # the identifier of a SimpleBlock
    while data[block + 3 : block + 4] != b"\x81" and data[block + 2 : block + 3] != b"\x81":  # of track 1
        block = data.find(b"\xa3", block + 1)
    data[block : block + 3] = b"\0\0\0"
    (tmp_path / "a.webm").write_bytes(data)
    with pytest.raises(InputError, match="damaged|truncated"):
        read_video(tmp_path / "a.webm")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_truncated_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise(1, 40, 40)[0]).save(path)
    data = path.read_bytes()
    for kept in (0.02, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * kept)])
        for read in (read_image, read_video):
            with pytest.raises(InputError) as caught:
                read(path)
            assert caught.value.where == str(path)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("height, width", [(96, 128), (33, 47)])
def test_colours_survive_and_are_tagged_bt709(tmp_path, suffix, height, width):
    path = tmp_path / f"a{suffix}"
    write_video(path, flat(COLORS, height, width), 24)
    frames = read_video(path).frames
    assert frames.shape == (len(COLORS), height, width, 3)
    assert np.abs(frames.astype(int) - COLORS[:, None, None]).max() <= 3
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
    assert tags == (1, 1, 1, 1)  # BT.709, BT.709, BT.709, limited


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_patches_of_one_frame_keep_their_colours(tmp_path, suffix):
    patches = COLORS.reshape(3, 4, 3).repeat(32, 0).repeat(32, 1)
    write_video(tmp_path / f"a{suffix}", np.stack([patches] * 5), 24)
    frames = read_video(tmp_path / f"a{suffix}").frames
    assert np.abs(frames[:, 16::32, 16::32].astype(int) - COLORS.reshape(3, 4, 3)).max() <= 3


def test_mp4_plays_everywhere(tmp_path):
    """H.264 4:2:0 8 bit, and the index in front of the data."""
    write_video(tmp_path / "a.mp4", noise(3), 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("name", ["a.mkv", "frames"])
@pytest.mark.parametrize("height, width", [(32, 48), (31, 47), (1, 1)])
def test_lossless_formats_return_every_bit(tmp_path, name, height, width):
    frames = noise(3, height, width)
    write_video(tmp_path / name, frames, 24)
    np.testing.assert_array_equal(read_video(tmp_path / name).frames, frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (2, 3, 17)])
def test_tiny_clips_keep_their_size(tmp_path, suffix, shape):
    write_video(tmp_path / f"a{suffix}", noise(*shape), 24)
    assert read_video(tmp_path / f"a{suffix}").frames.shape == (*shape, 3)


def test_gif_of_few_colours_is_exact_and_keeps_held_frames(tmp_path):
    frames = flat(COLORS)
    frames[:, 8:16, 8:16] = (20, 30, 40)
    held = frames.repeat(2, axis=0)
    write_video(tmp_path / "a.gif", held, 25)
    video = read_video(tmp_path / "a.gif")
    np.testing.assert_array_equal(video.frames, held)
    assert video.fps == pytest.approx(25)


def test_gif_of_many_colours_stays_close(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frame = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    write_video(tmp_path / "a.gif", frame[None], 25)
    error = read_video(tmp_path / "a.gif").frames[0].astype(int) - frame
    assert np.abs(error).mean() < 6


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize(
    "fps, kept",
    [
        (23.976, 24000 / 1001),
        (24000 / 1001, 24000 / 1001),
        (29.97, 30000 / 1001),
        (24, 24),
        (12.5, 12.5),
        (1, 1),
    ],
)
def test_frame_rate_is_kept(tmp_path, suffix, fps, kept):
    write_video(tmp_path / f"a{suffix}", noise(4, 16, 16), fps)
    assert read_video(tmp_path / f"a{suffix}").fps == pytest.approx(kept, rel=1e-6)


def test_parent_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "a.mkv"
    for seed in (0, 1):
        write_video(path, noise(2, seed=seed), 24)
        np.testing.assert_array_equal(read_video(path).frames, noise(2, seed=seed))
    frames = tmp_path / "frames"
    for count in (3, 2):  # a folder of frames leaves nothing of the longer one before it
        write_video(frames, noise(count), 24)
        assert len(read_video(frames).frames) == count
    assert sorted(item.name for item in tmp_path.iterdir()) == ["frames", "new"]
    assert [item.name for item in path.parent.iterdir()] == ["a.mkv"]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.gif", "frames"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, name):
    old = noise(1, 16, 16)
    write_video(tmp_path / name, old, 24)
    before = read_video(tmp_path / name).frames
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError):
            write_video(tmp_path / name, noise(8, 64, 64), 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [item.name for item in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read_video(tmp_path / name).frames, before)


def test_interruption_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(media_writing, "_encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", noise(2), 24)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    write_video(tmp_path / "frames", noise(2), 24)
    move = os.replace

    def fail_on_the_new_one(source, target):
        if (Path(source) / "00002.png").exists():
            raise OSError("no")
        move(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new_one)
    with pytest.raises(OSError, match="no"):
        write_video(tmp_path / "frames", noise(3), 24)
    assert [item.name for item in tmp_path.iterdir()] == ["frames"]
    assert len(read_video(tmp_path / "frames").frames) == 2


def test_suffixes_may_be_capital_letters(tmp_path):
    frames = noise(2)
    write_video(tmp_path / "A.MKV", frames, 24)
    np.testing.assert_array_equal(read_video(tmp_path / "A.MKV").frames, frames)


def test_unknown_suffix_lists_the_formats(tmp_path):
    with pytest.raises(InputError, match=r"\.avi") as caught:
        check_output(tmp_path / "a.avi")
    assert all(suffix in caught.value.expected for suffix in (".mp4", ".webm", ".gif", ".mkv", "PNG"))


def test_missing_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(media_writing._ENCODINGS, ".mp4", media_writing._Encoding("libnothing", "yuv420p"))
    with pytest.raises(InputError, match="libnothing"):
        check_output(tmp_path / "a.mp4")


def test_names_that_are_taken_are_refused(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "clip.mp4")
    (tmp_path / "photos").mkdir()
    check_output(tmp_path / "photos")
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(InputError, match="holiday.jpg"):
        check_output(tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(InputError, match="not a folder"):
        check_output(tmp_path / "file" / "a.mp4")


def test_check_output_makes_nothing(tmp_path):
    check_output(tmp_path / "new" / "a.mp4")
    check_output(tmp_path / "new" / "frames")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -24, float("nan"), float("inf")])
def test_impossible_frame_rates_are_refused(tmp_path, fps):
    with pytest.raises(InputError, match="frames a second"):
        write_video(tmp_path / "a.mp4", noise(2), fps)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_clip_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="expected uint8"):
        write_video(tmp_path / "a.mp4", frames, 24)


# ---------------------------------------------------------------- comparisons


def test_side_by_side_holds_stills_and_scales_to_the_first_height():
    clip, still = noise(5, 20, 30), flat([RED], 40, 20)
    joined = side_by_side([clip, still, clip])
    assert joined.shape == (5, 20, 30 + 10 + 30, 3)
    np.testing.assert_array_equal(joined[:, :, :30], clip)
    assert (joined[:, :, 30:40] == RED).all()
    np.testing.assert_array_equal(joined[:, :, 40:], clip)
    assert side_by_side([still, clip]).shape == (5, 40, 20 + 60, 3)


def test_side_by_side_refuses_clips_of_other_lengths():
    with pytest.raises(ValueError, match=r"\[5, 4\] frames"):
        side_by_side([noise(5), noise(4)])
