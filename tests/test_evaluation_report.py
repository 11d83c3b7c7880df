from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from evaluation_results import CLIPS, result
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.plots import _view, frame_curve
from animecolor_jax.evaluation.report import ReportConfig, check_report, rank_clips, write_report
from animecolor_jax.evaluation.results import MethodResult
from animecolor_jax.evaluation.statistics import summarize

SMALL = ReportConfig(examples=1, height=32, max_frames=4, fps=10.0)
QUICK = {"metrics": ("lpips_alex",), "skipped": {}}  # two plots only
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The page's tags, checked to be closed in order, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""

    def sources(self):
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


class Clips:
    """Noise as clips; remembers what was read."""

    def __init__(self, frames=6):
        self.frames, self.read = frames, []

    def __call__(self, source, clip):
        self.read.append((source, clip))
        small = np.random.default_rng(len(self.read)).integers(0, 256, (self.frames, 4, 6, 3), np.uint8)
        return np.stack([cv2.resize(frame, (48, 32)) for frame in small])


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    write_report(result(**QUICK), tmp_path / "report.html", Clips(), SMALL)
    page = Page(tmp_path / "report.html")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any("http" in value for _, attrs in page.tags for value in attrs.values() if value)
    assert not any(word in (tmp_path / "report.html").read_text() for word in ("@import", "url("))
    used = set(page.sources())
    assert used == {f"report_files/{path.name}" for path in (tmp_path / "report_files").iterdir()}
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report_files"}


def test_every_scored_metric_has_a_plot_and_every_curve_one(tmp_path):
    write_report(result(), tmp_path / "report.html")
    names = {path.name for path in (tmp_path / "report_files").iterdir()}
    clips = {f"clips-{metric}.png" for metric in ("psnr", "ssim", "lpips_alex", "tc_dis")}
    assert names == {*clips, "set-fid.png", "frames-psnr.png"}
    for name in names:
        picture = np.asarray(Image.open(tmp_path / "report_files" / name).convert("RGB"))
        assert (picture != picture[0, 0]).any(axis=-1).mean() > 0.01


