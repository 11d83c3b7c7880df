"""tools/colorize.py from flags to files: what it accepts, what it refuses and when, what it leaves behind.

Most tests call the tool's `main` in this process, which compiles every network once; for the same reason
nearly all clips have one size.
"""

import errno
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
from fractions import Fraction
from pathlib import Path

import av
import checkpoints
import numpy as np
import pytest
from PIL import Image

from animecolor_jax import canvas, cli, demo, media, media_writing, safetensors_io
from animecolor_jax import weights as weights_directory
from animecolor_jax.convert.checkpoint import convert_checkpoint
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import Pipeline
from data_pipeline.toon import draw_clip

TOOL = Path(__file__).parents[1] / "tools" / "colorize.py"
CLIP = draw_clip(num_frames=22, height=32, width=48)
SKETCH = CLIP.line_art[:9]
# the fixture's text encoder knows 64 tokens: bytes up to "<"
FAST = {
    "--steps": 2, "--guidance": 1, "--prompt": "1", "--negative-prompt": "2", "--window": 17, "--overlap": 8,
    "--seed": 0,
}
BASE = {"--sketch": "sketch.mkv", "--reference": "reference.png", "--weights": "weights", **FAST}
# how the weights "own" of the fixture are best called
OWN = {"steps": 3, "guidance": 1.0, "window": 9, "overlap": 4, "size": [32, 48]}
FLAGS = """--sketch --reference --prompt --prompt-file --negative-prompt --weights --out --steps --guidance
    --seed --sampler --size --fps --invert --window --overlap --dtype --mesh --noise --comparison
    --strict-reference --step-cache --offload --quantize --devices --num-processes --process-id --jobs --demo
    --json"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tools_colorize", TOOL)
    module = sys.modules["tools_colorize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and bad inputs, and weights: those of the fixture, in which every input has an effect."""
    root = tmp_path_factory.mktemp("colorize")
    source = checkpoints.write_checkpoint(root / "torch")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "byte_level.json").write_text('{"type": "byte-level"}')
    convert_checkpoint(source, root / "weights")
    _write_other_weights(root)

    media_writing.write_video(root / "sketch.mkv", SKETCH, fps=24)
    Image.fromarray(CLIP.reference).save(root / "reference.png")
    media_writing.write_video(root / "long.mkv", CLIP.line_art, fps=24)
    whole = encode(root / "truncated.mp4", CLIP.line_art, movflags="faststart").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("this is no video\n" * 100)
    (root / "text.png").write_text("this is no image\n" * 100)
    (root / "latin1.txt").write_bytes("a girl in caf\u00e9".encode("latin-1"))
    (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("mine")
    noise = {"ref_noise": (1, 4, 1, 4, 6), "init_latents": (1, 3, 4, 4, 6)}
    for name, shapes in {
        "noise_of_other_size": {**noise, "init_latents": (1, 2, 4, 4, 6)},
        "noise_of_two": {**noise, "init_latents": (2, 3, 4, 4, 6)},
        "noise_of_other_names": {"noise": (1, 4, 1, 4, 6)},
    }.items():
        tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        safetensors_io.write(root / f"{name}.safetensors", tensors, tensors.items())
    return root


def _write_other_weights(root):
    config = json.loads((root / "weights" / "config.json").read_text())
    for name, values in {
        "other_version": {**config, "format_version": 99},
        "own": {**config, "inference": OWN},
        "own_of_larger_clips": {**config, "inference": {**OWN, "size": [64, 112]}},
        "bad_inference": {**config, "inference": {**OWN, "steps": 0}},
        "no_lcg": {**config, "components": {k: v for k, v in config["components"].items() if k != "lcg"}},
    }.items():
        shutil.copytree(root / "weights", root / name, copy_function=os.link)
        (root / name / "config.json").unlink()
        (root / name / "config.json").write_text(json.dumps(values))
    shutil.copytree(root / "weights", root / "no_vae", copy_function=os.link)
    (root / "no_vae" / "vae.safetensors").unlink()


@pytest.fixture(scope="module")
def load():
    """`Pipeline.load`, once for each directory."""
    return functools.cache(Pipeline.load)


@pytest.fixture
def colorize(tool, load, folder, monkeypatch, capsys):
    """Function of flags -> (exit code, JSON of the last line of stdout, stderr); runs among the inputs."""
    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.chdir(folder)

    def call(flags):
        values = {flag: value for flag, value in flags.items() if value is not None}
        argv = [part for flag, value in values.items() for part in (flag, *as_words(value))]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *argv, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main(tool.run, tool.Arguments)
        out, err = capsys.readouterr()
        return stop.value.code, json.loads(out.splitlines()[-1]), err

    return call


@pytest.fixture
def colored(colorize, tmp_path):
    """Function of changed flags -> the frames that a run writes, checked against its report."""

    def call(out="out.mkv", **changes):
        flags = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        code, report, err = colorize({**BASE, "--out": tmp_path / out, **flags})
        assert code == 0, err
        frames = media.read_video(tmp_path / out).frames
        assert (report["frames"], report["height"], report["width"]) == frames.shape[:3]
        return frames

    return call


@pytest.fixture
def bundled(folder, monkeypatch):
    """Path of the weights "own", which are here in the place of those that come with the package."""
    monkeypatch.setattr(weights_directory, "BUNDLED", folder / "own")
    return folder / "own"


@pytest.fixture
def no_networks(colorize, monkeypatch):
    """Whoever loads the networks fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("the networks were loaded")

    monkeypatch.setattr(Pipeline, "load", load)


@pytest.fixture
def expected(colored):
    """Frames of the plain run."""
    return colored()


def as_words(value):
    if value is True:
        return ()
    return map(str, value) if isinstance(value, list) else (str(value),)


def encode(path, frames, pts=None, rotation=0, movflags=""):
    """An H.264 video with timestamps in 1/24 s and a rotation tag."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index if pts is None else pts[index], Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(path, images):
    """A folder of PNGs from Pillow images."""
    path.mkdir()
    for index, image in enumerate(images):
        image.save(path / f"{index}.png")
    return path


# ---------------------------------------------------------------- accepted


def test_a_run_reports_what_it_wrote(colorize, tmp_path):
    out = tmp_path / "new folder" / "out.mkv"
    code, report, _ = colorize({**BASE, "--out": out, "--fps": 12})
    assert code == 0 and out.is_file()
    assert report.keys() == {"out", "frames", "height", "width", "seconds", "seconds_per_step", "weights"}
    assert (report["out"], report["weights"]) == (str(out), "weights")
    assert (report["frames"], report["height"], report["width"]) == SKETCH.shape[:3]
    assert 0 < report["seconds_per_step"] * 2 <= report["seconds"]
    assert media.read_video(out).fps == 12
    assert os.listdir(out.parent) == ["out.mkv"]


def test_a_seed_repeats_bit_for_bit_and_another_differs(colored, expected):
    np.testing.assert_array_equal(colored(seed=0), expected)
    assert (colored(seed=2**32 - 1) != expected).any()


def lossless_forms():
    grey = SKETCH[..., 0]
    ink = np.zeros((*grey.shape, 4), np.uint8)
    ink[..., 3] = 255 - grey
    return {
        "folder": [Image.fromarray(frame) for frame in SKETCH],
        "greyscale": [Image.fromarray(frame) for frame in grey],
        "16-bit": [Image.fromarray(frame.astype(np.uint16) * 257) for frame in grey],
        "black ink on transparent ground": [Image.fromarray(frame) for frame in ink],
        "light on dark": [Image.fromarray(255 - frame) for frame in SKETCH],
    }


@pytest.mark.parametrize("form", lossless_forms())
def test_the_same_drawing_in_another_form_gives_the_same_result(colored, expected, tmp_path, form):
    path = write_frames(tmp_path / "frames", lossless_forms()[form])
    np.testing.assert_array_equal(colored(sketch=path), expected)


def test_invert_yes_and_no_are_obeyed(colored, colorize, expected, tmp_path):
    path = tmp_path / "dark.mkv"
    media_writing.write_video(path, 255 - SKETCH, fps=24)
    np.testing.assert_array_equal(colored(sketch=path, invert="yes"), expected)
    kept = colored(sketch=path, invert="no")
    assert (kept != expected).any()
    np.testing.assert_array_equal(colored(invert="yes"), kept)
    _, _, err = colorize({**BASE, "--sketch": path, "--out": tmp_path / "out.mkv"})
    assert "dark.mkv: light lines on dark; inverted" in err


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 48), (6, 31, 45), (22, 32, 48)])
def test_the_result_has_the_size_and_length_of_the_sketch(colored, tmp_path, frames, height, width):
    """One frame, odd sizes, and two windows of 17."""
    path = tmp_path / "sketch.mkv"
    media_writing.write_video(path, CLIP.line_art[:frames, :height, :width], fps=24)
    assert colored(sketch=path).shape == (frames, height, width, 3)


