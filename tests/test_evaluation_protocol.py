"""Protocols, and how folders are matched."""

import av
import numpy as np
import pytest

from animecolor_jax import media, media_writing
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import pairs
from animecolor_jax.evaluation.protocol import PRESETS, Protocol, find_protocol

RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (3, 20, 40, 3), np.uint8)
PROTOCOL = Protocol("own")


def test_names_of_presets_are_width_by_height():
    assert {name: protocol.size for name, protocol in PRESETS.items()} == {
        "animecolor-512x320": (320, 512), "lvcd-256": (256, 256), "anidoc-256-fg": (256, 256),
    }  # fmt: skip
    assert [name for name, protocol in PRESETS.items() if protocol.mask] == ["anidoc-256-fg"]


def test_frames_of_the_size_are_not_touched():
    assert Protocol("p", size=(20, 40)).prepare(CLIP) is CLIP
    assert PROTOCOL.prepare(CLIP) is CLIP


@pytest.mark.parametrize(("fit", "columns"), [("crop", slice(10, 30)), ("stretch", slice(0, 40))])
def test_crop_keeps_the_middle_and_stretch_all(fit, columns):
    protocol = Protocol("p", size=(40, 40), fit=fit, filter="bilinear")
    ramp = np.broadcast_to((np.arange(40) * 5)[None, None, :, None], (1, 20, 40, 3)).astype(np.uint8)
    row = protocol.prepare(ramp)[0, 20, :, 0].astype(float)
    wanted = np.arange(40)[columns]
    assert row[0] == pytest.approx(5 * wanted[0], abs=2) and row[-1] == pytest.approx(5 * wanted[-1], abs=2)


def test_any_size_is_cropped_to_any_other():
    """Rounding must not put the crop outside of the frame."""
    rng = np.random.default_rng(2)
    sizes = [(1924, 1996), (1080, 1920), (854, 480), *rng.integers(11, 90, (300, 2)).tolist()]
    for number, (height, width) in enumerate(sizes):
        wanted = (320, 512) if number < 3 else tuple(rng.integers(11, 90, 2).tolist())
        frame = np.zeros((1, height, width), np.uint8)
        assert Protocol("p", size=wanted).prepare(frame).shape == (1, *wanted)


def test_float_values_are_those_of_uint8_before_rounding():
    exact = Protocol("p", size=(32, 32), filter="bilinear", values="float").prepare(CLIP)
    rounded = Protocol("p", size=(32, 32), filter="bilinear").prepare(CLIP)
    assert exact.dtype == np.float32 and exact.shape == rounded.shape == (3, 32, 32, 3)
    assert exact.min() >= 0 and exact.max() <= 1
    assert np.abs(exact * 255 - rounded).max() < 1.5 and (exact * 255 != rounded).any()


def test_the_background_becomes_white_in_frames_and_line_art():
    mask = np.zeros((1, 20, 40), np.uint8)
    mask[:, :, :20] = 255
    protocol = Protocol("p", mask=True)
    frames = protocol.prepare(CLIP, mask)
    assert (frames[:, :, 20:] == 255).all() and (frames[:, :, :20] == CLIP[:, :, :20]).all()
    art = protocol.prepare(CLIP[..., 0], mask)
    assert (art[:, :, 20:] == 255).all() and (art[:, :, :20] == CLIP[:, :, :20, 0]).all()


def test_frames_are_skipped_and_cut():
    protocol = Protocol("p", skip=1, frames=4)
    assert protocol.choose(np.arange(9)).tolist() == [1, 2, 3, 4]
    assert protocol.num_frames(3) == 2 and protocol.num_frames(1) == 0


def test_a_protocol_of_ones_own_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('size = "64x96"\nfit = "stretch"\nframes = 12\nclip_length = 10\n')
    wanted = Protocol("mine", size=(64, 96), fit="stretch", frames=12, clip_length=10)
    assert find_protocol(str(path)) == wanted
    assert "64x96" in wanted.describe() and "12 frames" in wanted.describe()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("sizes = 3", "unknown sizes"),
        ('size = "64"', "(64,)"),
        ("size = 64", "64"),
        ('size = "6x9"', "(6, 9)"),
        ('filter = "nearest"', "nearest"),
        ("frames = -1", "-1"),
        ("clip_length = 4", "4"),
        ('mask = "yes"', "yes"),
        ("size = ", "not TOML"),
        ('name = "lvcd-256"', "lvcd-256"),
    ],
)
def test_a_bad_protocol_is_refused_by_file_and_field(tmp_path, text, what):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        find_protocol(str(path))
    assert what in error.value.what and str(path) in error.value.where


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(InputError, match="lvcd-256"):
        find_protocol("animecolor-320x512")
    with pytest.raises(InputError, match="does not exist"):
        find_protocol("absent.toml")


