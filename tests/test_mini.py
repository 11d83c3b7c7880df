"""The recipe of the small model, part by part; as a whole in a slow test."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax import params
from animecolor_jax.config import COMPONENTS, preset
from animecolor_jax.mini import autoencoder, clips, latents, rows, stages
from animecolor_jax.mini.encoders import histogram, trim_caption
from animecolor_jax.mini.loop import Deadline, OutOfTime, Task, load, train
from animecolor_jax.mini.recipe import AutoencoderConfig, ClipsConfig, ScoreConfig, StagesConfig
from animecolor_jax.networks import abstract, creator
from animecolor_jax.pipeline import Noise, NonFiniteError, Pipeline
from animecolor_jax.train.stages import HCE, LCG
from animecolor_jax.weights import Weights, write_initial


@pytest.mark.parametrize("name", ["mini", "mini-cpu"])
def test_the_small_models_keep_to_their_sizes(name):
    config = preset(name)
    count = {
        part: sum(leaf.size for leaf in abstract(part, getattr(config, part)).values()) for part in COMPONENTS
    }
    assert sum(count.values()) <= 12e6
    assert count["vae"] <= 2.5e6
    assert 3e6 <= count["denoiser"] <= 4e6
    assert count["hce"] + count["text_encoder"] + count["image_encoder"] <= 2e6


# ---------------------------------------------------------------- clips


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("clips"), ClipsConfig(train=3, validation=2, test=2)
    return {split: clips.draw_split(folder, config, split, (32, 48)) for split in clips.SPLITS}


def test_twins_have_the_lines_of_the_test_clips_and_other_colors(drawn):
    test, swap = drawn["test"], drawn["swap"]
    np.testing.assert_array_equal(test.sketch, swap.sketch)
    assert test.captions == swap.captions
    assert np.abs(test.color.astype(int) - swap.color).mean() > 10


def test_splits_share_no_clip(drawn):
    seen = [clip.tobytes() for split in ("train", "validation", "test") for clip in drawn[split].sketch]
    assert len(set(seen)) == len(seen)


def test_clips_are_drawn_once(tmp_path):
    config = ClipsConfig(train=1)
    clips.draw_split(tmp_path, config, "train", (32, 48))
    stamp = (tmp_path / "train" / "color.npy").stat().st_mtime_ns
    clips.draw_split(tmp_path, config, "train", (32, 48))
    assert (tmp_path / "train" / "color.npy").stat().st_mtime_ns == stamp


def test_references_are_the_first_frame_and_different_others():
    for number in range(20):
        frames = latents.reference_frames(3, 9, number, seed=0)
        assert frames[0] == 0 and len(set(frames)) == 3 and frames.max() < 9


@pytest.mark.parametrize(
    ("caption", "length", "kept"),
    [("A dog runs.", 12, "A dog runs."), ("A dog runs.", 11, "A dog"), ("Ünï", 5, ""), ("", 4, "")],
)
def test_captions_are_cut_between_words(caption, length, kept):
    assert trim_caption(caption, length) == kept


def test_the_histogram_counts_every_pixel_once():
    pixels = np.zeros((1, 4, 4, 3), np.float32)
    pixels[0, 0] = 1.0  # a quarter is white
    found = np.asarray(histogram(jnp.asarray(pixels)))[0]
    assert found[0] == 0.75 and found[-1] == 0.25 and found.sum() == 1


# ---------------------------------------------------------------- the loop


def quadratic(steps=40):
    """A task whose every step depends on all before it."""

    @jax.jit
    def step(state, batch, number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), state.shape)
        state = state - 0.1 * (state - batch) + 0.01 * noise
        loss = jnp.square(state).mean()
        return state, {"loss": loss, "grad_norm": loss}

    return Task(jnp.ones(5), step, lambda number: np.full(5, number % 7, np.float32), steps, 1, lambda _: 0.1)


class Steps(Deadline):
    """Passes after so many questions."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def passed(self):
        self.left -= 1
        return self.left < 0