def test_an_image_is_a_clip_of_one_frame(colored, tmp_path):
    Image.fromarray(SKETCH[0]).save(tmp_path / "one.png")
    assert colored(sketch=tmp_path / "one.png").shape == (1, *SKETCH.shape[1:])


def test_a_rotated_video_is_coloured_upright(colored, tmp_path):
    stored = np.rot90(SKETCH, axes=(2, 1))
    assert colored(sketch=encode(tmp_path / "turned.mp4", stored, rotation=90)).shape == SKETCH.shape


def test_every_frame_of_a_variable_rate_is_coloured(colored, tmp_path):
    path = encode(tmp_path / "held.mp4", SKETCH, pts=[0, 1, 2, 12, 13, 20, 30, 31, 47])
    assert colored(sketch=path).shape == SKETCH.shape
    assert media.read_video(tmp_path / "out.mkv").fps == pytest.approx(9 / (48 / 24), rel=0.2)


def test_size_resizes_the_sketch(colored, expected, tmp_path):
    large = [Image.fromarray(frame).resize((96, 64), Image.Resampling.NEAREST) for frame in SKETCH]
    path = write_frames(tmp_path / "large", large)
    assert colored(sketch=path, size="32x48").shape == expected.shape
    np.testing.assert_array_equal(colored(size="32x48"), expected)