def test_the_page_says_the_scores_the_reasons_and_how_they_were_made(tmp_path):
    found = result()
    write_report(found, tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    low, high = found.summaries["ours"]["psnr"].interval
    difference = found.differences()["theirs"]["psnr"]
    for part in (
        f"{found.summaries['ours']['psnr'].mean:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{difference.mean:+.2f}",
        "FVD is skipped: no weights: i3d_torchscript.pt is wanted",
        "tools/evaluate.py --generated <A & B>",
        "0123456789abcdef" * 4,
        "opencv 5.0",
    ):
        assert part in text


def test_names_cannot_break_the_page(tmp_path):
    name = "<script>alert('$x')</script> & \"_$1\" {{sections}} $sections"
    found = result(methods=(name, "_b"), clips=("<b>1", "2&3"), **QUICK)
    write_report(found, tmp_path / "report.html", Clips(), SMALL)
    page = Page(tmp_path / "report.html")
    assert "script" not in {tag for tag, _ in page.tags} and name in page.text and "<b>1" in page.text


def test_only_the_clips_that_are_shown_are_read_and_each_once(tmp_path):
    clips = Clips()
    found = result(**QUICK)
    write_report(found, tmp_path / "report.html", clips, SMALL)
    shown = {rank_clips(found, method, "lpips_alex")[end] for method in found.methods for end in (0, -1)}
    assert len(clips.read) == len(set(clips.read))
    assert set(clips.read) == {(s, c) for s in ("sketch", "ours", "theirs", "target") for c in shown}
    without = Clips()
    write_report(found, tmp_path / "report.html", without, SMALL, has_sketches=False)
    assert "sketch" not in {source for source, _ in without.read}


def test_worst_and_best_clips_are_those_of_the_metric(tmp_path):
    ranked = {
        "psnr": {"a": 30.0, "b": 10.0, "c": 20.0, "d": None},
        "tc_dis": {"a": 1.5, "b": 0.9, "c": 0.2, "d": None},
    }
    found = result(methods={"ours": MethodResult(ranked, {})}, metrics=tuple(ranked), skipped={})
    assert rank_clips(found, "ours", "psnr") == ["a", "c", "b"]
    assert rank_clips(found, "ours", "tc_dis") == ["b", "a", "c"]
    write_report(found, tmp_path / "report.html", Clips(), ReportConfig(examples=5, height=32))
    headings = Page(tmp_path / "report.html").text.split("Worst of ours")[1]
    worst, best = headings.split("Best of ours")
    assert worst.index("PSNR 10.00") < worst.index("PSNR 20.00") and "PSNR 30.00" in best
    with pytest.raises(InputError, match="fid"):
        write_report(result(), tmp_path / "report.html", Clips(), ReportConfig(ranked_by="fid"))


def test_an_animation_plays_at_the_clips_speed_with_few_frames(tmp_path):
    write_report(result(**QUICK), tmp_path / "report.html", Clips(frames=7), SMALL)
    picture = Image.open(tmp_path / "report_files" / "example-0.webp")
    assert picture.n_frames == 4  # every second one of 7
    picture.load()
    assert picture.info["duration"] == 200  # ms, of 10 frames a second
    sides = [attrs for tag, attrs in Page(tmp_path / "report.html").tags if tag == "img" and "width" in attrs]
    assert {(int(attrs["width"]), int(attrs["height"])) for attrs in sides} == {picture.size}


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_report(result(**QUICK), path, Clips(), SMALL)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def broken(source, clip):
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        write_report(result(**QUICK), path, broken, SMALL)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    write_report(result(**QUICK), path)
    assert not list(tmp_path.rglob("*.webp")) and len(list(tmp_path.iterdir())) == 2


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write_report(result(), tmp_path / "report.html")
    with pytest.raises(InputError, match=r"\.pdf"):
        check_report(tmp_path / "report.pdf")
    assert (tmp_path / "report_files" / "thesis.tex").read_text() == "years of work"


def test_one_clip_of_one_method_and_nothing_but_skipped_metrics_make_a_page(tmp_path):
    write_report(result(methods=("ours",), clips=("one",), **QUICK), tmp_path / "one.html", Clips(), SMALL)
    page = Page(tmp_path / "one.html")
    assert "Differences" not in page.text and "Best of" not in page.text and "Worst of ours" in page.text
    empty = result(methods={"ours": MethodResult({}, {})}, metrics=("fid",), skipped={"fid": "no weights"})
    write_report(empty, tmp_path / "empty.html", Clips(), SMALL)
    assert not Page(tmp_path / "empty.html").sources()


def test_a_clip_without_any_score_is_said_to_have_none(tmp_path):
    found = result()
    still = {**found.methods["ours"].clip_scores, "tc_dis": dict.fromkeys(CLIPS)}
    methods = {"ours": MethodResult(still, {"fid": None}), "theirs": found.methods["theirs"]}
    write_report(result(methods=methods), tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "undefined for 5 of 5 clips" in text and "FID of ours is undefined" in text


def test_curves_average_the_clips_that_reach_a_frame():
    mean, low, high = frame_curve([[1.0, 2.0, 3.0], [3.0, None], [float("nan"), 4.0]])
    assert mean.tolist() == [2.0, 3.0, 3.0]
    assert low == pytest.approx([1.2, 2.2, 3.0]) and high == pytest.approx([2.8, 3.8, 3.0])
    assert np.isnan(frame_curve([[None, 1.0]])[0]).tolist() == [True, False]


def test_a_far_clip_does_not_squeeze_the_others_in_a_plot():
    near = np.random.default_rng(0).normal(23, 2, 60)
    assert _view(np.append(near, 100.0), []) == (near.min(), near.max())
    assert _view(near, []) == (near.min(), near.max())
    interval = summarize(dict(enumerate([*near, 100.0, 100.0])))
    assert _view(np.append(near, [100.0, 100.0]), [interval])[1] == max(near.max(), interval.interval[1])
