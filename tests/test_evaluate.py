"""tools/evaluate.py from flags to files: scores, resuming, several processes, what is skipped and refused."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from animecolor_jax import cli, media_writing
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import run as evaluation
from animecolor_jax.evaluation.protocol import Protocol
from animecolor_jax.evaluation.results import METRICS
from animecolor_jax.evaluation.score import Scorer
from animecolor_jax.metrics import image
from animecolor_jax.parity.metrics import procedural_inception, procedural_lpips
from data_pipeline.toon import draw_clip

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
CLIPS = {
    name: draw_clip(seed=seed, num_frames=frames, height=32, width=48)
    for name, seed, frames in (("a", 1, 4), ("b", 2, 4), ("c", 3, 5))
}
FREE = ("psnr", "ssim", "sa", "edmd", "tc_dis", "flicker")  # of networks
PROTOCOL = Protocol("small", size=(32, 48))


def noisy(frames, strength=20, seed=0):
    noise = np.random.default_rng(seed).integers(-strength, strength + 1, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tools_evaluate", TOOL)
    module = sys.modules["tools_evaluate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders target, same, noisy, and a protocol of their size."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, clip in CLIPS.items():
        media_writing.write_video(root / "target" / f"{name}.mkv", clip.color, 24)
        media_writing.write_video(root / "same" / f"{name}.mkv", clip.color, 24)
        media_writing.write_video(root / "noisy" / name, noisy(clip.color), 24)
        art = np.repeat(clip.sketch[..., None], 3, axis=-1)
        media_writing.write_video(root / "sketch" / f"{name}.mkv", art, 24)
    (root / "small.toml").write_text('size = "32x48"')
    return root


@pytest.fixture
def evaluate(tool, folders, monkeypatch, capsys):
    """Function of flags -> (exit code, last line of stdout as JSON, stderr)."""
    monkeypatch.delenv("ANIMECOLOR_METRICS", raising=False)

    def call(*flags, **changes):
        given = {"--target": folders / "target", "--protocol": folders / "small.toml"} | changes
        given = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), *given, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main(tool.run, tool.Arguments)
        out, err = capsys.readouterr()
        return stop.value.code, json.loads(out.splitlines()[-1]), err

    return call


def test_scores_are_the_metrics_of_the_frames_and_identical_clips_are_perfect(evaluate, folders, tmp_path):
    methods = (f"{folders}/same", f"worse={folders}/noisy")
    code, found, err = evaluate("--generated", *methods, "--out", tmp_path)
    assert code == 0 and list(found["methods"]) == ["same", "worse"]
    assert (found["protocol"], found["clips"], found["frames"]) == ("small", 3, 13)
    same, worse = found["methods"].values()
    assert list(same) == list(METRICS)
    assert {name: same[name] for name in FREE} == {
        "psnr": 100, "ssim": 1, "sa": 0, "edmd": 0, "tc_dis": 1, "flicker": 0,
    }  # fmt: skip
    wanted = [image.psnr(noisy(clip.color), clip.color).mean() for clip in CLIPS.values()]
    assert worse["psnr"] == pytest.approx(float(np.mean(wanted)), abs=1e-5)
    wanted = [float(image.flicker(noisy(c.color)[None], c.color[None])[0]) for c in CLIPS.values()]
    assert worse["flicker"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert found["pixel_source"] == "target ffv1; same ffv1; worse png; line art of the targets"
    for name in set(METRICS) - {*FREE}:
        assert worse[name] is None and "needs" in found["skipped"][name]
    assert "alexnet-owt-7be5be79.pth" in err and "i3d_torchscript.pt" in err

    table = pq.read_table(tmp_path / "clips.parquet").to_pylist()
    assert {(row["clip"], row["method"], row["frames"]) for row in table} == {
        (name, method, len(clip.color)) for name, clip in CLIPS.items() for method in found["methods"]
    }
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["methods"] == found["methods"]
    for name in ("table.md", "table.tex", "report.html", "figures/a-grid.png", "figures/a-profile.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_with_one_method_its_scores_stand_at_the_top(evaluate, folders):
    code, found, _ = evaluate("--generated", folders / "noisy", "--metrics", "psnr", "sa")
    assert code == 0 and found["psnr"] == found["methods"]["noisy"]["psnr"] > 20
    assert found["ssim"] is None and found["skipped"]["ssim"] == evaluation.NOT_ASKED


def test_given_sketches_take_the_place_of_the_targets(evaluate, folders):
    flags = ("--generated", folders / "same", "--metrics", "sa", "edmd")
    _, found, _ = evaluate(*flags, **{"--sketch": folders / "sketch"})
    assert found["sa"] > 0 and found["edmd"] > 0 and "line art given" in found["pixel_source"]


def test_light_lines_on_dark_score_as_dark_ones_on_light(evaluate, folders, tmp_path):
    for name, clip in CLIPS.items():
        dark = 255 - np.repeat(clip.sketch[..., None], 3, axis=-1)
        media_writing.write_video(tmp_path / f"{name}.mkv", dark, 24)
    flags = ("--generated", folders / "noisy", "--metrics", "sa", "edmd")
    found = [evaluate(*flags, **{"--sketch": sketch})[1] for sketch in (folders / "sketch", tmp_path)]
    assert found[0]["methods"] == found[1]["methods"]


def test_an_interruption_while_a_clip_is_taken_in_is_not_stored(few, tmp_path):
    names, files = few
    store, scorer = evaluation.Store(tmp_path, [1], files.facts), make_scorer(files, ["psnr"])

    def broken(todo):
        for number, clip in enumerate(files.load(todo)):
            yield clip
            if number == 1:
                scorer.changing = True  # as if left in the middle
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.score_all(scorer, names, broken, store)
    assert store.read() is None


def test_all_clips_that_do_not_do_are_named_before_the_first_is_scored(evaluate, folders, tmp_path):
    for name, frames in (("a", 3), ("y", 1), ("z", 1)):
        clip = CLIPS["a"].color[:frames]
        for kind in ("target", "ours"):
            media_writing.write_video(tmp_path / kind / f"{name}.mkv", clip, 24)
    code, found, _ = evaluate("--generated", tmp_path / "ours", **{"--target": tmp_path / "target"})
    assert code == 2 and all(f"clip {name}" in found["error"]["what"] for name in "yz")


@pytest.fixture
def few(folders):
    """(names, Files of the noisy clips)."""
    methods = {"noisy": folders / "noisy"}
    files = evaluation.Files(methods, folders / "target", None, None, PROTOCOL)
    return sorted(files.facts), files


def make_scorer(files, metrics=("psnr", "tc_dis")):
    return Scorer(PROTOCOL, list(metrics), files.methods, {})


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(few, tmp_path):
    names, files = few
    whole = evaluation.score_all(make_scorer(files), names, files.load).result()

    def interrupted(todo):
        for number, clip in enumerate(files.load(todo)):
            if number == 2:
                raise KeyboardInterrupt
            yield clip

    store = evaluation.Store(tmp_path, ["settings"], files.facts)
    with pytest.raises(KeyboardInterrupt):
        evaluation.score_all(make_scorer(files), names, interrupted, store)
    asked = []

    def rest(todo):
        asked.extend(todo)
        return files.load(todo)

    again = evaluation.score_all(make_scorer(files), names, rest, store)
    assert asked == ["c"] and again.result() == whole


def test_scores_of_other_settings_or_changed_clips_are_not_used(few, tmp_path, capsys):
    names, files = few
    evaluation.score_all(make_scorer(files), names, files.load, evaluation.Store(tmp_path, [1], files.facts))
    assert evaluation.Store(tmp_path, [1], files.facts).read() is not None
    assert evaluation.Store(tmp_path, [1], files.facts | {"new": []}).read() is not None
    assert evaluation.Store(tmp_path, [1], files.facts | {"a": ["another"]}).read() is None
    assert "have changed" in capsys.readouterr().err
    other = evaluation.Store(tmp_path, [2], files.facts)
    assert other.read() is None
    other.write(make_scorer(files), complete=True)
    assert evaluation.Store(tmp_path, [1], files.facts).read() is not None  # not written over


def test_a_damaged_state_is_named(few, tmp_path):
    _, files = few
    store = evaluation.Store(tmp_path, [1], files.facts)
    store._path(0).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match="part-0-of-1-"):
        store.read()


def test_processes_share_the_clips_and_the_last_has_them_all(few, tmp_path):
    names, files = few
    whole = evaluation.score_all(make_scorer(files), names, files.load).result()
    found = [
        evaluation.score_all(
            make_scorer(files), names[process::2], files.load,
            evaluation.Store(tmp_path, [1], files.facts, process, 2),
        )
        for process in range(2)
    ]  # fmt: skip
    assert found[0] is None and found[1].result() == whole


def test_a_clip_without_a_ratio_is_counted(folders, tmp_path):
    still = np.repeat(CLIPS["a"].color[:1], 4, 0)
    scorer = Scorer(PROTOCOL, ["tc_dis"], ["x"], {})
    scorer.add("still", still, {"x": noisy(still)})
    scorer.add("moving", CLIPS["b"].color, {"x": noisy(CLIPS["b"].color)})
    result = evaluation.make_result(scorer, PROTOCOL, ["tc_dis"], {}, {}, "memory", "")
    assert result.as_json()["undefined"] == {"x": {"tc_dis": ["still"]}}
    assert result.methods["x"].clip_scores["tc_dis"]["moving"] == result.summaries["x"]["tc_dis"].mean


def test_a_mask_hides_the_background(folders):
    target = CLIPS["a"].color
    mask = np.zeros((1, *target.shape[1:3]), np.uint8)
    mask[:, :, :24] = 255
    wrong = target.copy()
    wrong[:, :, 24:] = 255 - wrong[:, :, 24:]
    protocol = Protocol("fg", mask=True)
    scorer = Scorer(protocol, ["psnr", "sa"], ["x"], {})
    scorer.add("a", target, {"x": wrong}, mask=mask)
    scores = scorer.result()["x"].clip_scores
    assert scores["psnr"]["a"] == 100 and scores["sa"]["a"] == 0


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--generated", "absent"], "absent"),
        (["--metrics", "fvd"], "--metrics"),
        (["--protocol", "lvcd"], "--protocol"),
        (["--protocol", "anidoc-256-fg"], "--mask"),
        (["--mask", "masks"], "--mask"),
        (["--generated", "Target=noisy"], "--generated"),
        (["--metrics", "fid"], "--metrics"),
        (["--out", "noisy/report"], "--out"),
        (["--out", "small.toml"], "small.toml"),
        (["--data", "dataset"], "--data"),
        (["--networks", "resnet=x"], "--networks"),
        (["--networks", "absent"], "--networks"),
        (["--figures", "z"], "--figures"),
        (["--process-id", "1"], "--process-id"),
        (["--num-processes", "2"], "--out"),
        (["--weights", "w"], "--generated, --weights"),
    ],
)
def test_bad_flags_are_refused(evaluate, folders, monkeypatch, flags, where):
    monkeypatch.chdir(folders)
    given = {"--generated": "noisy", "--protocol": "small.toml"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    code, found, _ = evaluate(**given)
    assert code == 2 and where in found["error"]["where"]


def test_clips_too_short_for_a_metric_are_refused(few):
    _, files = few
    scorer = make_scorer(files, ["flicker"])
    with pytest.raises(InputError, match="2 or more for flicker"):
        scorer.add("x", CLIPS["a"].color[:1], {"noisy": CLIPS["a"].color[:1]})


def check_split_and_merged(networks):
    protocol = Protocol("p", frames=2)

    def score(names):
        scorer = Scorer(protocol, list(networks), ["x"], networks)
        for name in names:
            scorer.add(name, CLIPS[name].color, {"x": noisy(CLIPS[name].color)})
        return scorer

    whole, merged = score("abc"), score("a")
    merged.merge(score("cb").state())
    (one,), (other,) = whole.result().values(), merged.result().values()
    assert one.clip_scores == other.clip_scores
    for metric, score in one.set_scores.items():
        assert score > 0 and other.set_scores[metric] == pytest.approx(score, rel=1e-9)
    return one


def test_lpips_of_clips_is_that_of_their_frames():
    network = procedural_lpips("alex", "alexnet", "lpips_alex")
    found = check_split_and_merged({"lpips_alex": network})
    clip = CLIPS["a"].color
    alone = network(noisy(clip)[:2], clip[:2]).mean()
    assert found.clip_scores["lpips_alex"]["a"] == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.slow
def test_sets_of_features_merge():
    check_split_and_merged({"fid": procedural_inception("fid")})
