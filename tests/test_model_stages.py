"""Networks that a user brings, inside data preparation: what they say ends up in the dataset, once."""

import dataclasses

import numpy as np
import pytest
from test_prepare import CONFIG, contents, run, table_of, toon
from tiny_models import WIDTH, save_clip, save_llava

from animecolor_jax.errors import InputError
from data_pipeline import model_stages
from data_pipeline.prepare import load_models

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed in (1, 2):
        toon(folder / f"{seed}.mp4", seed, frames=12)
    (folder / "2.txt").unlink()  # one clip has a caption, the other needs one
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    head = tmp_path_factory.mktemp("head") / "head.npz"
    weight = np.random.default_rng(0).normal(size=(1, WIDTH))
    np.savez(head, weight=weight, bias=np.zeros(1))
    clip, llava = (tmp_path_factory.mktemp(name) for name in ("clip", "llava"))
    return save_clip(clip), head, save_llava(llava)


def test_captions_and_scores_reach_the_records_and_are_computed_once(videos, networks, tmp_path, monkeypatch):
    clip, head, llava = networks
    models = load_models(aesthetic=(clip, head), captioner=llava)
    models.captioner.max_new_tokens = 4
    report = run(videos, tmp_path / "out", models=models)
    assert report["clips"] == 2
    table = table_of(tmp_path / "out")
    given, made = table["1.mp4", 0]["caption"], table["2.mp4", 0]["caption"]
    assert given and made and "word" in made and "word" not in given
    assert {record["caption"].decode() for record in contents(tmp_path / "out").values()} == {given, made}
    scores = {source: row["aesthetic"] for (source, _), row in table.items()}
    assert len(set(scores.values())) == 2 and all(np.isfinite(list(scores.values())))

    monkeypatch.setattr(model_stages, "sample_frames", None)  # nothing is shown to a network again
    again = run(videos, tmp_path / "out", models=load_models(aesthetic=(clip, head), captioner=llava))
    assert again == report and table_of(tmp_path / "out") == table
    # a threshold between the two drops one of them
    between = float(np.mean(list(scores.values())))
    strict = dataclasses.replace(CONFIG.curation, min_aesthetic=between)
    report = run(videos, tmp_path / "out", dataclasses.replace(CONFIG, curation=strict), models=models)
    assert report["clips"] == 1 and report["dropped"] == {"aesthetic": 1}


def test_wrong_models_are_refused_before_any_work(networks, tmp_path):
    clip, head, llava = networks
    for options, said in (
        ({"aesthetic": (clip,)}, "--aesthetic"),
        ({"captioner": clip}, "vision-language"),
        ({"captioner": tmp_path / "nowhere"}, "nowhere"),
        ({"text_detector": llava}, "llava"),
    ):
        with pytest.raises(InputError, match=said):
            load_models(**options)


def test_another_network_speaks_anew(networks, tmp_path):
    clip, head, _ = networks
    first = model_stages.fingerprint((clip, head))
    assert model_stages.fingerprint((clip, head)) == first
    other = tmp_path / "head.npz"
    other.write_bytes(head.read_bytes())
    assert model_stages.fingerprint((clip, other)) != first
