import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_results import CLIP_METRICS, CLIPS, result

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.results import METRICS, MethodResult
from animecolor_jax.evaluation.tables import (
    build_table,
    caption,
    escape_latex,
    escape_markdown,
    latex,
    markdown,
    write_parquet,
)


def scores(method, **clip_scores):
    """The method with other scores of clips."""
    return MethodResult({**method.clip_scores, **clip_scores}, method.set_scores)


def cells(found, method):
    table = build_table(found)
    return dict(zip(found.shown, dict(table.rows)[method], strict=True))


def test_the_papers_columns_come_first_in_its_order():
    labels = [metric.label for metric in METRICS.values()]
    assert labels[:6] == ["PSNR", "SSIM", "LPIPS", "SA", "FID", "FVD"]
    shuffled = result(metrics=("fid", "tc_dis", "psnr", "lpips_alex", "ssim"))
    assert build_table(shuffled).headers == ["PSNR ↑", "SSIM ↑", "LPIPS ↓", "FID ↓", "FVD ↓", "TC (DIS) →1"]


def test_the_best_score_of_each_column_is_bold_in_both_forms():
    found = result()
    ours, theirs = (cells(found, name) for name in ("ours", "theirs"))
    assert all(ours[metric].best and not theirs[metric].best for metric in (*CLIP_METRICS, "fid"))
    assert not ours["fvd_styleganv"].best
    assert "**4.87**" in markdown(found) and "**9.87**" not in markdown(found)
    assert r"\textbf{4.87}" in latex(found) and r"\textbf{9.87}" not in latex(found)


def test_scores_that_look_equal_are_both_best_and_one_method_never_is():
    found = result()
    tied = MethodResult(found.methods["ours"].clip_scores, {"fid": 4.871})
    assert result(methods={**found.methods, "tied": tied}).best("fid") == ["ours", "tied"]
    assert result(methods={"ours": tied}).best("fid") == []
    assert "**" not in markdown(result(methods={"ours": tied}))


TC_CASES = [(0.9, 1.2, "ours"), (0.7, 1.2, "theirs"), (0.9, 1.1, None)]  # None: as good


@pytest.mark.parametrize(("ours", "theirs", "best"), TC_CASES)
def test_temporal_consistency_is_best_near_one(ours, theirs, best):
    found = result()
    methods = {
        name: scores(found.methods[name], tc_dis=dict.fromkeys(CLIPS, value))
        for name, value in (("ours", ours), ("theirs", theirs))
    }
    assert result(methods=methods).best("tc_dis") == ([best] if best else ["ours", "theirs"])


def test_a_skipped_metric_is_a_dash_with_its_reason_below():
    found = result()
    cell = cells(found, "ours")["fvd_styleganv"]
    assert cell.value == "–" and cell.marks == ("a",)
    reason = "FVD is skipped: no weights: i3d_torchscript.pt is wanted"
    assert build_table(found).notes == [("a", reason)]  # once, for both methods
    assert f"<sup>a</sup> {escape_markdown(reason)}" in markdown(found) and "–<sup>a</sup>" in markdown(found)
    assert escape_latex(reason) in latex(found) and r"--\textsuperscript{a}" in latex(found)


def test_undefined_clips_are_counted_and_named():
    found = result()
    some = {**found.methods["ours"].clip_scores["tc_dis"], "a_1": None, "b_2": math.nan}
    methods = {
        "ours": scores(found.methods["ours"], tc_dis=some),
        "theirs": scores(found.methods["theirs"], tc_dis=dict.fromkeys(CLIPS)),
    }
    found = result(methods=methods)
    notes = [text for _, text in build_table(found).notes]
    assert "TC (DIS) of ours is undefined for 2 of 5 clips (a_1, b_2): mean of the other 3" in notes
    assert "TC (DIS) of theirs is undefined for 5 of 5 clips (a_1, b_2, c_3, ...): no mean" in notes
    assert cells(found, "theirs")["tc_dis"].value == "–" and found.best("tc_dis") == ["ours"]
    shared = scores(found.methods["theirs"], tc_dis=some)
    notes = build_table(result(methods={"ours": found.methods["ours"], "theirs": shared})).notes
    assert [text for _, text in notes if "TC" in text] == [
        "TC (DIS) is undefined for 2 of 5 clips (a_1, b_2): mean of the other 3"
    ]
    assert found.as_json()["undefined"]["ours"] == {"tc_dis": ["a_1", "b_2"]}
    assert found.as_json()["undefined"]["theirs"] == {"tc_dis": list(CLIPS)}
    assert found.as_json()["methods"]["theirs"]["tc_dis"] is None