def test_a_reference_of_another_aspect_is_fitted_whole(colored, expected, tmp_path):
    wide = np.repeat(CLIP.reference, 3, axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(canvas.fit_reference(wide, (32, 48))).save(tmp_path / "fitted.png")
    frames = colored(reference=tmp_path / "wide.png")
    np.testing.assert_array_equal(frames, colored(reference=tmp_path / "fitted.png"))
    assert (frames != expected).any()


def test_a_second_reference_has_an_effect(colored, expected, tmp_path):
    Image.fromarray(255 - CLIP.reference).save(tmp_path / "other.png")
    assert (colored(reference=["reference.png", tmp_path / "other.png"]) != expected).any()


def test_a_prompt_file_is_a_prompt(colored, tmp_path):
    (tmp_path / "prompt.txt").write_text("345\n", encoding="utf-8-sig")
    frames = colored(prompt_file=tmp_path / "prompt.txt", prompt=None)
    np.testing.assert_array_equal(frames, colored(prompt="345"))
    assert (frames != colored(prompt="1")).any()


def test_guidance_and_what_goes_with_it_have_an_effect(colored, expected):
    results = [
        expected, colored(guidance=4), colored(guidance=4, negative_prompt="3"),
        colored(guidance=4, dynamic_guidance=True), colored(guidance=4, sampler="euler"),
    ]
    assert len({frames.tobytes() for frames in results}) == len(results)


def test_dtype_and_mesh_reach_the_networks(colorize, monkeypatch):
    def load(directory, *, dtype, mesh, offload, quantize):
        raise InputError(f"{directory} {dtype} {mesh.shape['data']} {mesh.shape['context']} {quantize}")

    monkeypatch.setattr(Pipeline, "load", load)
    flags = {"--dtype": "bfloat16", "--mesh": "data=2,context=4", "--out": "unwritten.mp4"}
    assert colorize({**BASE, **flags})[1]["error"]["what"] == "weights bfloat16 2 4 None"
    found = colorize({**BASE, **flags, "--quantize": "int8"})[1]
    assert found["error"]["what"] == "weights bfloat16 2 4 int8"


@pytest.mark.parametrize("out", ["out.mp4", "out.webm", "out.gif", "out.mkv", "frames"])
def test_every_output_format_holds_the_clip(colored, expected, out):
    frames = colored(out=out)
    assert frames.shape == expected.shape
    if out in ("out.mkv", "frames"):
        np.testing.assert_array_equal(frames, expected)
    else:  # of the same clip, and no other
        right, wrong = (np.abs(frames - wanted.astype(float)).mean() for wanted in (expected, expected[::-1]))
        assert right < wrong


def test_a_comparison_shows_sketch_references_and_result(colored, tmp_path):
    Image.fromarray(np.repeat(CLIP.reference, 2, axis=1)).save(tmp_path / "wide.png")
    frames = colored(reference=tmp_path / "wide.png", comparison=tmp_path / "all.mkv")
    shown = media.read_video(tmp_path / "all.mkv").frames
    sketch, reference, result = np.split(shown, [48, 144], axis=2)
    np.testing.assert_array_equal(sketch, SKETCH)
    np.testing.assert_array_equal(result, frames)
    np.testing.assert_array_equal(reference[-1], np.repeat(CLIP.reference, 2, axis=1))


def test_strict_reference_takes_the_canvas_from_the_reference_and_cuts_to_4k_plus_1_frames(colored, tmp_path):
    media_writing.write_video(tmp_path / "tall.mkv", CLIP.line_art[:11, :, :32], fps=24)
    Image.fromarray(np.pad(CLIP.reference, ((0, 15), (0, 15), (0, 0)))).save(tmp_path / "47x63.png")
    frames = colored(sketch=tmp_path / "tall.mkv", reference=tmp_path / "47x63.png", strict_reference=True)
    assert frames.shape == SKETCH.shape


def test_a_recorded_run_of_the_official_script_is_repeated(colored, tmp_path):
    """Noise, prompt and pixels of the fixture in, its frames out; the official script makes 8 frames of 5."""
    tensors, config = checkpoints.fixture()
    case = "ddim_no_cfg"
    inputs = {key.rsplit("/", 1)[1]: x for key, x in tensors.items() if key.startswith(f"inputs/{case}/")}
    sketch = inputs["control_video"][0].transpose(1, 2, 3, 0) * 255
    media_writing.write_video(tmp_path / "sketch.mkv", np.round(sketch).astype(np.uint8), fps=24)
    reference = np.round(inputs["ref_image"][0].transpose(1, 2, 0) * 255).astype(np.uint8)
    Image.fromarray(reference).save(tmp_path / "reference.png")
    noise = {name: inputs[name] for name in ("ref_noise", "init_latents")}
    safetensors_io.write(tmp_path / "noise.safetensors", noise, noise.items())
    ids = inputs["prompt_ids"][0].tolist()
    frames = colored(
        sketch=tmp_path / "sketch.mkv", reference=tmp_path / "reference.png",
        noise=tmp_path / "noise.safetensors", prompt="".join(chr(token - 3) for token in ids[: ids.index(1)]),
        invert="no", strict_reference=True, steps=config["cases"][case]["steps"],
        comparison=tmp_path / "all.mkv",
    )
    wanted = tensors[f"outputs/{case}/videos"][0].transpose(1, 2, 3, 0) * 255
    np.testing.assert_allclose(frames, wanted, atol=0.55)  # half a level of rounding
    assert media.read_video(tmp_path / "all.mkv").frames.shape == (8, 32, 3 * 48, 3)


# ---------------------------------------------------------------- the weights' own numbers


def test_without_weights_the_bundled_ones_are_used_and_named_once(colorize, colored, bundled, tmp_path):
    own = {"--weights": None, "--steps": None, "--guidance": None, "--window": None, "--overlap": None}
    code, report, err = colorize({**BASE, **own, "--sketch": "long.mkv", "--out": tmp_path / "out.mkv"})
    assert code == 0 and report["weights"] == str(bundled)
    said = [line for line in err.splitlines() if "bundled" in line]
    assert len(said) == 1 and "32x48 pixels, 9 frames; --weights for others" in said[0]
    wanted = colored(sketch="long.mkv", out="wanted.mkv", steps=3, window=9, overlap=4)
    np.testing.assert_array_equal(media.read_video(tmp_path / "out.mkv").frames, wanted)


def test_a_flag_wins_over_the_weights_own_number(colored, expected):
    np.testing.assert_array_equal(colored(weights="own"), expected)
    assert (colored(weights="own", steps=None) != expected).any()
    np.testing.assert_array_equal(colored(weights="own", steps=None), colored(steps=3))


def test_a_sketch_of_another_area_is_told_which_size_to_pass_and_not_resized(colorize, tmp_path):
    for weights, advised in (("own", False), ("own_of_larger_clips", True)):
        code, report, err = colorize({**BASE, "--weights": weights, "--out": tmp_path / f"{weights}.mkv"})
        assert code == 0 and (report["height"], report["width"]) == (32, 48)
        line = "sketch.mkv: 32x48, but the weights were trained at 64x112 and colour best near that: "
        assert (f"{line}--size 64x96" in err.splitlines()) == advised


def test_missing_bundled_weights_are_an_incomplete_installation(colorize, no_networks, monkeypatch, tmp_path):
    monkeypatch.setattr(weights_directory, "BUNDLED", tmp_path / "gone")
    for flags in ({**BASE, "--out": tmp_path / "out.mkv"}, {"--demo": True}, {"--jobs": "jobs.csv"}):
        code, report, _ = colorize({**flags, "--weights": None})
        assert code == 2 and "gone" in report["error"]["where"]
        assert "come with the package are missing" in report["error"]["what"]


def test_the_demo_shows_sketch_reference_result_and_truth_large(colorize, bundled, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, report, err = colorize({"--demo": True})
    assert code == 0 and "bundled weights" in err
    assert report.keys() == {"out", "frames", "height", "width", "seconds", "seconds_per_step", "weights"}
    assert (report["out"], report["weights"]) == ("demo.mp4", str(bundled))
    assert sorted(os.listdir()) == ["demo.mp4", "demo_comparison.mp4"]

    assert colorize({"--demo": True, "--out": "lossless.mkv"})[0] == 0
    result, shown = (media.read_video(name) for name in ("lossless.mkv", "lossless_comparison.mkv"))
    assert result.fps == shown.fps == demo.FPS
    drawn = demo.ClipsConfig()
    clip = draw_clip(9, 32, 48, seed=demo.SEED, fps=drawn.fps, config=drawn.toon)
    still = clip.reference[None].repeat(9, axis=0)
    panels = np.concatenate([clip.line_art, still, result.frames, clip.color], axis=2)
    np.testing.assert_array_equal(shown.frames, panels.repeat(8, axis=1).repeat(8, axis=2))


# ---------------------------------------------------------------- refused

REFUSED = [
    ({"--sketch": None}, "--sketch", "missing"),
    ({"--reference": None}, "--reference", "missing"),
    ({"--out": None}, "--out", "missing"),
    ({"--sketch": "nowhere.mp4"}, "nowhere.mp4", "does not exist"),
    ({"--sketch": "empty.mp4"}, "empty.mp4", "empty"),
    ({"--sketch": "truncated.mp4"}, "truncated.mp4", "truncated"),
    ({"--sketch": "text.mp4"}, "text.mp4", "not a video"),
    ({"--sketch": "full"}, "full", "no frames"),
    ({"--reference": "nowhere.png"}, "nowhere.png", "does not exist"),
    ({"--reference": ["reference.png", "text.png"]}, "text.png", "not a readable .png image"),
    ({"--reference": "sketch.mkv"}, "sketch.mkv", "not an image"),
    ({"--weights": "nowhere"}, "nowhere", "config.json is missing"),
    ({"--weights": "other_version"}, "config.json", "version 99"),
    ({"--weights": "bad_inference"}, "config.json: inference.steps", "0"),
    ({"--weights": "no_lcg"}, "no_lcg", "lacks lcg"),
    ({"--weights": "no_vae"}, "no_vae", "lacks vae"),
    ({"--out": "out.mp3"}, "out.mp3", "'.mp3'"),
    ({"--out": "sketch.mkv/out.mp4"}, "out.mp4", "sketch.mkv is not a folder"),
    ({"--out": "full"}, "full", "notes.txt"),
    ({"--out": "."}, ".", "names no file"),
    ({"--out": "./sketch.mkv"}, "sketch.mkv", "would replace the input sketch.mkv"),
    ({"--comparison": "./refused.mp4"}, "--comparison", "refused.mp4"),
    ({"--size": "0x5"}, "--size", "'0x5'"),
    ({"--size": "abc"}, "--size", "'abc'"),
    ({"--size": "32x99999"}, "--size", "'32x99999'"),
    ({"--size": "32x48", "--strict-reference": True}, "--size", "--strict-reference"),
    ({"--steps": 0}, "--steps", "0 steps"),
    ({"--steps": 2000}, "--steps", "2000 steps"),
    ({"--steps": 3, "--sampler": "pndm"}, "--steps", "3 steps"),
    ({"--seed": "many"}, "arguments", "--seed: invalid literal for int() with base 10: 'many'"),
    ({"--guidance": "nan"}, "--guidance", "nan"),
    ({"--guidance": -1}, "--guidance", "-1"),
    ({"--window": 49}, "--window", "49"),
    ({"--window": 16}, "--window", "16"),
    ({"--sketch": "long.mkv", "--overlap": 7}, "--overlap", "7"),
    ({"--sketch": "long.mkv", "--overlap": 16}, "--overlap", "16"),
    ({"--sampler": "dpm"}, "--sampler", "'dpm'"),
    ({"--mesh": "rows=2"}, "--mesh", "rows=2"),
    ({"--mesh": "data=9"}, "--mesh", "9"),
    ({"--dtype": "int8"}, "--dtype", "'int8'"),
    ({"--quantize": "int4"}, "arguments", "'int4'"),
    ({"--seed": -1}, "--seed", "-1"),
    ({"--seed": 2**32}, "--seed", str(2**32)),
    ({"--fps": 0}, "--fps", "0"),
    ({"--fps": "nan"}, "--fps", "nan"),
    ({"--noise": "noise_of_other_size.safetensors"}, "--noise", "(2, 4, 6, 4)"),
    ({"--noise": "noise_of_two.safetensors"}, "noise_of_two.safetensors", "(2, 3, 4, 4, 6)"),
    ({"--noise": "noise_of_other_names.safetensors"}, "noise_of_other_names.safetensors", "'noise'"),
    ({"--noise": "text.png"}, "text.png", ""),
    ({"--noise": "nowhere.safetensors"}, "nowhere.safetensors", "no file"),
    ({"--prompt": "z"}, "tokenizer", "token 125"),
    ({"--prompt": None, "--prompt-file": "nowhere.txt"}, "nowhere.txt", "No such file"),
    ({"--prompt": None, "--prompt-file": "latin1.txt"}, "latin1.txt", "utf-8"),
    ({"--prompt-file": "latin1.txt"}, "--prompt", "--prompt-file"),
    ({"--strict-reference": True, "--sketch": "long.mkv"}, "--strict-reference", "21 frames"),
    ({"--invert": "maybe"}, "arguments", "'maybe'"),
    ({"--colour": "red"}, "arguments", "--colour"),
    ({"--reference=reference.png": True}, "--reference", "2 times"),
    ({"--weights": "own", "--window": 17, "--overlap": 16, "--sketch": "long.mkv"}, "--overlap", "16"),
    ({"--demo": True}, "--sketch", "--demo"),
    ({"--demo": True, "--sketch": None}, "--reference", "--demo"),
    ({"--demo": True, "--sketch": None, "--reference": None, "--steps": 0}, "--steps", "0 steps"),
    ({"--jobs": "jobs.csv"}, "--sketch", "--jobs"),
]


@pytest.mark.parametrize(("changes", "where", "what"), REFUSED)
def test_bad_input_is_refused_before_networks_are_loaded(colorize, no_networks, folder, changes, where, what):
    before = sorted(folder.rglob("*"))
    code, report, err = colorize({**BASE, "--out": "refused.mp4", **changes})
    assert (code, list(report)) == (2, ["error"]), err
    error = report["error"]
    assert where in error["where"] and what in error["what"]
    assert error["expected"]
    assert error["where"] in err and error["what"] in err and error["expected"] in err
    assert sorted(folder.rglob("*")) == before


def test_damaged_weights_are_refused(colorize, folder, tmp_path):
    weights = shutil.copytree(folder / "weights", tmp_path / "weights")
    data = (weights / "vae.safetensors").read_bytes()
    (weights / "vae.safetensors").write_bytes(data[:-1])
    out, jobs = tmp_path / "out.mp4", tmp_path / "jobs.csv"
    jobs.write_text(f"sketch,reference,out\nsketch.mkv,reference.png,{out}\n")
    for flags in ({**BASE, "--out": out}, {**FAST, "--jobs": jobs}):
        code, report, _ = colorize({**flags, "--weights": weights})
        assert code == 2 and report["error"]["where"].endswith("vae.safetensors")
    assert not out.exists()


def test_weights_that_are_not_a_number_stop_the_run(colorize, folder, tmp_path):
    weights = shutil.copytree(folder / "weights", tmp_path / "weights")
    with safetensors_io.Reader(weights / "denoiser.safetensors") as reader:
        tensors = {name: reader.read(name) for name in reader.specs}
    tensors["out/bias"] = np.full_like(tensors["out/bias"], np.nan)
    safetensors_io.write(weights / "denoiser.safetensors", tensors, tensors.items())
    code, report, err = colorize({**BASE, "--weights": weights, "--out": tmp_path / "out.mp4"})
    assert code == 1 and "not finite after step 0 of ddim in float32" in report["error"]["what"]
    assert report["error"]["what"] in err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["out.mkv", "comparison.mkv"])
def test_a_full_disk_is_reported_and_the_result_never_comes_alone(colorize, monkeypatch, tmp_path, name):
    full_disk(monkeypatch, name)
    outputs = {"--out": tmp_path / "out.mkv", "--comparison": tmp_path / "comparison.mkv"}
    code, report, _ = colorize({**BASE, **outputs})
    assert code == 1 and f"No space left on device: '{name}'" in report["error"]["what"]
    assert not (tmp_path / "out.mkv").exists()


def full_disk(monkeypatch, name):
    """Writing to `name` fails."""
    write_video = media_writing.write_video

    def write(path, frames, fps):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write_video(path, frames, fps)

    monkeypatch.setattr(media_writing, "write_video", write)


# ---------------------------------------------------------------- --jobs


@pytest.fixture
def jobs(colorize, folder, monkeypatch, tmp_path):
    """Function of the text of a CSV file -> what the tool says; runs in a folder with the two input files."""
    for name in ("sketch.mkv", "reference.png"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    common = {**FAST, "--weights": folder / "weights"}

    def call(text, **changes):
        (tmp_path / "jobs.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        return colorize({**common, "--jobs": "jobs.csv", **changes})

    return call


def test_jobs_are_coloured_once_each_with_its_own_values(jobs, colored, folder, tmp_path):
    text = (
        "sketch,reference,out,prompt,seed,comparison\n"
        "sketch.mkv,reference.png,a.mkv,,,\n"
        f'{folder / "sketch.mkv"},reference.png; reference.png,results/b.mkv,"3\n4",1,both.mkv\n'
    )
    code, report, _ = jobs(text)
    assert code == 0 and report["skipped"] == [] and report["failed"] == {}
    assert [clip["out"] for clip in report["clips"]] == ["a.mkv", "results/b.mkv"]
    first, second = (media.read_video(tmp_path / clip["out"]).frames for clip in report["clips"])
    np.testing.assert_array_equal(first, colored(sketch="sketch.mkv", weights=folder / "weights"))
    wanted = colored(reference=["reference.png"] * 2, prompt="3\n4", seed=1, weights=folder / "weights")
    np.testing.assert_array_equal(second, wanted)
    assert media.read_video(tmp_path / "both.mkv").frames.shape == (9, 32, 4 * 48, 3)

    (tmp_path / "results" / "b.mkv").unlink()
    written = (tmp_path / "a.mkv").stat().st_mtime_ns
    code, report, _ = jobs(text)
    assert code == 0 and report["skipped"] == ["a.mkv"]
    assert [clip["out"] for clip in report["clips"]] == ["results/b.mkv"]
    assert (tmp_path / "a.mkv").stat().st_mtime_ns == written


def test_processes_share_the_jobs_whatever_is_done(jobs, tmp_path):
    text = "sketch,reference,out\n" + "".join(f"sketch.mkv,reference.png,{name}.mkv\n" for name in "abc")
    outs = []
    for process in (0, 1):
        code, report, _ = jobs(text, **{"--num-processes": 2, "--process-id": process})
        outs.append([clip["out"] for clip in report["clips"]])
        assert code == 0 and report["skipped"] == []
    assert outs == [["a.mkv", "c.mkv"], ["b.mkv"]]


def test_jobs_on_several_devices_are_those_of_one(jobs, colored, folder, monkeypatch, tmp_path):
    rows = "".join(f"sketch.mkv,reference.png,{name}.mkv,{seed}\n" for seed, name in enumerate("abcd"))
    with monkeypatch.context() as patch:
        full_disk(patch, "d.mkv")
        code, report, _ = jobs(f"sketch,reference,out,seed\n{rows}", **{"--devices": 2})
    assert code == 1 and list(report["failed"]) == ["d.mkv"]
    assert sorted(clip["out"] for clip in report["clips"]) == ["a.mkv", "b.mkv", "c.mkv"]
    code, report, _ = jobs(f"sketch,reference,out,seed\n{rows}", **{"--devices": 2})  # what is left
    assert code == 0 and report["skipped"] == ["a.mkv", "b.mkv", "c.mkv"]
    assert [clip["out"] for clip in report["clips"]] == ["d.mkv"]
    for seed, name in enumerate("abc"):
        wanted = colored(sketch="sketch.mkv", seed=seed, weights=folder / "weights")
        np.testing.assert_array_equal(media.read_video(tmp_path / f"{name}.mkv").frames, wanted)


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"--devices": 2}, "--devices"),
        ({"--num-processes": 2}, "--num-processes"),
        ({"--jobs": "jobs.csv", "--num-processes": 2, "--process-id": 2}, "--process-id"),
        ({"--jobs": "jobs.csv", "--devices": 99}, "--devices"),
        ({"--jobs": "jobs.csv", "--devices": 2, "--mesh": "context=2"}, "--devices"),
        ({"--step-cache": -1}, "--step-cache"),
        ({"--step-cache": 0.1, "--sampler": "pndm"}, "--step-cache"),
    ],
)
def test_impossible_devices_and_thresholds_are_refused(colorize, folder, tmp_path, monkeypatch, flags, where):
    monkeypatch.chdir(folder)
    base = {"--weights": "weights"} if "--jobs" in flags else {**BASE, "--out": tmp_path / "out.mkv"}
    (folder / "jobs.csv").write_text(f"sketch,reference,out\nsketch.mkv,reference.png,{tmp_path / 'a.mkv'}\n")
    code, report, _ = colorize({**base, **flags})
    assert code == 2 and report["error"]["where"] == where


