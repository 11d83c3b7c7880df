"""The built-in text detector on drawn clips that it was not fitted to, and detectors of the user's."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from animecolor_jax.errors import InputError
from data_pipeline import text_detection, text_fitting, text_row_weights
from data_pipeline.text_detection import TEXT_THRESHOLD, ModelTextDetector, surest_region, text_score
from data_pipeline.toon import draw_clip, draw_subtitle

TOOL = Path(__file__).parents[1] / "tools" / "fit_text_detector.py"
CLIPS, FIRST_SEED = 40, 900_000  # seeds from 900 000 on took no part in the fit
TEXT = (
    "Hey! Wait for me. Where are you going? I never said that it was your fault, Mina! Look: over there, "
    "behind the old bridge... The train leaves at 7:45. Nothing will ever change. Thank you, big brother"
)


def drawn(seed, height=180, width=320):
    return draw_clip(4, height, width, seed=seed, fps=4).color


def subtitled(frames, seed):
    rng = np.random.default_rng(seed)
    words = TEXT.split()
    start, length = rng.integers(len(words) - 9), rng.integers(1, 10)
    text = " ".join(words[start : start + length])
    return draw_subtitle(frames, text if len(text) > 3 else "Hey!", rng)


@pytest.mark.slow
def test_nine_of_ten_subtitles_are_found_at_five_percent_false_alarms():
    with_text = [text_score(subtitled(drawn(seed), seed)) for seed in range(FIRST_SEED, FIRST_SEED + CLIPS)]
    without = [text_score(drawn(seed)) for seed in range(FIRST_SEED + CLIPS, FIRST_SEED + 2 * CLIPS)]
    assert np.mean(np.array(with_text) >= TEXT_THRESHOLD) >= 0.9
    assert np.mean(np.array(without) >= TEXT_THRESHOLD) <= 0.05
    assert min(without) >= 0 and max(with_text) <= 1


def test_line_art_is_not_taken_for_writing():
    drawings = (draw_clip(3, 180, 320, seed=seed, fps=4).sketch for seed in range(910_000, 910_020))
    scores = [text_score(np.repeat(sketch[..., None], 3, axis=-1)) for sketch in drawings]
    assert np.mean(np.array(scores) >= TEXT_THRESHOLD) <= 0.05


@pytest.mark.parametrize("height, width", [(96, 160), (270, 480), (540, 960), (320, 240)])
def test_subtitles_are_found_at_any_size_of_frame(height, width):
    scores = []
    for seed in range(FIRST_SEED, FIRST_SEED + 4):
        frames = drawn(seed, height, width)
        scores.append((text_score(frames), text_score(draw_subtitle(frames, "Where are you?", _rng(seed)))))
    without, found = np.array(scores).T
    assert np.median(without) < TEXT_THRESHOLD <= np.median(found)


def _rng(seed):
    return np.random.default_rng(seed)


def test_subtitle_of_a_third_of_the_clip_counts_as_much_as_one_that_stays():
    frames = np.concatenate([drawn(FIRST_SEED), drawn(FIRST_SEED)[::-1], drawn(FIRST_SEED)])[:9]
    titled = draw_subtitle(frames, "Where are you going?", _rng(1))
    short = frames.copy()
    short[3:6] = titled[3:6]
    assert text_score(titled) >= TEXT_THRESHOLD
    assert text_score(short) >= TEXT_THRESHOLD
    assert text_score(frames) < TEXT_THRESHOLD


def test_one_frame_and_empty_pictures_have_a_score():
    assert text_score(drawn(FIRST_SEED)[:1]) < TEXT_THRESHOLD
    assert text_score(subtitled(drawn(FIRST_SEED), 1)[:1]) >= TEXT_THRESHOLD
    for level in (0, 128, 255):
        assert text_score(np.full((2, 96, 160, 3), level, np.uint8)) == 0


def test_frames_of_another_form_are_refused():
    for shape, dtype in (((2, 96, 160), np.uint8), ((2, 96, 160, 3), float), ((0, 96, 160, 3), np.uint8)):
        with pytest.raises(InputError, match=r"frames: \["):
            text_score(np.zeros(shape, dtype))


# ---------------------------------------------------------------- fitting

opencv_5 = pytest.mark.skipif(not hasattr(cv2, "FontFace"), reason="draws letters with fonts of OpenCV 5")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tools_fit_text_detector", TOOL)
    module = sys.modules["tools_fit_text_detector"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(tool, monkeypatch, *flags):
    """Exit code of the tool."""
    monkeypatch.setattr(sys, "argv", ["fit_text_detector.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        tool.cli.main(tool.run, tool.Arguments)
    return stop.value.code


@opencv_5
@pytest.mark.parametrize("kind", text_fitting.KINDS)
def test_fitting_clips_differ_by_their_writing_and_tell_where_it_is(kind):
    for seed in range(3):
        plain, titled = (text_fitting.draw_text_clip(kind, seed, text, (180, 320)) for text in (False, True))
        again = text_fitting.draw_text_clip(kind, seed, True, (180, 320))
        np.testing.assert_array_equal(titled.frames, again.frames)
        assert plain.frames.shape == titled.frames.shape == (text_fitting.FRAMES, 180, 320, 3)
        assert plain.box is None and not plain.shown.any() and 2 * titled.shown.sum() >= len(titled.shown)
        left, top, right, bottom = titled.box
        changed = np.abs(plain.frames.astype(int) - titled.frames).max((1, 2, 3))
        assert (changed[titled.shown] > 50).all()
        if kind == "toon":  # the others are compressed besides
            assert (changed > 0).tolist() == titled.shown.tolist()
            outside = np.ones((180, 320), bool)
            outside[top:bottom, left:right] = False
            np.testing.assert_array_equal(plain.frames[:, outside], titled.frames[:, outside])


@opencv_5
def test_fitted_weights_separate_their_clips_and_the_detector_reads_them(tool, monkeypatch, tmp_path):
    clips = [text_fitting.draw_text_clip("toon", seed, bool(seed % 2), (180, 320)) for seed in range(12)]
    rows = tool.Rows(clips)
    assert rows.with_text.tolist() == [False, True] * 6
    assert not set(rows.clip[rows.labels != 0]) & set(np.flatnonzero(~rows.with_text))
    weights = tool.fit_detector(rows, hidden=4, decay=5e-4, steps=100, false_alarms=0.2)
    logits = tool.logits(weights, rows.features)
    writing, other = logits[rows.labels == 1], logits[rows.labels == 0]
    assert (writing[:, None] > other).mean() > 0.97

    file = tmp_path / "weights.py"
    file.write_text(tool.python_source(weights))
    read = {}
    exec(file.read_text(), read)
    for name in weights:
        monkeypatch.setattr(text_detection, name, read[name])
    scores = [text_score(clip.frames) for clip in clips[:4]]
    expected = [tool.score_with(weights, clip.frames) for clip in clips[:4]]
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    assert max(scores[0], scores[2]) < min(scores[1], scores[3])


def test_weights_in_the_repository_are_as_the_tool_writes_them(tool):
    names = ("MEAN", "SCALE", "HIDDEN_WEIGHTS", "HIDDEN_BIAS", "WEIGHTS", "BIAS")
    weights = {name: getattr(text_row_weights, name) for name in names}
    assert tool.python_source(weights) == Path(text_row_weights.__file__).read_text()


@opencv_5
def test_fitting_tool_reports_held_out_clips(tool, monkeypatch, tmp_path, capsys):
    small = ("--held-out", 2, "--size", "96x160", "--json")
    assert run_tool(tool, monkeypatch, "--evaluate", *small) in (0, 1)
    present = json.loads(capsys.readouterr().out.splitlines()[-1])
    flags = ("--out", tmp_path / "weights.py", "--clips", 4, "--steps", 5, *small)
    assert run_tool(tool, monkeypatch, *flags) in (0, 1)
    fitted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fitted.pop("out") == str(tmp_path / "weights.py") and (tmp_path / "weights.py").exists()
    for report in (present, fitted):
        assert {kind: set(figures) for kind, figures in report.items()} == dict.fromkeys(
            text_fitting.KINDS, {"clips", "recall", "false_alarms"}
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--out: is missing"),
        (("--out", "w.py", "--evaluate"), "--out: is given with --evaluate"),
        (("--out", "missing/w.py"), "missing/w.py: its folder is missing"),
        (("--evaluate", "--held-out", "0"), "--held-out: 0"),
        (("--out", "."), ".: is a folder"),
        (("--evaluate", "--size", "40x400"), "--size: 40x400"),
        (("--out", "w.py", "--seed", "899990"), "--seed, --clips: reach 900790"),
        (("--out", "w.py", "--false-alarms", "1"), "--false-alarms: 1.0"),
        (("--out", "w.py", "--fonts", "."), "has no .ttf file"),
    ],
)
def test_fitting_tool_refuses_bad_arguments_before_drawing(
    tool, monkeypatch, tmp_path, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "draw_text_clip", None)  # calling it would fail
    assert run_tool(tool, monkeypatch, *flags) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- detectors of the user's


@pytest.fixture
def frames():
    return np.random.default_rng(4).integers(0, 256, (3, 48, 80, 3), np.uint8)


def save_object_detector(folder, labels):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=16,
        image_size=[64, 96], num_detection_tokens=5, id2label=dict(enumerate(labels)),
        use_mid_position_embeddings=False,
    )  # fmt: skip
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 48, "longest_edge": 96}
    processor = transformers.YolosImageProcessorPil(size=size, do_pad=False)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_object_detector_scores_its_surest_text_box(frames, tmp_path):
    import torch
    import transformers

    folder = save_object_detector(tmp_path, ["text", "dog", "handwritten text"])
    detector = ModelTextDetector(folder, batch_size=2)
    model = transformers.YolosForObjectDetection.from_pretrained(folder).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.tensor(((frames / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        chances = model(pixel_values=pixels).logits.softmax(-1)  # [K, 5, 3 labels and "nothing"]
    best, label = chances[..., :3].max(-1)
    expected = (best * torch.isin(label, torch.tensor([0, 2]))).amax(-1).tolist()
    assert max(expected) > 0
    assert detector(frames) == pytest.approx(max(expected), abs=1e-4)
    assert detector(frames[:1]) == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.torch
def test_object_detector_without_a_text_label_is_refused(tmp_path):
    folder = save_object_detector(tmp_path, ["dog", "cat"])
    with pytest.raises(InputError, match="its labels are dog, cat"):
        ModelTextDetector(folder)


@pytest.mark.torch
def test_paddle_detector_scores_the_surest_region_of_its_map(frames, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.PPOCRV5MobileDetConfig()
    transformers.PPOCRV5MobileDetForObjectDetection(config).save_pretrained(tmp_path)
    mean, std = [0.406, 0.456, 0.485], [0.225, 0.224, 0.229]
    preprocessing = {"limit_side_len": 64, "limit_type": "max", "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    detector = ModelTextDetector(tmp_path)
    pixels = detector._prepare(frames[0])
    assert pixels.shape == (3, 32, 64)  # 38.4 x 64 in multiples of 32
    flat = detector._prepare(np.full((32, 64, 3), (255, 0, 51), np.uint8))
    np.testing.assert_allclose(
        flat[:, 0, 0], [(0.2 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225], rtol=1e-5
    )

    model = transformers.PPOCRV5MobileDetForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        maps = model(torch.tensor(np.stack([detector._prepare(frame) for frame in frames]))).last_hidden_state
    assert maps.shape == (3, 1, 32, 64)
    assert detector(frames) == pytest.approx(max(surest_region(m) for m in maps[:, 0].numpy()), abs=1e-5)


def test_surest_region_is_thick_and_has_the_highest_mean():
    probability = np.full((32, 64), 0.1, np.float32)
    probability[4:10, 4:22], probability[4:10, 22:40] = 0.5, 0.7  # one region, 0.6 on average
    probability[15:20, 4:40] = 0.4
    probability[25, 4:40] = 0.9  # one pixel thick: no writing
    assert surest_region(probability) == pytest.approx(0.6)
    assert surest_region(np.full((32, 64), 0.2, np.float32)) == 0


def test_directories_that_are_no_detector_are_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="is not a directory"):
        ModelTextDetector(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        ModelTextDetector(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="'bert'"):
        ModelTextDetector(tmp_path)