def test_slices_give_the_same_bits_as_one_run(tmp_path):
    whole = train(tmp_path / "whole", quadratic(), Deadline())
    for _ in range(3):
        with pytest.raises(OutOfTime):
            train(tmp_path / "sliced", quadratic(), Steps(11))
    sliced = train(tmp_path / "sliced", quadratic(), Deadline())
    np.testing.assert_array_equal(whole, sliced)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "sliced")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_a_finished_loop_returns_its_state_without_a_step(tmp_path):
    done = train(tmp_path, quadratic(), Deadline())
    task = quadratic()._replace(step=None)
    np.testing.assert_array_equal(train(tmp_path, task, Steps(0)), done)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path):
    with pytest.raises(OutOfTime):
        train(tmp_path, quadratic(), Steps(5))
    broken = quadratic()
    broken = broken._replace(batch=lambda number: np.full(5, np.nan, np.float32))
    with pytest.raises(NonFiniteError, match="step 6"):
        train(tmp_path, broken, Deadline())
    assert load(tmp_path / "state.npz", jnp.ones(5))[0] == 5


def test_a_deadline_in_minutes_passes():
    assert Deadline(0).passed() and not Deadline(1).passed()


# ---------------------------------------------------------------- VAE and stages


def test_a_fresh_vae_lets_mean_colors_through():
    config = preset("mini-cpu").vae
    vae = params.build(creator("vae", config), autoencoder.initial_vae(config, 0), what="vae")
    rng = np.random.default_rng(0)
    color = rng.uniform(-0.9, 0.9, (1, 1, 2, 2, 3)).astype(np.float32)
    image = color.repeat(16, axis=2).repeat(16, axis=3)
    decoded = jax.jit(lambda vae, image: vae.decode(autoencoder.posterior(vae.encode(image))[0]))(vae, image)
    inner = np.asarray(decoded).reshape(1, 1, 2, 16, 2, 16, 3)[:, :, :, 4:12, :, 4:12].mean((3, 5))
    assert np.corrcoef(inner.ravel(), color.ravel())[0, 1] > 0.95


def test_vae_batches_follow_from_their_number(drawn):
    config = AutoencoderConfig(crop=(16, 24), batch_size=3, image_batch_size=5)
    batches = [autoencoder.draw_batch(config, drawn["train"], 0, number) for number in range(8)]
    assert [batch.shape for batch in batches[:4]] == [(3, 9, 16, 24, 3)] * 3 + [(5, 1, 32, 48, 3)]
    again = autoencoder.draw_batch(config, drawn["train"], 0, 5)
    np.testing.assert_array_equal(batches[5], again)
    assert not np.array_equal(batches[4], batches[5])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "video_mean": (6, 3, 4, 6, 8), "video_logvar": (6, 3, 4, 6, 8), "sketch": (6, 3, 4, 6, 8),
        "reference_mean": (6, 2, 4, 6, 8), "reference_logvar": (6, 2, 4, 6, 8), "text": (6, 5, 7),
        "image_summary": (6, 2, 9), "image_features": (6, 2, 4, 9), "empty_text": (5, 7),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_stage_batches_hold_what_the_stage_reads(arrays):
    config = StagesConfig(batch_size=4, text_dropout=1.0)
    batch = stages.draw_batch(arrays, config, 0, 3, HCE)
    assert batch["image_summary"].shape == (4, 1, 9) and batch["reference_mean"].shape == (4, 1, 4, 6, 8)
    np.testing.assert_array_equal(batch["text"], np.broadcast_to(arrays["empty_text"], (4, 5, 7)))
    without = stages.draw_batch(arrays, config, 0, 3, LCG)
    assert not [name for name in without if name.startswith("image_")]
    np.testing.assert_array_equal(without["video_mean"], batch["video_mean"])