@pytest.fixture
def folders(tmp_path):
    """Folders `target` and `ours` with the clips a and b."""
    for kind in ("target", "ours"):
        for name in ("a", "b"):
            media_writing.write_video(tmp_path / kind / f"{name}.mkv", CLIP, 24)
    return tmp_path


def match(root, partial=False, protocol=PROTOCOL, **others):
    kinds = {"sketch": None, "mask": None} | others
    return pairs.match({"ours": root / "ours"}, root / "target", **kinds, protocol=protocol, partial=partial)


def test_clips_are_matched_by_name_whatever_they_are(folders):
    media_writing.write_video(folders / "ours" / "c", CLIP, 24)  # a folder of PNGs
    media_writing.write_video(folders / "target" / "c.gif", CLIP, 24)
    found = match(folders)
    assert [pair.name for pair in found.pairs] == ["a", "b", "c"] and not found.notes
    assert all(pair.frames == 3 for pair in found.pairs)
    assert found.sources == {"target": {"ffv1", "gif"}, "ours": {"ffv1", "png"}}


def test_a_folder_of_images_is_one_clip(tmp_path):
    for kind in ("target", "ours"):
        media_writing.write_video(tmp_path / kind, CLIP, 24)
    (pair,) = match(tmp_path).pairs
    assert (pair.name, pair.frames) == (pairs.ONE_CLIP, 3)
    assert (pairs.read(pair.target, 2, or_more=True) == CLIP[:2]).all()
    with pytest.raises(InputError, match="3 frames decode"):
        pairs.read(pair.target, 2)


def test_names_that_differ_are_all_listed_or_left_out_on_request(folders):
    (folders / "ours" / "b.mkv").rename(folders / "ours" / "c.mkv")
    with pytest.raises(InputError) as error:
        match(folders)
    assert all(f"{name}: not in" in error.value.what for name in "bc") and "--partial" in error.value.fix
    found = match(folders, partial=True)
    assert [pair.name for pair in found.pairs] == ["a"] and len(found.notes) == 2


def test_numbers_of_frames_that_differ_are_all_listed_or_cut_on_request(folders):
    for name in "ab":
        media_writing.write_video(folders / "ours" / f"{name}.mkv", CLIP[:2], 24)
    with pytest.raises(InputError) as error:
        match(folders)
    assert error.value.what.count("target 3, ours 2") == 2
    found = match(folders, partial=True)
    assert [pair.frames for pair in found.pairs] == [2, 2] and len(found.notes) == 2


def test_other_sizes_are_refused_unless_the_protocol_resizes_them(folders):
    media_writing.write_video(folders / "ours" / "a.mkv", CLIP[:, ::2, ::2], 24)
    with pytest.raises(InputError, match="ours is 10x20, the target 20x40"):
        match(folders)
    resizing = Protocol("p", size=(16, 32))
    assert len(match(folders, protocol=resizing).pairs) == 2
    media_writing.write_video(folders / "ours" / "a.mkv", CLIP[:, ::2], 24)
    with pytest.raises(InputError, match="ours is 10x40"):
        match(folders, protocol=resizing)


def test_clips_shorter_than_the_protocol_wants_are_refused(folders):
    with pytest.raises(InputError, match="3 frames, of 5"):
        match(folders, protocol=Protocol("p", skip=1, frames=4))
    found = match(folders, protocol=Protocol("p", skip=1, frames=4), partial=True)
    assert len(found.notes) == 2 and "2 of the protocol's 4" in found.notes[0]


def test_one_mask_serves_all_frames(folders):
    for name in "ab":
        media_writing.write_video(folders / "masks" / f"{name}.mkv", CLIP[:1], 24)
    (pair, _) = match(folders, mask=folders / "masks").pairs
    assert pair.frames == 3 and len(pairs.read(pair.mask, 3, or_one=True)) == 1


def test_folders_that_hold_no_clips_are_refused(folders, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="is empty"):
        pairs.list_clips(tmp_path / "none")
    with pytest.raises(InputError, match="does not exist"):
        pairs.list_clips(tmp_path / "absent")
    (folders / "ours" / "a.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="two clips are called 'a'"):
        pairs.list_clips(folders / "ours")


def test_a_probe_counts_reordered_frames(tmp_path):
    """Matroska gives no decoding time for the first of them."""
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("libx264", 24, options={"bf": "3", "b-adapt": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number in range(11):
            frame = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert pairs.probe(tmp_path / "a.mkv").frames == 11 == len(media.read_video(tmp_path / "a.mkv").frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif", "a"])
def test_a_probe_counts_what_decodes(tmp_path, name):
    clip = np.repeat(np.repeat(CLIP, 2, 1), 2, 2).repeat(4, 0)[:11]
    media_writing.write_video(tmp_path / name, clip, 24)
    found = pairs.probe(tmp_path / name)
    decoded = media.read_video(tmp_path / name).frames
    assert found[:3] == decoded.shape[:3]
