"""The loss and one update.

Axes: B clips, R references, t h w latent frames, rows and columns, C latent channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from animecolor_jax import denoise, diffusion, flops
from animecolor_jax.models.animecolor import Conditions
from animecolor_jax.models.vae import posterior
from animecolor_jax.sharding import constrain
from animecolor_jax.train.optimizer import update_ema


class Draws(NamedTuple):
    """What is random in the loss of B clips."""

    timesteps: jax.Array  # [B] int32
    noise: jax.Array  # [B, t, h, w, C], of the forward process
    video: jax.Array  # [B, t, h, w, C], samples the VAE's posterior of the clip
    reference: jax.Array  # [B, R, h, w, C], and of the references


def draw(key, inputs, num_timesteps):
    """Uniform timesteps and standard normal noise for the clips of `inputs`; the same on any mesh."""
    keys = jax.random.split(key, 4)
    shape = inputs["video_mean"].shape
    return Draws(
        jax.random.randint(keys[0], shape[:1], 0, num_timesteps),
        *(constrain(jax.random.normal(k, s)) for k, s in zip(
            keys[1:], (shape, shape, inputs["reference_mean"].shape), strict=True
        )),
    )  # fmt: skip


def input_shapes(stage, model_config, latents, references=1):
    """{name: shape of one clip} of what `clip_losses` reads where all is precomputed.

    Args:
        stage: StageConfig. model_config: AnimeColorConfig. latents: (t, h, w) of the clip.
    """
    denoiser = model_config.denoiser
    clip, reference = (*latents, denoiser.out_channels), (references, *latents[1:], denoiser.out_channels)
    shapes = dict.fromkeys(("video_mean", "video_logvar", "sketch"), clip)
    shapes |= dict.fromkeys(("reference_mean", "reference_logvar"), reference)
    shapes["text"] = (denoiser.text_length, denoiser.text_dim)
    if "hce" in stage.conditions:
        patches = flops.image_patches(model_config, latents[1:])
        shapes["image_summary"] = (references, model_config.hce.summary_dim)
        shapes["image_features"] = (references, patches, model_config.hce.feature_dim)
    return shapes


def sample_latents(mean, logvar, noise, scaling_factor):
    """A sample of the VAE's posterior, scaled, float32; log-variances as the encoder gives them."""
    moments = jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32)
    mean, std = posterior(moments)
    return (mean + std * noise) * scaling_factor


def clip_losses(model, inputs, draws, alphas_cumprod, scaling_factor, bank_gradient=False):
    """Mean squared error of the predicted v, for each clip.

    Args:
        model: `AnimeColor`; networks that the stage does not use are None.
        inputs: {"video_mean", "video_logvar", "sketch": [B, t, h, w, C], "reference_mean",
            "reference_logvar": [B, R, h, w, C], "text": [B, L, D], and for HCE "image_summary": [B, R, S],
            "image_features": [B, R, N, E]}; latents are not scaled yet.
        draws: `Draws`.
        alphas_cumprod: [num_train_timesteps], without SNR shift.
        bank_gradient: whether gradients pass the bank into the LCG.

    Returns:
        [B] float32.

    Source: AnimeColor (arXiv:2507.20158) eq. 5-8.
    """
    dtype = model.denoiser.config.dtype
    clean = sample_latents(inputs["video_mean"], inputs["video_logvar"], draws.video, scaling_factor)
    noisy = diffusion.add_noise(clean, draws.noise, draws.timesteps, alphas_cumprod)
    target = diffusion.velocity(clean, draws.noise, draws.timesteps, alphas_cumprod)
    sketch = inputs["sketch"].astype(jnp.float32) * scaling_factor
    bank = cross = None
    if model.lcg is not None:
        means, logvars = inputs["reference_mean"], inputs["reference_logvar"]
        reference = sample_latents(means, logvars, draws.reference, scaling_factor)
        bank = model.bank(reference.astype(dtype))
        bank = bank if bank_gradient else jax.lax.stop_gradient(bank)
    if model.hce is not None:
        cross = model.hce.key_value(model.color_tokens(inputs["image_summary"], inputs["image_features"]))
    rope = denoise.rotary_table(model.denoiser.config, noisy.shape[1:4])
    v = model(
        noisy.astype(dtype),
        sketch.astype(dtype),
        inputs["text"],
        draws.timesteps,
        Conditions(bank, cross),
        rope,
    )
    error = jnp.square(v.astype(jnp.float32) - target)
    return error.reshape(len(error), -1).mean(-1)


class Objective:
    """The loss of a stage as a function of its parameters.

    Args:
        parts: train.parts.Parts. scheduler: SchedulerConfig. scaling_factor: of the VAE.
    """

    def __init__(self, parts, scheduler, scaling_factor):
        self.parts, self.scheduler, self.scaling_factor = parts, scheduler, scaling_factor
        self.alphas_cumprod = diffusion.alphas_cumprod(scheduler)

    def losses(self, trained, frozen, inputs, draws):
        """[B], see `clip_losses`."""
        model = self.parts.model(trained, frozen)
        return clip_losses(
            model, inputs, draws, self.alphas_cumprod, self.scaling_factor, self.parts.trains_lcg
        )


def gradients(objective, trained, frozen, inputs, draws, accumulate=1):
    """Mean loss of a batch and its gradient with respect to `trained`, float32.

    Args:
        accumulate: parts that the batch is divided into, one after the other. Part i takes every
            `accumulate`-th clip from the i-th on, so that no clip changes its device.
    """

    def mean_loss(trained, inputs, draws):
        return objective.losses(trained, frozen, inputs, draws).mean()

    value_and_grad = jax.value_and_grad(mean_loss)
    if accumulate == 1:
        return value_and_grad(trained, inputs, draws)

    def part(x):  # [B, ...] -> [accumulate, B / accumulate, ...]
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total, xs):
        inputs, draws = jax.tree.map(constrain, xs)
        return jax.tree.map(jnp.add, total, value_and_grad(trained, inputs, draws)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(part, (inputs, draws)))
    return jax.tree.map(lambda x: x / accumulate, total)


def make_train_step(objective, optimizer, config, shardings=None):
    """The compiled update.

    Args:
        objective: Objective. optimizer: from `make_optimizer`. config: OptimizerConfig.
        shardings: of (trained, opt_state, ema), for a mesh; else None.

    Returns:
        function of (trained, opt_state, ema, frozen, inputs, key, step), the first three donated, to
        (trained, opt_state, ema, {"loss", "grad_norm"}). `key` is the run's; `step` counts from 0.
    """
    out = None if shardings is None else (*shardings, None)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2), out_shardings=out)
    def train_step(trained, opt_state, ema, frozen, inputs, key, step):
        draws = draw(jax.random.fold_in(key, step), inputs, len(objective.alphas_cumprod))
        loss, grads = gradients(objective, trained, frozen, inputs, draws, config.accumulate)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        if ema is not None:
            ema = update_ema(ema, trained, config.ema)
        return trained, opt_state, ema, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step