def test_the_caption_names_how_the_scores_were_made():
    line = caption(result())
    for text in ("animecolor-512x320", "5 clips", "30 frames", "PNG, resized", "95%", "BCa"):
        assert text in line
    assert "inception (pt_inception.pth 01234567)" in line and "jax 0.10.2, opencv 5.0" in line
    assert "\n" not in line and "brackets" not in caption(result(clips=("one",)))


def test_intervals_stand_with_the_means():
    found = result()
    low, high = found.summaries["ours"]["psnr"].interval
    assert f"[{low:.2f}, {high:.2f}]" in latex(found)
    assert f"<br><sub>\\[{low:.2f}, {high:.2f}\\]</sub>" in markdown(found)


AWKWARD = "a|b_c*d<i>$x^2$ & 50% #1 {y} \\ z~`k`\n[l](m)"


def test_markdown_keeps_any_name_on_its_row():
    text = markdown(result(methods=(AWKWARD, "ours")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(result().shown) + 2}
    shown = re.sub(r"\\(\S)", r"\1", rows[2].split(" | ")[0].removeprefix("| "))
    assert shown == " ".join(AWKWARD.split())
    assert not re.search(r"(?<!\\)[*_<$`\[]", rows[2].split(" | ")[0])


def test_latex_is_balanced_for_any_name():
    text = latex(result(methods=(AWKWARD, "ours")))
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    begun, ended = (re.findall(rf"\\{word}{{([a-z*]+)}}", text) for word in ("begin", "end"))
    assert begun == ended[::-1] == ["table*", "adjustbox", "tabular"]
    columns = len(re.search(r"@{}(l\w+)@{}", text).group(1))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 5 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    assert escape_latex("50%_\\^") == r"50\%\_\textbackslash{}\textasciicircum{}"


def test_the_json_is_strict_and_holds_what_scripts_read():
    found = result().as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["methods"]["ours"]["fid"] == 4.87 and found["methods"]["ours"]["fvd_styleganv"] is None
    assert found["skipped"] == {"fvd_styleganv": "no weights: i3d_torchscript.pt is wanted"}
    assert "psnr" not in found and set(found["intervals"]["ours"]) == set(CLIP_METRICS)
    assert found["methods"]["ours"]["psnr"] == pytest.approx(
        np.mean(list(result().methods["ours"].clip_scores["psnr"].values()))
    )
    alone = result(methods=("ours",)).as_json()
    assert all(alone[metric] == value for metric, value in alone["methods"]["ours"].items())
    assert (alone["protocol"], alone["clips"], alone["frames"]) == ("animecolor-512x320", 5, 30)


def test_a_result_lacking_scores_or_with_a_reserved_name_is_refused():
    with pytest.raises(InputError, match="sketch"):
        result(methods=("sketch",))
    with pytest.raises(ValueError, match="edmd"):
        result(metrics=("psnr", "edmd"))
    methods = dict(result().methods)
    fewer = {"psnr": dict.fromkeys(CLIPS[1:], 20.0)}
    with pytest.raises(ValueError, match="psnr.*a_1"):
        result(methods={**methods, "theirs": scores(methods["theirs"], **fewer)})
    with pytest.raises(ValueError, match="beauty"):
        result(metrics=("beauty",))


def test_parquet_has_a_row_for_every_clip_of_every_method(tmp_path):
    found = result(clip_frames={"a_1": 6, "b_2": 7})
    found.methods["ours"].clip_scores["tc_dis"]["a_1"] = None
    found.methods["ours"].clip_scores["psnr"]["a_1"] = math.nan
    write_parquet(found, tmp_path / "new" / "clips.parquet")
    table = pq.read_table(tmp_path / "new" / "clips.parquet")
    assert table.column_names == ["clip", "method", "frames", *CLIP_METRICS]
    rows = {(row["method"], row["clip"]): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 10
    assert rows["ours", "a_1"]["tc_dis"] is None and rows["ours", "a_1"]["psnr"] is None
    assert rows["ours", "b_2"]["frames"] == 7 and rows["ours", "c_3"]["frames"] is None
    assert rows["theirs", "e_5"]["ssim"] == found.methods["theirs"].clip_scores["ssim"]["e_5"]
    assert json.loads(table.schema.metadata[b"animecolor"])["protocol"] == "animecolor-512x320"


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "clips.parquet"
    write_parquet(result(), path)
    before = path.read_bytes()

    def full_disk(table, where):
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_parquet(result(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
