"""What a weights directory says about its use, and that the bundled one is installed with the package."""

import configparser
import dataclasses
import json
from pathlib import Path

import jax
import pytest

from animecolor_jax.config import COMPONENTS, SchedulerConfig
from animecolor_jax.errors import InputError
from animecolor_jax.weights import BUNDLED, Inference, Weights, WeightsWriter

SMALL = Inference(steps=20, guidance=1, window=9, overlap=4, size=(64, 96))


def write(directory, settings=None):
    with WeightsWriter(directory) as writer:
        writer.scheduler(SchedulerConfig(), {})
        if settings is not None:
            writer.inference(settings)
    return directory


def test_weights_say_how_they_are_best_called(tmp_path):
    assert Weights(write(tmp_path / "weights", SMALL)).inference == SMALL


def test_weights_that_say_nothing_are_called_as_published(tmp_path):
    published = Inference(steps=50, guidance=6.0, window=49, overlap=16, size=None)
    weights = Weights(write(tmp_path / "weights"))
    assert weights.inference == published and "inference" not in weights.values


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"steps": 0}, "inference.steps", "0"),
        ({"steps": 1001}, "inference.steps", "1001"),
        ({"steps": 20.0}, "inference.steps", "20.0"),
        ({"steps": True}, "inference.steps", "True"),
        ({"guidance": "6"}, "inference.guidance", "'6'"),
        ({"guidance": float("nan")}, "inference.guidance", "nan"),
        ({"guidance": -1.0}, "inference.guidance", "-1.0"),
        ({"window": "9"}, "inference.window", "'9'"),
        ({"window": -9}, "inference.window", "-9"),
        ({"window": 12}, "inference.window", "12"),
        ({"overlap": None}, "inference.overlap", "None"),
        ({"overlap": 8}, "inference.overlap", "8 frames, with a window of 9"),
        ({"size": [64]}, "inference.size", "(64,)"),
        ({"size": [64, 90]}, "inference.size", "(64, 90)"),
        ({"size": [0, 96]}, "inference.size", "(0, 96)"),
        ({"size": "64x96"}, "inference.size", "'64x96'"),
        ({"colour": "red"}, "config.json", "red"),
    ],
)
def test_a_bad_inference_section_is_refused(tmp_path, changes, where, what):
    path = write(tmp_path / "weights", SMALL) / "config.json"
    values = json.loads(path.read_text())
    values["inference"].update(changes)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        Weights(path.parent)
    assert str(path) in caught.value.where and caught.value.where.endswith(where)
    assert what in caught.value.what and caught.value.expected


def test_an_inference_section_is_an_object(tmp_path):
    path = write(tmp_path / "weights") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "inference": [20, 1]}))
    with pytest.raises(InputError, match="inference is"):
        Weights(path.parent)


def test_settings_are_checked_before_they_are_written():
    with pytest.raises(InputError, match="inference.overlap"):
        dataclasses.replace(SMALL, overlap=16)


def test_all_files_of_bundled_weights_are_installed():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["animecolor_jax"].split()
    names = ["config.json", "tokenizer/byte_level.json", *(f"{name}.safetensors" for name in COMPONENTS)]
    for name in names:
        assert any(Path(BUNDLED.name, name).match(pattern) for pattern in patterns), name


def test_reading_compiles_nothing(caplog):
    jax.clear_caches()
    with jax.log_compiles():
        Weights(BUNDLED).load("denoiser", dtype="float32")
    assert not [each for each in caplog.messages if each.startswith("Compiling")]
