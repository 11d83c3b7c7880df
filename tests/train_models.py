"""Tiny models to train: the stages of configs/, random parameters and random batches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import networks
from animecolor_jax.config import preset
from animecolor_jax.train import state
from animecolor_jax.train.command import override, read_config
from animecolor_jax.train.export import export_weights
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.step import Objective

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("stage[1-4]_*.py"))
STAGES = (1, 2, 3, 4)
EXACT = (
    "--compute.dtype", "float32", "--compute.frozen-dtype", "float32", "--compute.remat", "none",
    "--optimizer.warmup-steps", "0", "--optimizer.learning-rate", "1e-3",
    "--data.batch-size", "4", "--steps", "10",
)  # fmt: skip


def stage_config(stage, *flags):
    """The TrainConfig of stage 1 to 4, in float32, without warm-up, changed by flags that come last."""
    return override(override(read_config(CONFIGS[stage - 1]), list(EXACT)), list(flags))


def model_config(hce=(), lcg=(), **changes):
    """The preset "tiny", made smaller still; `changes` are those of denoiser and LCG."""
    small = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "text_length": 8, "text_dim": 32} | changes
    tiny = preset("tiny")
    denoiser = dataclasses.replace(tiny.denoiser, **small)
    sizes = {"model_dim": denoiser.dim, "num_cross": denoiser.num_layers // 2, "depth": 1, "num_tokens": 3}
    return dataclasses.replace(
        tiny,
        preset="custom",
        denoiser=denoiser,
        lcg=dataclasses.replace(tiny.lcg, **(small | dict(lcg))),
        hce=dataclasses.replace(tiny.hce, **(sizes | dict(hce))),
    )


def make_objective(config, model=None):
    """The `Objective` of a TrainConfig and an AnimeColorConfig."""
    model = model or model_config()
    return Objective(Parts(config, model), model.scheduler, model.vae.scaling_factor)


def random_parameters(parts, config, seed=0):
    """(trained, frozen) as a run holds them, in which nothing is zero, so that everything has an effect."""
    rng, trained, frozen = np.random.default_rng(seed), {}, {}
    for component, component_config in parts.configs.items():
        for leaf, value in networks.initial_leaves(component, component_config, seed):
            name = f"{component}/{leaf}"
            value = jnp.asarray(value + 0.1 * rng.standard_normal(value.shape, np.float32))
            if name in parts.trained:
                trained[name] = value
            else:
                frozen[name] = value.astype(config.compute.frozen_dtype)
    return trained, frozen


def random_inputs(model, batch=4, size=(2, 4, 6), references=1, seed=1):
    """A batch of `step.clip_losses`; `size` is that of the latents (T, H, W)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((batch, *shape), np.float32))  # noqa: E731
    channels = model.denoiser.out_channels
    return {
        "video_mean": normal(*size, channels),
        "video_logvar": normal(*size, channels) - 3,
        "sketch": normal(*size, channels),
        "reference_mean": normal(references, *size[1:], channels),
        "reference_logvar": normal(references, *size[1:], channels) - 3,
        "text": normal(model.denoiser.text_length, model.denoiser.text_dim),
        "image_summary": normal(references, model.hce.summary_dim),
        "image_features": normal(references, 6, model.hce.feature_dim),
    }


def random_state(parts, config, seed=0):
    """(TrainState of step 0 on one device, its optimiser)."""
    optimizer = make_optimizer(config.optimizer, config.steps, parts.trained)
    trained, frozen = random_parameters(parts, config, seed)
    ema = jax.tree.map(jnp.copy, trained) if config.optimizer.ema else None
    key = jax.random.key(config.seed)
    return state.TrainState(jnp.int32(0), trained, optimizer.init(trained), ema, frozen, key), optimizer


def write_run(folder, init, config, seed=0, step=7):
    """A run as it would end, with random parameters; returns {name: array} of what was trained."""
    from animecolor_jax.train.sources import RUN_FILE, WEIGHTS, Sources  # fsspec, an extra

    sources = Sources(init, config.stage)
    parts = Parts(config, sources.model_config)
    trained, _ = random_parameters(parts, config, seed)
    export_weights(folder / WEIGHTS, sources, parts, config, step, trained)
    (folder / RUN_FILE).write_text("{}")
    return trained
