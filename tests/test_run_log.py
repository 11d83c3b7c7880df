import dataclasses
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from animecolor_jax.errors import InputError
from animecolor_jax.media import read_video
from animecolor_jax.train.config import OptimizerConfig, StageConfig, TrainConfig, ValidationConfig
from animecolor_jax.train.run_directory import describe_run, open_run, read_run
from animecolor_jax.train.run_log import RunLog, duration
from animecolor_jax.train.tensorboard import encode_gif
from data_pipeline.dataset import DataConfig, LoadConfig
from data_pipeline.storage import Storage

STAGE = StageConfig("stage1", ((".*", True),), ("text", "sketch"))
CONFIG = TrainConfig(STAGE, steps=100)


class Clock:
    """Seconds that pass only when told to."""

    now = 1000.0

    def __call__(self):
        return self.now


def start_log(directory, **options):
    options = {"start_step": 0, "total_steps": 20, "log_every": 5, **options}
    return RunLog(directory, batch_size=4, **options)


def train(log, steps, clock=None, seconds=0.0, **facts):
    for step in steps:
        if clock is not None:
            clock.now += seconds
        log.step(step, loss=1 / step, grad_norm=2.0, learning_rate=1e-5, **facts)


def strict_lines(directory):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events_of(directory):
    """All events of the run, by the framing of TFRecord files; lengths and payloads carry checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        value = crc32c(data)
        return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            header = data[position : position + 8]
            (size,) = struct.unpack("<Q", header)
            payload = data[position + 12 : position + 12 + size]
            assert struct.unpack("<I", data[position + 8 : position + 12])[0] == masked(header)
            assert struct.unpack("<I", data[position + 12 + size :][:4])[0] == masked(payload)
            found.append(Event.FromString(payload))
            position += 16 + size
    return found


def scalars_of(events, tag):
    values = [(event.step, value) for event in events for value in event.summary.value]
    return {step: value.simple_value for step, value in values if value.tag == tag}


# ---------------------------------------------------------------- metrics.jsonl


def test_every_step_is_a_strict_json_line(tmp_path):
    with start_log(tmp_path, total_steps=7) as log:
        train(log, range(1, 8), bucket="49x480x720")
        log.validation(7, np.float32(0.5), clips=[1, 2])
    *steps, validation = strict_lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, 8))
    assert [line["loss"] for line in steps] == [1 / step for step in range(1, 8)]
    assert steps[0].keys() >= {"grad_norm", "learning_rate", "seconds_per_step", "clips_per_second", "mfu"}
    assert {line["kind"] for line in steps} == {"train"} and steps[3]["bucket"] == "49x480x720"
    assert validation == {"step": 7, "kind": "validation", "loss": 0.5, "clips": [1, 2]}


def test_what_is_not_finite_is_written_as_null(tmp_path):
    with start_log(tmp_path) as log:
        log.step(1, loss=float("nan"), grad_norm=np.float32("inf"), learning_rate=0.0, norms=[1.0, -np.inf])
        assert log.summary()["loss"] is None
    (line,) = strict_lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None and line["norms"] == [1.0, None]
    assert scalars_of(events_of(tmp_path), "train/loss") == {}


def test_steps_are_on_disk_at_each_window_and_at_a_pause(tmp_path):
    log = start_log(tmp_path)
    train(log, range(1, 5))
    assert strict_lines(tmp_path) == []
    train(log, [5])
    assert len(strict_lines(tmp_path)) == 5
    train(log, [6, 7])
    with log.pause():
        assert len(strict_lines(tmp_path)) == 7
    log.close()
    log.close()


def test_resuming_drops_later_lines_and_a_half_line(tmp_path):
    with start_log(tmp_path) as log:
        train(log, range(1, 6))
        log.validation(5, 0.25)
        train(log, range(6, 11))
        log.validation(10, 0.125)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')
    with start_log(tmp_path, start_step=7) as log:
        train(log, range(8, 10))
        whole = [1 / step for step in range(1, 10)]
        assert log.summary()["loss"] == pytest.approx(sum(whole) / 9, rel=1e-12)
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 10))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [5]


def test_a_run_that_starts_over_has_a_new_log(tmp_path):
    with start_log(tmp_path) as log:
        log.validation(0, 1.0)
        train(log, range(1, 4))
    start_log(tmp_path).close()
    assert strict_lines(tmp_path) == []


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1}\n{"st\n{}\n')
    with pytest.raises(InputError, match="line 2 is damaged") as caught:
        start_log(tmp_path, start_step=1)
    assert caught.value.where.endswith("metrics.jsonl") and caught.value.fix


def test_an_object_store_gets_the_whole_log(tmp_path):
    store = Storage(f"memory://{tmp_path.name}/run")
    clock = Clock()
    try:
        with start_log(store.root, clock=clock) as log:
            train(log, range(1, 6))
            assert not store.exists("metrics.jsonl")
            train(log, range(6, 11), clock, seconds=20)
            assert len(store.read("metrics.jsonl").splitlines()) == 10
            train(log, [11])
            with log.pause():
                assert len(store.read("metrics.jsonl").splitlines()) == 11
            log.video("clip", 11, np.zeros((2, 16, 16, 3), np.uint8), 8)
        assert any("tfevents" in name for name in store.names("tensorboard"))
        assert store.names("validation", recursive=True) == ["validation/step_00000011/clip.mp4"]
        with start_log(store.root, start_step=4) as log:
            train(log, [5])
        steps = [json.loads(line)["step"] for line in store.read("metrics.jsonl").splitlines()]
        assert steps == [1, 2, 3, 4, 5]
    finally:
        store.remove()


def test_other_hosts_write_and_show_nothing(tmp_path, capsys):
    with start_log(tmp_path / "run", leader=False, show=True) as log:
        train(log, range(1, 6))
        log.validation(5, 1.0)
        log.video("clip", 5, np.zeros((2, 16, 16, 3), np.uint8), 8)
        with log.pause():
            pass
        assert log.summary()["loss"] == pytest.approx(sum(1 / step for step in range(1, 6)) / 5)
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- speed


def test_speed_leaves_out_compilation_and_pauses(tmp_path, capsys):
    clock = Clock()
    with start_log(tmp_path, clock=clock, peak_flops=1e12, show=False) as log:
        clock.now += 600
        log.step(1, loss=1.0, grad_norm=1.0, learning_rate=1e-5, flops=5e12, compiled=True)
        train(log, [2, 3], clock, seconds=2.0, flops=5e11)
        clock.now += 1.0  # a step in progress when the pause begins
        with log.pause():
            clock.now += 300
            with log.pause():
                clock.now += 40
        train(log, [4], clock, seconds=1.0, flops=1e12)
        train(log, [5], clock, seconds=4.0, flops=2e12)
        summary = log.summary()
    lines = strict_lines(tmp_path)
    assert lines[0]["compiled"] and lines[0]["seconds_per_step"] is None and lines[0]["mfu"] is None
    assert [line["seconds_per_step"] for line in lines[1:]] == [2, 2, 3, 3]
    assert [line["clips_per_second"] for line in lines[1:]] == pytest.approx([2, 2, 4 / 3, 4 / 3])
    assert [line["mfu"] for line in lines[1:]] == pytest.approx([0.25, 0.25, 0.5, 0.5])
    assert summary["steps_per_second"] == pytest.approx(4 / 10) and summary["mfu"] == pytest.approx(0.4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "step 5/20 loss 0.4567 2.5 s/step 1.6 clips/s mfu 40.0 % left 38 s"


def test_flops_of_a_step_default_to_the_runs(tmp_path):
    clock = Clock()
    with start_log(tmp_path, clock=clock, flops_per_step=3e12, peak_flops=6e12) as log:
        train(log, range(1, 6), clock, seconds=1.0)
    assert strict_lines(tmp_path)[4]["mfu"] == pytest.approx(0.5)


def test_unknown_speed_is_none_and_left_out_of_the_line(tmp_path, capsys):
    with start_log(tmp_path, show=False, total_steps=1) as log:
        assert log.summary() == {"loss": None, "steps_per_second": None, "mfu": None}
        train(log, [1], compiled=True)
        assert log.summary() == {"loss": 1.0, "steps_per_second": None, "mfu": None}
    assert capsys.readouterr().err == "step 1/1 loss 1.0000\n"


def test_the_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    clock = Clock()
    with start_log(tmp_path, clock=clock, show=True, start_step=10) as log:
        train(log, range(11, 16), clock, seconds=1.5)
        log.validation(15, 0.5)
    shown = capsys.readouterr().err
    assert "15/20 |" in shown and "1.5 s/step 2.67 clips/s left 8 s" in shown
    assert "step 15/20 validation loss 0.50000" in shown


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (61_380, "17 h 3 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------- TensorBoard and videos


def test_scalars_can_be_read_back(tmp_path):
    with start_log(tmp_path) as log:
        train(log, range(1, 4), bucket="small")
        log.validation(3, 0.75)
    events = events_of(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    assert scalars_of(events, "train/loss") == pytest.approx({step: 1 / step for step in (1, 2, 3)}, rel=1e-6)
    assert scalars_of(events, "train/learning_rate")[2] == pytest.approx(1e-5)
    assert scalars_of(events, "validation/loss") == {3: 0.75}
    tags = {value.tag for event in events for value in event.summary.value}
    assert "train/seconds_per_step" in tags and not tags & {"train/bucket", "train/step", "train/mfu"}


def test_tensorboard_forgets_what_is_made_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    with start_log(tmp_path) as log:
        train(log, range(1, 6))
    with start_log(tmp_path, start_step=3) as log:
        train(log, [4])
    events = events_of(tmp_path)
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [0, 4] and len(list((tmp_path / "tensorboard").iterdir())) == 2


def moving_square():
    frames = np.full((6, 40, 64, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        frame[8:24, 8 * index : 8 * index + 16] = (200, 30, 60)
    return frames


def test_videos_are_files_and_animations(tmp_path):
    frames = moving_square()
    with start_log(tmp_path) as log:
        log.video("0_sample", 500, frames, 12)
    video = read_video(tmp_path / "validation" / "step_00000500" / "0_sample.mp4")
    assert video.fps == 12 and video.frames.shape == frames.shape
    assert np.abs(video.frames.astype(int) - frames).mean() < 3
    (event,) = [event for event in events_of(tmp_path) if event.summary.value]
    (value,) = event.summary.value
    assert event.step == 500 and value.tag == "validation/0_sample"
    assert (value.image.height, value.image.width) == (40, 64)
    gif = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert gif.format == "GIF" and gif.n_frames == 6 and gif.size == (64, 40) and gif.info["loop"] == 0
    for index, frame in enumerate(frames):
        gif.seek(index)
        np.testing.assert_allclose(np.asarray(gif.convert("RGB")).astype(int), frame, atol=4)


def test_gifs_keep_the_rate_on_average_and_the_asked_size():
    frames = np.random.default_rng(0).integers(0, 256, (24, 30, 60, 3), np.uint8)
    data, size = encode_gif(frames, 24, longest=40)
    gif, total = Image.open(io.BytesIO(data)), 0
    for index in range(gif.n_frames):
        gif.seek(index)
        total += gif.info["duration"]
    assert size == (20, 40) and gif.size == (40, 20) and gif.n_frames == 24 and total == 1000


def test_without_pyav_and_tensorboardx_it_says_so_and_videos_are_gifs(tmp_path):
    program = f"""