def test_reuse_and_offloading_reach_the_pipeline(colorize, folder, tmp_path, monkeypatch):
    seen, original = {}, Pipeline.load

    def load(*args, **given):
        seen.update(given)
        return original(*args, **given)

    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.chdir(folder)
    found = []
    for name, value in (("exact", 0), ("reused", 1000)):
        out = tmp_path / f"{name}.mkv"
        more = {"--step-cache": value, "--offload": "yes", "--steps": 4, "--out": out}
        assert colorize({**BASE, **more})[0] == 0
        found.append(media.read_video(out).frames)
    assert seen["offload"] == "yes"
    assert np.abs(found[0].astype(int) - found[1]).max() > 0


def test_jobs_without_weights_use_the_bundled_ones(jobs, colored, bundled, tmp_path):
    numbers = {"--weights": None, "--steps": None, "--window": None, "--overlap": None}
    text = "sketch,reference,out,steps\nsketch.mkv,reference.png,a.mkv,\nsketch.mkv,reference.png,b.mkv,2\n"
    code, report, err = jobs(text, **numbers)
    assert code == 0 and report["weights"] == str(bundled) and err.count("bundled weights") == 1
    for name, steps in (("a.mkv", 3), ("b.mkv", 2)):
        wanted = colored(sketch="sketch.mkv", weights=bundled, steps=steps)
        np.testing.assert_array_equal(media.read_video(tmp_path / name).frames, wanted)


