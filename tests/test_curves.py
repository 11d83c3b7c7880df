import json

import numpy as np
import pytest
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import curves
from animecolor_jax.evaluation.curves import draw_curves, read_curves, smooth
from animecolor_jax.train.run_log import read_metrics

pytest.importorskip("matplotlib")


def train(count=60, **changes):
    losses = 0.3 + 1.5 * np.exp(-np.arange(count) / 15)
    lines = [{"step": at + 1, "kind": "train", "loss": float(loss)} for at, loss in enumerate(losses)]
    return [{**line, **changes.get(f"step{line['step']}", {})} for line in lines]


def validations(*steps, **facts):
    return [{"step": step, "kind": "validation", "loss": 0.5, **facts} for step in steps]


def picture(runs, path):
    draw_curves(runs, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def share(pixels, color):
    """Of the pixels, those that have nearly this colour."""
    wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return (np.abs(pixels.astype(int) - wanted).max(-1) < 8).mean()


def test_smoothing_takes_the_mean_of_neighbours():
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), 3) == pytest.approx([1.5, 3, 4, 5])
    assert smooth(np.arange(9.0), 5)[2:-2] == pytest.approx(np.arange(2.0, 7))  # a line stays one
    values = np.random.default_rng(0).normal(size=7)
    assert smooth(values, 1) == pytest.approx(values)
    assert smooth(values, 99) == pytest.approx(np.full(7, values.mean()))


def test_smoothing_leaves_gaps_as_they_are():
    found = smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3)
    assert np.isnan(found[1]) and found[[0, 2, 3]] == pytest.approx([1, 4, 4])


def test_records_become_columns_by_kind():
    found = read_curves([
        *validations(0, standard_error=0.1), *train(3, step2={"loss": None}), *validations(3, psnr=12.5),
        {"step": 3, "kind": "validation", "loss": None, "psnr": 13.0},
    ])  # fmt: skip
    assert found["train"][0].tolist() == [1, 2, 3] and np.isnan(found["train"][1]).tolist() == [0, 1, 0]
    steps, losses, errors = found["validation"]
    assert steps.tolist() == [0, 3] and losses.tolist() == [0.5, 0.5]
    assert errors[0] == 0.1 and np.isnan(errors[1])
    assert [column.tolist() for column in found["psnr"]] == [[3, 3], [12.5, 13.0]]


def test_what_a_run_logged_is_drawn(tmp_path):
    lines = [*train(), *validations(20, 40, 60, standard_error=0.05)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pixels = picture({"stage1": read_metrics(tmp_path)}, tmp_path / "out" / "curves.png")
    assert share(pixels, curves.TRAINING) > 1e-3 and share(pixels, curves.VALIDATION) > 1e-3
    assert share(pixels, curves.PSNR) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def test_each_kind_is_drawn_only_where_it_is(tmp_path):
    alone = picture({"a": train()}, tmp_path / "a.png")
    assert share(alone, curves.VALIDATION) == share(alone, curves.PSNR) == 0
    unseen = picture({"a": validations(0, 10, psnr=None)}, tmp_path / "b.png")
    assert share(unseen, curves.TRAINING) == 0 < share(unseen, curves.VALIDATION)
    vae = [*train(), *validations(0, psnr=12.0), *validations(60, psnr=30.0)]
    assert share(picture({"vae": vae}, tmp_path / "c.png"), curves.PSNR) > 1e-3


def test_error_bars_are_as_long_as_the_error(tmp_path):
    def column(error):
        """Rows of validation's colour in the column where there is most of it."""
        lines = [*validations(10, standard_error=error), *train()]
        pixels = picture({"a": lines}, tmp_path / "a.png")[:300].astype(int)  # without the legend
        wanted = [int(curves.VALIDATION[at : at + 2], 16) for at in (1, 3, 5)]
        return (np.abs(pixels - wanted).max(-1) < 60).sum(0).max()

    assert column(0.2) > 1.6 * column(0.1) > 1.6 * column(None)


def test_stages_have_a_panel_each(tmp_path):
    stages = {f"stage_{number}": train() for number in range(5)}
    pixels = picture(stages, tmp_path / "5.png")
    height, width = pixels.shape[0] * 9 // 20, pixels.shape[1] // 3  # the legend stands below
    rows = [pixels[:height], pixels[height : 2 * height]]
    drawn = [
        [share(row[:, left : left + width], curves.TRAINING) > 1e-3 for left in (0, width, 2 * width)]
        for row in rows
    ]
    assert drawn == [[True, True, True], [True, True, False]]
    two = picture({stage: stages[stage] for stage in ("stage_0", "stage_1")}, tmp_path / "2.png")
    assert two.shape[1] == pytest.approx(2 * width, abs=2) and two.shape[0] < 0.6 * pixels.shape[0]


def test_losses_that_are_not_finite_leave_a_gap(tmp_path):
    broken = train(step30={"loss": None}, step31={"loss": None})
    assert share(picture({"$x$_a": broken}, tmp_path / "a.png"), curves.TRAINING) > 1e-3


def test_nothing_to_draw_is_named(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        draw_curves({}, tmp_path / "a.png")
    with pytest.raises(InputError, match="stage2"):
        draw_curves({"stage1": train(), "stage2": []}, tmp_path / "a.png")
    with pytest.raises(InputError, match="run of stage"):
        draw_curves({"stage": train(2, step1={"loss": None}, step2={"loss": None})}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
