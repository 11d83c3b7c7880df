"""Captions: which video each belongs to, what is refused and where, and what a model is shown."""

import json

import numpy as np
import pytest
from tiny_models import save_llava

from animecolor_jax.errors import InputError
from data_pipeline.captions import Captioner, read_captions, sample_frames

VIDEOS = ["a/walk.mp4", "a/run.mp4", "b/run.mp4", "jump.v2.webm"]


def whole(table):
    return {video: table.caption(video, 0, 10) for video in table.spans}


def write_tables(folder, records):
    """The same records as JSON, JSON lines, CSV and Parquet."""
    import csv

    import pyarrow
    import pyarrow.parquet

    (folder / "t.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "t.parquet")
    return [folder / name for name in ("t.json", "t.jsonl", "t.csv", "t.parquet")]


def test_text_files_beside_the_videos_are_their_captions(tmp_path):
    for name, text in {
        "a/walk.txt": "\ufeffA boy\n walks. ",
        "b/run.mp4.txt": "走る犬",
        "jump.v2.txt": "A jump.",
        "notes.txt": "not of a video",
        "a/run.txt": " \n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_captions(None, tmp_path, VIDEOS)
    assert whole(table) == {"a/walk.mp4": "A boy walks.", "b/run.mp4": "走る犬", "jump.v2.webm": "A jump."}
    assert table.without == ("a/run.mp4",)
    assert table.report() == {"captioned": 3, "without_caption": 1, "unmatched_captions": 1}
    assert table.unmatched[0].endswith("notes.txt")
    assert table.caption("a/run.mp4", 0, 10) == ""


def test_one_folder_of_text_files_serves_videos_in_sub_folders(tmp_path):
    (tmp_path / "walk.txt").write_text("A walk.")
    assert whole(read_captions(tmp_path, "videos", VIDEOS)) == {"a/walk.mp4": "A walk."}
    (tmp_path / "run.txt").write_text("Which one?")
    with pytest.raises(InputError, match=r"'run' could be a/run\.mp4, b/run\.mp4"):
        read_captions(tmp_path, "videos", VIDEOS)


def test_all_kinds_of_table_say_the_same(tmp_path):
    records = [
        {"video": "a/walk.mp4", "text": 'He said: "go",\nand went.', "other": 1},
        {"video": "b/run", "text": "A dog runs.", "other": 2},
        {"video": "/data/set/jump.v2.webm", "text": "Un saut à l'élastique", "other": 3},
        {"video": "c/run.mp4", "text": "another run", "other": 4},
    ]
    for path in write_tables(tmp_path, records):
        table = read_captions(path, "videos", VIDEOS)
        assert whole(table) == {
            "a/walk.mp4": 'He said: "go", and went.',
            "b/run.mp4": "A dog runs.",
            "jump.v2.webm": "Un saut à l'élastique",
        }
        assert len(table.unmatched) == 1 and table.without == ("a/run.mp4",)


def test_object_of_captions_by_video(tmp_path):
    (tmp_path / "t.json").write_text('{"walk": "A walk.", "a/run.mp4": "A run."}')
    table = read_captions(tmp_path / "t.json", "videos", VIDEOS)
    assert whole(table) == {"a/walk.mp4": "A walk.", "a/run.mp4": "A run."}


def test_captions_of_spans_belong_to_the_clips_they_cover(tmp_path):
    spans = [("first", 0, 50), ("second", 50, 120), ("all", None, None)]
    records = [{"path": "walk", "caption": t, "start_frame": a, "end_frame": b} for t, a, b in spans]
    for path in write_tables(tmp_path, records):
        table = read_captions(path, "videos", VIDEOS)
        assert table.caption("a/walk.mp4", 0, 49) == "first"
        assert table.caption("a/walk.mp4", 30, 100) == "second"
        assert table.caption("a/walk.mp4", 110, 200) == "all"  # 10 of 90 frames are too few for "second"
        assert table.caption("a/run.mp4", 0, 49) == ""


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", b"path,caption\nwalk,good\nrun,b\xe9d\n", r"0xe9 in line 3 is not UTF-8"),
        ("t.csv", b"path,title\nwalk,good\n", "has only path, title"),
        ("t.csv", b"path,caption,start,end\nwalk,good,9,3\n", "frames 9 to 3"),
        ("t.csv", b"path,caption,start,end\nwalk,good,soon,3\n", "start_frame is 'soon'"),
        ("t.csv", b'path,caption\nwalk,"good\n', "after line 1: unexpected end"),
        ("t.csv", b"path,caption\nwalk,good\na/walk.mp4,better\n", "a second caption of a/walk.mp4"),
        ("t.csv", b"path,caption\n,nothing\n", "names no video"),
        ("t.csv", b"path,caption\n", "holds no captions"),
        ("t.json", b'[{"path": "walk",\n"caption": }]', "line 2, column 12"),
        ("t.json", b'["walk"]', "record 0"),
        ("t.json", b'{"walk": 7}', "caption is 7"),
        ("t.json", b"7", "holds int"),
        ("t.jsonl", b'{"path": "walk", "caption": "x"}\n\n{"path" 1}', "line 3, column 9"),
        ("t.parquet", b"PAR1", "cannot be read"),
        ("t.xlsx", b"", "does not exist|holds no .txt"),
    ],
)
def test_broken_tables_are_refused_where_they_break(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_captions(tmp_path / name, "videos", VIDEOS)
    assert str(tmp_path / name) in error.value.where


def test_missing_sources_are_refused(tmp_path):
    for name in ("t.csv", "folder"):
        with pytest.raises(InputError, match="does not exist"):
            read_captions(tmp_path / name, "videos", VIDEOS)
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_captions(tmp_path, "videos", VIDEOS)


def test_frames_are_taken_from_the_middle_of_equal_segments():
    np.testing.assert_array_equal(sample_frames(16, 4), [2, 6, 10, 14])
    np.testing.assert_array_equal(sample_frames(10, 4), [1, 3, 6, 8])
    np.testing.assert_array_equal(sample_frames(3, 16), [0, 1, 2])


# ---------------------------------------------------------------- a tiny LLaVA




@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def clips():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (length, 30, 44, 3), np.uint8) for length in (12, 2, 9)]