def test_nothing_is_loaded_when_all_jobs_are_done(jobs, no_networks, tmp_path):
    shutil.copy(tmp_path / "sketch.mkv", tmp_path / "a.mkv")
    code, report, _ = jobs("sketch,reference,out\ngone.mkv,reference.png,a.mkv\n")
    assert code == 0 and report["skipped"] == ["a.mkv"] and report["clips"] == []


def test_a_job_that_fails_does_not_stop_the_others(jobs, monkeypatch, tmp_path):
    full_disk(monkeypatch, "b.mkv")
    rows = "".join(f"sketch.mkv,reference.png,{name}.mkv\n" for name in "abc")
    code, report, err = jobs(f"sketch,reference,out\n{rows}")
    assert code == 1 and list(report["failed"]) == ["b.mkv"]
    assert "No space left" in report["failed"]["b.mkv"] and "b.mkv" in err
    assert [clip["out"] for clip in report["clips"]] == ["a.mkv", "c.mkv"]
    assert sorted(path.name for path in tmp_path.glob("?.mkv")) == ["a.mkv", "c.mkv"]


HEADER, ROW = "sketch,reference,out", "sketch.mkv,reference.png,b.mkv"
BAD_JOBS = [
    (f"{HEADER},colour\n{ROW},red\n", "jobs.csv", "colour"),
    (f"{HEADER},out\n{ROW},c.mkv\n", "jobs.csv", "out"),
    ("sketch,out\nsketch.mkv,b.mkv\n", "jobs.csv", "no reference"),
    (f"{HEADER}\n", "jobs.csv", "no rows"),
    ("", "jobs.csv", "no sketch"),
    (f"{HEADER}\n\nsketch.mkv,,b.mkv\n", "jobs.csv, line 3", "reference is empty"),
    (f"{HEADER}\nsketch.mkv,reference.png\n", "jobs.csv, line 2", "fewer cells"),
    (f"{HEADER}\n{ROW},c\n", "jobs.csv, line 2", "more cells"),
    (f"{HEADER},seed\n{ROW},one\n", "jobs.csv, line 2", "'one'"),
    (f"{HEADER},steps\n{ROW},0\n", "jobs.csv, line 2: --steps", "0 steps"),
    (f"{HEADER},invert\n{ROW},maybe\n", "jobs.csv, line 2: --invert", "'maybe'"),
    (f"{HEADER}\ngone.mkv,reference.png,b.mkv\n", "jobs.csv, line 2: gone.mkv", "does not exist"),
    (f"{HEADER}\nsketch.mkv,gone.png,b.mkv\n", "jobs.csv, line 2: gone.png", "does not exist"),
    (f"{HEADER}\nsketch.mkv,reference.png,b.doc\n", "jobs.csv, line 2: b.doc", "'.doc'"),
    (f"{HEADER}\n{ROW}\ngone.mkv,reference.png,c.mkv\n", "jobs.csv, line 3: gone.mkv", "does not exist"),
    (f"{HEADER}\n{ROW}\nsketch.mkv,reference.png,./b.mkv\n", "jobs.csv, line 3", "jobs.csv, line 2"),
    (f"{HEADER},comparison\n{ROW},c.mkv\nsketch.mkv,reference.png,c.mkv,\n", "line 3", "writes c.mkv"),
    (f'{HEADER}\n"{ROW}\n', "jobs.csv", "unexpected end of data"),
    (f"{HEADER}\n{ROW}\n".replace("b.", "caf\u00e9.").encode("latin-1"), "jobs.csv", "utf-8"),
]


