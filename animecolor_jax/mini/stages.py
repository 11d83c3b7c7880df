"""The four stages on arrays: parts, objective, update and weights directories of `train`, in `mini`'s loop.

`tools/train.py` does the same from records; what it needs for pods and for video files is left out here.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax.mini.loop import Task, train
from animecolor_jax.sharding import make_mesh
from animecolor_jax.train import stages, state
from animecolor_jax.train.config import ComputeConfig, TrainConfig
from animecolor_jax.train.export import export_weights
from animecolor_jax.train.optimizer import learning_rate_schedule, make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.sources import Sources
from animecolor_jax.train.step import Objective, draw, make_train_step
from data_pipeline.dataset import DataConfig

REFERENCES = ("reference_mean", "reference_logvar", "image_summary", "image_features")


class Stage(NamedTuple):
    """One of the four: its `StageConfig`, and the --init of its run, {0} the base weights, {1} the folder of
    all."""

    config: stages.StageConfig
    init: tuple[str, ...]


CONCAT = "concat"  # the baseline: the reference's latents are on the input channels, behind the sketch's
STAGES = {
    "stage1_sketch": Stage(stages.SKETCH, ("{0}",)),
    "stage2_hce": Stage(stages.HCE, ("{1}/stage1_sketch/weights",)),
    "stage3_lcg": Stage(stages.LCG, ("{1}/stage1_sketch/weights",)),
    "stage4_joint": Stage(stages.JOINT, ("{1}/stage3_lcg/weights", "hce={1}/stage2_hce/weights")),
}
BASELINE = Stage(dataclasses.replace(stages.SKETCH, name=CONCAT), ("{0}",))


def train_config(config, stage, steps, seed):
    """The `TrainConfig` of a stage. config: StagesConfig."""
    compute = ComputeConfig(dtype=config.dtype, frozen_dtype="float32", remat="none")
    return TrainConfig(
        stage=stage, steps=steps, seed=seed, data=DataConfig(batch_size=config.batch_size),
        optimizer=config.optimizer, compute=compute,
    )  # fmt: skip


def run_stage(folder, base, name, config, steps, arrays, held_out, seed, deadline):
    """Trains a stage, or goes on, and writes FOLDER/NAME/weights.

    Args:
        folder: of all stages. base: weights directory that stage 1 starts from; for the baseline one whose
            denoiser has as many more input channels. name: in `STAGES`, or CONCAT. config: StagesConfig.
        arrays, held_out: of `latents.encode_split`.

    Raises:
        OutOfTime: see `loop.train`.
    """
    stage, folder = BASELINE if name == CONCAT else STAGES[name], Path(folder)
    out = folder / name / "weights"
    if out.exists():
        return
    sources = Sources([text.format(base, folder) for text in stage.init], stage.config)
    run = train_config(config, stage.config, steps, seed)
    parts = Parts(run, sources.model_config)
    task = make_task(run, sources, parts, arrays, held_out, config)
    trained, _, ema = train(folder / name, task, deadline)
    export_weights(out, sources, parts, run, steps, trained if ema is None else ema)


def make_task(run, sources, parts, arrays, held_out, config):
    """`loop.Task` of a stage; its state is (trained parameters, optimiser state, their moving average)."""
    mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
    optimizer = make_optimizer(run.optimizer, run.steps, parts.trained)
    start = state.create(sources, parts, optimizer, run, mesh)
    model = sources.model_config
    objective = Objective(parts, model.scheduler, model.vae.scaling_factor)
    update = make_train_step(objective, optimizer, run.optimizer)

    def step(current, batch, number):
        *current, values = update(*current, start.frozen, batch, start.key, jnp.int32(number))
        return tuple(current), values

    losses = jax.jit(objective.losses)
    held_out = stage_inputs(run.stage, {name: held_out[name] for name in held_out if name != "empty_text"})

    def validate(current):
        triples = fixed_draws(objective, held_out, config.timesteps)
        trained = current[0] if current[2] is None else current[2]
        found = [losses(trained, start.frozen, inputs, draws) for inputs, draws in triples]
        found = np.concatenate(found).astype(np.float64)
        error = found.std(ddof=1) / np.sqrt(len(found))
        return {"loss": float(found.mean()), "standard_error": float(error), "losses": found.tolist()}

    return Task(
        (start.trainable, start.opt_state, start.ema), step,
        lambda number: draw_batch(arrays, config, run.seed, number, run.stage),
        run.steps, config.batch_size, learning_rate_schedule(run.optimizer, run.steps), validate,
    )  # fmt: skip


def draw_batch(arrays, config, seed, number, stage):
    """The inputs of a step: clips that its number decides, with one reference each, and captions at times."""
    rng = np.random.default_rng([seed, number])
    chosen = rng.choice(len(arrays["text"]), config.batch_size, replace=False)
    which = rng.integers(arrays["reference_mean"].shape[1], size=len(chosen))
    silent = rng.random(len(chosen)) < config.text_dropout
    batch = {name: arrays[name][chosen] for name in ("video_mean", "video_logvar", "sketch", "text")}
    batch["text"] = np.where(silent[:, None, None], arrays["empty_text"], batch["text"])
    return stage_inputs(stage, batch | {name: arrays[name][chosen, which][:, None] for name in REFERENCES})


def stage_inputs(stage, inputs):
    """What of {name: [B, ...]} a stage reads; the baseline has the reference among the sketch's channels."""
    inputs = dict(inputs)
    if "hce" not in stage.conditions:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("image_")}
    if stage.name == CONCAT:
        inputs["sketch"] = join_reference(inputs["sketch"], inputs["reference_mean"])
    return inputs


def join_reference(sketch, reference):
    """Sketch [B, t, h, w, C] and references [B, 1, h, w, C] -> [B, t, h, w, 2 C]."""
    return np.concatenate([sketch, np.broadcast_to(reference, sketch.shape)], axis=-1)


def fixed_draws(objective, inputs, timesteps):
    """Yields (inputs, Draws) of all held-out clips at timesteps spread over the schedule, always the same."""
    count, steps = len(inputs["text"]), len(objective.alphas_cumprod)
    for turn in range(timesteps):
        draws = draw(jax.random.key(turn), inputs, steps)
        spread = (turn + (np.arange(count) + 0.5) / count) / timesteps * steps
        yield inputs, draws._replace(timesteps=jnp.asarray(spread, jnp.int32))