@pytest.mark.torch
def test_caption_is_the_greedy_answer_to_the_sampled_frames(model_dir, clips):
    """Against a plain loop: argmax of the logits, one token at a time, without a cache."""
    import torch
    import transformers

    captioner = Captioner(model_dir, frames=3, prompt="word1 word2", max_new_tokens=6)
    processor = transformers.AutoProcessor.from_pretrained(model_dir)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(model_dir)
    frames = [clips[0][index] for index in (2, 6, 10)]
    inputs = processor(
        images=frames, text="USER: <image><image><image>\nword1 word2 ASSISTANT:", return_tensors="pt"
    )
    tokens = inputs["input_ids"]
    assert int((tokens == processor.image_token_id).sum()) == 3 * 4  # 28 / 14 patches a side
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits[0, -1]
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
        if tokens[0, -1] == 2:
            break
    answer = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert captioner(clips[0]) == answer
    assert answer.split()


@pytest.mark.torch
def test_captions_do_not_depend_on_the_batch(model_dir, clips):
    batched = Captioner(model_dir, frames=3, prompt="word3", max_new_tokens=8, batch_size=2)
    alone = Captioner(model_dir, frames=3, prompt="word3", max_new_tokens=8)
    captions = batched.captions(iter(clips))
    assert captions == [alone(clip) for clip in clips]
    assert len(set(captions)) > 1  # they do depend on the pictures


@pytest.mark.torch
def test_models_chat_template_is_used_where_it_has_one(model_dir, clips, tmp_path):
    import shutil

    folder = shutil.copytree(model_dir, tmp_path / "chat")
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT :{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    captioner = Captioner(folder, frames=2, prompt="word7", max_new_tokens=4)
    assert captioner._question(2) == "<image><image>word7 ASSISTANT :"
    assert isinstance(captioner(clips[1]), str)


@pytest.mark.torch
def test_directories_that_are_no_captioner_are_refused(model_dir, tmp_path):
    import shutil

    with pytest.raises(InputError, match="is not a directory"):
        Captioner(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert'"):
        Captioner(tmp_path)
    folder = shutil.copytree(model_dir, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="processor"):
        Captioner(folder)
    folder = shutil.copytree(model_dir, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        Captioner(folder)
    with pytest.raises(InputError, match="frames: 0"):
        Captioner(model_dir, frames=0)