import sys
class Missing:
    def find_spec(self, name, *_):
        if name in ("av", "tensorboardX"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import numpy as np
from animecolor_jax.train.run_log import RunLog
with RunLog({str(tmp_path)!r}, start_step=0, total_steps=2, batch_size=1, log_every=1) as log:
    log.step(1, loss=1.0, grad_norm=1.0, learning_rate=1.0)
    log.video("clip", 1, np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3), 10)
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensorboardX is not installed") == 1
    assert done.stderr.count("PyAV is not installed") == 1
    assert not (tmp_path / "tensorboard").exists() and len(strict_lines(tmp_path)) == 1
    clip = read_video(tmp_path / "validation" / "step_00000001" / "clip.gif")
    assert clip.frames.shape == (3, 8, 8, 3) and clip.fps == pytest.approx(10)


# ---------------------------------------------------------------- run.json


def describe(inputs=None, **changes):
    return describe_run(
        dataclasses.replace(CONFIG, **changes), ["train.py", "--config", "configs/a.py"], inputs
    )


def test_a_run_is_described_without_naming_the_machine(tmp_path):
    import jax
    import optax

    run = open_run(tmp_path / "run", describe({"data": "abc"}))
    assert run == read_run(tmp_path / "run") and run["resumed"] == []
    assert run["config"]["stage"]["trained"] == [[".*", True]] and run["config"]["steps"] == 100
    assert run["command"] == ["train.py", "--config", "configs/a.py"] and run["inputs"] == {"data": "abc"}
    assert run["versions"]["jax"] == jax.__version__ and run["versions"]["optax"] == optax.__version__
    assert run["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert run["time"].endswith("+00:00")
    text, root = json.dumps(run), str(sys.modules["animecolor_jax"].__path__[0])
    assert root not in text and str(tmp_path) not in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_git_is_the_repository_of_this_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever the command runs
    found = describe()["git"]
    assert found is None or (len(found["revision"]) == 40 and isinstance(found["dirty"], bool))
    monkeypatch.setenv("PATH", "")
    assert describe()["git"] is None


def test_the_same_run_goes_on_and_what_changed_is_recorded(tmp_path):
    open_run(tmp_path, describe())
    (tmp_path / "checkpoints").mkdir()
    open_run(tmp_path, describe())
    data = DataConfig(load=LoadConfig(workers=3))
    run = open_run(tmp_path, describe(steps=200, data=data, log_every=1))
    assert run == read_run(tmp_path) and run["config"]["steps"] == 200
    assert [event["changes"] for event in run["resumed"]] == [
        {},
        {
            "config.steps": {"was": 100, "now": 200},
            "config.data.load.workers": {"was": 0, "now": 3},
            "config.log_every": {"was": 10, "now": 1},
        },
    ]
    assert run["resumed"][1]["command"] == run["command"] and "git" in run["resumed"][1]
    with pytest.raises(InputError, match="steps: was 200, now 150"):  # shorter than it has become
        open_run(tmp_path, describe(steps=150))


def test_other_settings_are_refused_by_name(tmp_path):
    open_run(tmp_path, describe({"data": "abc"}))
    before = (tmp_path / "run.json").read_bytes()
    other = describe(
        {"data": "abd"},
        seed=1,
        optimizer=OptimizerConfig(learning_rate=1e-5),
        data=DataConfig(sketch=None),
        validation=ValidationConfig(every=7),
    )
    for leader in (True, False):
        with pytest.raises(InputError) as caught:
            open_run(tmp_path, other, leader=leader)
    lines = [line.strip() for line in caught.value.what.splitlines()[1:]]
    assert "optimizer.learning-rate: was 2e-05, now 1e-05" in lines and "seed: was 0, now 1" in lines
    assert "inputs.data: was 'abc', now 'abd'" in lines and "data.sketch: was nothing, now None" in lines
    assert not any("validation" in line for line in lines)
    assert caught.value.expected == "the config this run was started with" and "--out" in caught.value.fix
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_cosine_schedule_fixes_the_number_of_steps(tmp_path):
    cosine = OptimizerConfig(schedule="cosine")
    open_run(tmp_path, describe(optimizer=cosine))
    with pytest.raises(InputError, match="steps: was 100, now 200"):
        open_run(tmp_path, describe(optimizer=cosine, steps=200))


def test_other_rules_may_be_given(tmp_path):
    open_run(tmp_path, describe())
    run = open_run(tmp_path, describe(seed=1), same=((r"config\.seed", False), (".*", True)))
    assert run["resumed"][0]["changes"] == {"config.seed": {"was": 0, "now": 1}}


def test_directories_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="'a.mp4' but no run.json"):
        open_run(tmp_path / "videos", describe())
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "file", describe())
    with pytest.raises(InputError, match="holds no run.json"):
        read_run(tmp_path / "videos")
    for text, message in (("{", "no JSON"), ("[]", "format_version"), ('{"format_version": 9}', "9")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match=message):
            open_run(tmp_path, describe())


def test_other_hosts_only_compare(tmp_path):
    open_run(tmp_path / "run", describe(), leader=False)
    assert not (tmp_path / "run").exists()
    open_run(tmp_path / "run", describe())
    before = (tmp_path / "run" / "run.json").read_bytes()
    open_run(tmp_path / "run", describe(log_every=3), leader=False)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
