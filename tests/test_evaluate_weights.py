"""tools/evaluate.py --weights: a dataset's clips are coloured and scored from memory."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_datasets

from animecolor_jax import cli, media
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.generate import ColorConfig, Colored, method_name
from animecolor_jax.evaluation.protocol import PRESETS, Protocol
from animecolor_jax.metrics import image
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.weights import write_initial

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
PROTOCOL = Protocol("own")
QUICK = {"steps": 2, "guidance": 1.0, "clips": 2}
CLIPS = {small_datasets.WIDE: {"train": 0, "test": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    write_initial(root / "weights", preset("tiny"))
    small_datasets.write_clips(root / "data", CLIPS)
    (root / "own.toml").write_text("")
    return root


@pytest.fixture(scope="module")
def evaluate(folder):
    """Function that runs the tool on two clips, written to folder/out, and returns its JSON."""
    spec = importlib.util.spec_from_file_location("tools_evaluate_weights", TOOL)
    module = sys.modules["tools_evaluate_weights"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = [f"--color.{name}={value}" for name, value in QUICK.items()]
    argv = ["--weights", folder / "weights", "--data", folder / "data", "--protocol", folder / "own.toml"]
    argv += ["--metrics", "psnr", "sa", "--out", folder / "out", *flags]
    args = cli.parse(module.Arguments, [str(arg) for arg in argv], default=module.Arguments())

    def call():
        found, holds = module.run(args)
        assert holds
        return found

    return call


@pytest.fixture(scope="module")
def report(evaluate):
    return evaluate()


def test_every_clip_of_the_split_is_coloured_and_scored_from_memory(folder, report):
    assert (report["clips"], report["frames"]) == (2, 18) and "memory" in report["pixel_source"]
    data = Colored(folder / "weights", folder / "data", "w", ColorConfig(**QUICK), PROTOCOL, folder / "out")
    scores = []
    for name in data.names:
        written = media.read_video(data.folder / f"{name}.mkv").frames
        scores.append(image.psnr(written, data.read_clip("target", name)).mean())
    assert report["psnr"] == pytest.approx(float(np.mean(scores)), abs=1e-4)
    assert (folder / "out" / "report.html").is_file()


def test_pixels_are_those_of_the_pipeline_alone_on_any_device(folder, report):
    data = Colored(folder / "weights", folder / "data", "w", ColorConfig(**QUICK), PROTOCOL, folder / "out")
    name = data.names[1]
    row = data._read(name)
    assert row["sketch"].shape == (9, 32, 48) and (row["video"][0] == row["reference"][0]).all()
    with jax.default_device(jax.local_devices()[0]):  # its programs are compiled; the second clip had others
        video = Pipeline.load(folder / "weights")(
            np.repeat(row["sketch"][..., None], 3, -1), row["reference"][0], prompt=row["caption"],
            num_steps=2, guidance_scale=1.0, key=jax.random.key(43),
        )  # fmt: skip
    written = media.read_video(data.folder / f"{name}.mkv").frames
    np.testing.assert_array_equal(written, video)


def test_a_finished_evaluation_colours_nothing_again(folder, evaluate, report, monkeypatch):
    monkeypatch.setattr(Colored, "_color", None)
    assert evaluate()["methods"] == report["methods"]
    shutil.rmtree(folder / "out" / "state")  # as where other metrics are asked for
    assert evaluate()["methods"] == report["methods"]


def test_processes_share_the_clips_and_each_can_show_all(folder):
    config, float_values = ColorConfig(steps=2), Protocol("own", size=(16, 24), values="float")
    parts = [
        Colored(folder / "weights", folder / "data", "w", config, float_values, None, process, 2)
        for process in range(2)
    ]
    assert [part.names for part in parts] == [["test-00000", "test-00002"], ["test-00001"]]
    for part in parts:
        shown = part.read_clip("target", "test-00000")
        assert shown.dtype == np.uint8 and shown.shape == (9, 16, 24, 3)


def test_numbers_that_are_not_given_are_those_of_the_weights(folder, tmp_path):
    weights = shutil.copytree(folder / "weights", tmp_path / "weights")
    values = json.loads((weights / "config.json").read_text())
    values["inference"] = {"steps": 3, "guidance": 1.0, "window": 9, "overlap": 4}
    (weights / "config.json").write_text(json.dumps(values))

    def opened(directory, **numbers):
        return Colored(directory, folder / "data", "w", ColorConfig(**numbers), PROTOCOL, None)

    def numbers(data):
        return data.config.steps, data.config.guidance

    assert numbers(opened(weights)) == (3, 1.0) and numbers(opened(weights, guidance=2.0)) == (3, 2.0)
    assert numbers(opened(folder / "weights")) == (50, 6.0)
    before = opened(weights).settings
    values["inference"]["window"] = 17
    (weights / "config.json").write_text(json.dumps(values))
    assert opened(weights).settings != before  # other windows, other pixels


def test_weights_are_called_as_their_folder_or_their_run(tmp_path):
    assert method_name(tmp_path / "stage4" / "weights") == "weights"
    (tmp_path / "stage4").mkdir()
    (tmp_path / "stage4" / "run.json").write_text("{}")
    assert method_name(tmp_path / "stage4" / "weights") == "stage4"


def test_what_cannot_be_done_is_refused(folder):
    with pytest.raises(InputError, match="masks"):
        Colored(folder / "weights", folder / "data", "w", ColorConfig(), PRESETS["anidoc-256-fg"], None)
    with pytest.raises(InputError, match="called 'sketch'"):
        Colored(folder / "weights", folder / "data", "sketch", ColorConfig(), PROTOCOL, None)
    with pytest.raises(InputError, match="--color.steps"):
        ColorConfig(steps=0)
    with pytest.raises(InputError, match="split"):
        Colored(folder / "weights", folder / "data", "w", ColorConfig(split="train"), PROTOCOL, None)