@pytest.mark.parametrize(("text", "where", "what"), BAD_JOBS)
def test_bad_jobs_are_refused_before_the_first_is_run(jobs, no_networks, tmp_path, text, where, what):
    before = {*tmp_path.iterdir(), tmp_path / "jobs.csv"}
    code, report, err = jobs(text)
    assert (code, list(report)) == (2, ["error"]), err
    assert where in report["error"]["where"] and what in report["error"]["what"]
    assert set(tmp_path.iterdir()) == before


def test_jobs_need_a_file(jobs, no_networks):
    code, report, _ = jobs("", **{"--jobs": "nowhere.csv"})
    assert code == 2 and report["error"]["where"] == "nowhere.csv"


# ---------------------------------------------------------------- as a process


def test_the_demo_needs_nothing_and_leaves_its_two_videos(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--demo", "--json", "--steps", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == {"out", "frames", "height", "width", "seconds", "seconds_per_step", "weights"}
    assert (report["out"], report["weights"]) == ("demo.mp4", str(weights_directory.BUNDLED))
    assert sorted(os.listdir(tmp_path)) == ["demo.mp4", "demo_comparison.mp4"]
    assert media.read_video(tmp_path / "demo.mp4").frames.any()


def test_ctrl_c_during_denoising_leaves_nothing(folder, tmp_path):
    """The progress bar on a terminal tells when to interrupt."""
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))  # a terminal without columns has no room for a progress bar
    process = subprocess.Popen(
        [sys.executable, TOOL, "--demo", "--json", "--steps", "1000", "--weights", folder / "own"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True,
        # a test run in the background of a script ignores Ctrl-C, and would hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(stderr)
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    shown, updates = b"", 0
    while chunk := read_terminal(terminal):
        shown += chunk
        if b"denoise" in chunk:
            # Python drops an interrupt that arrives inside a callback of the garbage collector: press again
            # where the bar goes on, as a user would
            if updates % 20 == 0:
                process.send_signal(signal.SIGINT)
            updates += 1
    stdout, _ = process.communicate()
    watchdog.cancel()
    os.close(terminal)
    assert process.returncode == 130, shown
    assert "interrupted" in json.loads(stdout.splitlines()[-1])["error"]["what"]
    assert b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


def read_terminal(terminal):
    """What there is to read; nothing once the other side is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def test_a_refusal_is_one_json_object_on_the_last_line(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--json", "--sketch", "gone.mp4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1])["error"].keys() == {"what", "where", "expected", "fix"}
    assert done.stderr.startswith("error: --reference: is missing") and "Traceback" not in done.stderr


def test_help_names_every_flag(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main(tool.run, tool.Arguments)
    assert not stop.value.code
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert set(FLAGS.split()) <= words