def test_the_baseline_reads_the_reference_behind_the_sketch(arrays):
    config = StagesConfig(batch_size=4, text_dropout=0.0)
    plain = stages.draw_batch(arrays, config, 0, 1, LCG)
    batch = stages.draw_batch(arrays, config, 0, 1, stages.BASELINE.config)
    assert batch["sketch"].shape == (4, 3, 4, 6, 16)
    np.testing.assert_array_equal(batch["sketch"][..., :8], plain["sketch"])
    for frame in range(3):
        np.testing.assert_array_equal(batch["sketch"][:, frame, ..., 8:], plain["reference_mean"][:, 0])


@pytest.mark.slow
def test_rows_are_colored_as_the_pipeline_colors(tmp_path):
    small = preset("mini-cpu")
    write_initial(tmp_path / "weights", small)
    weights = Weights(tmp_path / "weights")
    drawn = clips.draw_split(tmp_path, ClipsConfig(test=1), "test", (64, 96))
    arrays = latents.encode_split(tmp_path / "latents", "test", drawn, weights, ClipsConfig(), 0)
    pipeline = Pipeline.load(weights.directory)
    config = ScoreConfig(steps=3)
    found = rows.color(pipeline.model, pipeline.vae, weights.config.scheduler, arrays, config, [0])
    shapes = arrays["video_mean"].shape[1:], arrays["reference_mean"].shape[1:]
    noise, reference = rows._noise(jax.random.key(config.seed), np.array([0]), *shapes)
    sketch = np.repeat(drawn.sketch[0][..., None], 3, axis=-1)
    prompt = trim_caption(drawn.captions[0], small.denoiser.text_length)
    expected = pipeline(
        sketch, np.asarray(drawn.color[0, 0]), prompt=prompt, num_steps=3, guidance_scale=1.0, window=9,
        overlap=4, noise=Noise(np.asarray(reference), np.asarray(noise[0])),
    )  # fmt: skip
    assert np.abs(found[0].astype(int) - expected).max() <= 1


SMOKE = """
from dataclasses import replace
from animecolor_jax.mini.recipe import *

def short(config, steps):
    return replace(config, steps=steps, optimizer=replace(config.optimizer, warmup_steps=1))

CONFIG = MiniConfig(
    "mini-cpu", clips=ClipsConfig(train=20, validation=16, test=3), autoencoder=short(AutoencoderConfig(), 4),
    encoders=short(EncodersConfig(batch_size=8), 3), stages=short(StagesConfig(), (2, 2, 2, 2)),
    score=ScoreConfig(steps=2),
)
"""


# a bare machine with a GPU has none of these
BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("grain", "tensorflow_datasets", "av", "tyro")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_whole_recipe_runs_in_slices_and_its_weights_color(tmp_path):
    config, out = tmp_path / "smoke.py", tmp_path / "run"
    config.write_text(SMOKE)
    command = [sys.executable, "-c", BARE, "tools/train_mini.py", "--config", str(config), "--out", str(out)]
    command.append("--json")
    last = subprocess.run([*command, "--minutes", "0.05"], capture_output=True, text=True)
    assert last.returncode == 0 and json.loads(last.stdout.splitlines()[-1]) == {"done": False}
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    found = json.loads(last.stdout.splitlines()[-1])
    assert list(found["rows"]) == list(rows.ROWS) and found["clips"] == 3
    assert (out / "curves.png").exists() and (out / "table.md").exists()
    weights = Weights(found["weights"])
    assert weights.inference.size == (64, 96) and weights.inference.window == 9
    assert weights.values["licences"] == {}
    demo = [sys.executable, "tools/colorize.py", "--demo", "--weights", found["weights"], "--out"]
    subprocess.run([*demo, str(tmp_path / "demo.mp4")], check=True)


def test_another_recipe_is_refused_in_the_same_folder(tmp_path):
    from animecolor_jax.errors import InputError
    from animecolor_jax.mini.recipe import MiniConfig
    from animecolor_jax.mini.run import Recipe

    config = MiniConfig("mini-cpu")
    Recipe(config, tmp_path, Deadline())
    Recipe(config, tmp_path, Deadline())
    with pytest.raises(InputError, match="another recipe"):
        Recipe(dataclasses.replace(config, seed=1), tmp_path, Deadline())
