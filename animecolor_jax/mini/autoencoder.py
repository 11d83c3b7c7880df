"""Training of the causal VAE: videos, line art and single frames in, the same out.

Mean absolute error and a small KL divergence; no perceptual or adversarial loss, which drawn clips with flat
colours do not need and which would need networks of their own.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from animecolor_jax import networks, params
from animecolor_jax.mini.loop import Task, train
from animecolor_jax.models.vae import posterior
from animecolor_jax.train.optimizer import learning_rate_schedule, make_optimizer
from data_pipeline.shapes import latent_frames

SPREAD = 2.0  # of a fresh latent, in units of its colour in [-1, 1]
STEADY = 3.0  # of two constant channels, beside which a clip's contrast hardly changes a group's variance
SMALL = 0.1
SMALL_LOGVAR = -6.0  # of fresh latents, so that their noise does not hide them at first
COLORS = 6  # channels that hold red, green, blue and their negatives; two constant ones follow
VALIDATION_CLIPS = 16


def initial_vae(config, seed):
    """{name: float32 array} of a fresh VAE that lets mean colours through.

    It learns the rest from there, much sooner than from `networks.initial_leaves` alone. Colours pass as
    pairs of channels (x, -x): silu(y) - silu(-y) = y makes a non-linearity vanish, and the mean of a group
    is 0. In the end the decoder's last norm is shifted by the latents. All other channels begin at random,
    and all residual branches at zero.
    """
    leaves = dict(networks.initial_leaves("vae", config, seed))
    pairs = np.concatenate([np.eye(3), -np.eye(3)], axis=1)  # [3, 6]
    same = np.eye(COLORS)
    for name, leaf in leaves.items():
        if name.endswith("conv2/kernel"):
            leaf[:] = 0
        elif name.endswith("conv_y/bias"):
            leaf += 1
        elif name.endswith(("conv_y/kernel", "conv_b/kernel")):
            leaf *= SMALL
        elif re.fullmatch(r"encoder/.*conv_shortcut/kernel", name):
            leaf[0, 0, 0, :, :COLORS] = np.pad(same, ((0, leaf.shape[3] - COLORS), (0, 0)))
        elif name.endswith("downsample/kernel"):
            leaf[..., :COLORS] = 0
            leaf[:2, :2, :COLORS, :COLORS] = same / 4
    last = len(config.block_out_channels) - 1
    leaves["encoder/conv_in/kernel"][..., :COLORS] = 0
    leaves["encoder/conv_in/kernel"][2, 1, 1, :, :COLORS] = pairs
    leaves[f"encoder/down_{last}/resnet_0/conv_shortcut/kernel"][..., COLORS : COLORS + 2] = 0
    leaves[f"encoder/down_{last}/resnet_0/conv_shortcut/bias"][COLORS : COLORS + 2] = STEADY, -STEADY
    moments = leaves["encoder/conv_out/kernel"]
    moments[..., :3] = 0
    moments[2, 1, 1, :COLORS, :3] = SPREAD * pairs.T
    moments[..., config.latent_channels :] *= SMALL
    leaves["encoder/conv_out/bias"][config.latent_channels :] = SMALL_LOGVAR
    shift = leaves["decoder/norm_out/conv_b/kernel"]
    shift[..., :COLORS] = 0
    shift[0, 0, 0, :3, :COLORS] = pairs / SPREAD
    leaves["decoder/norm_out/conv_y/bias"][:] = SMALL
    pixels = leaves["decoder/conv_out/kernel"]
    pixels[...] = 0
    pixels[2, 1, 1, :COLORS] = pairs.T
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def reconstruction_loss(vae, video, noise, kl_weight):
    """Loss of videos [B, T, H, W, 3] in [-1, 1], and the mean squared error of their reconstructions.

    Args:
        noise: [B, t, h, w, C] standard normal, samples the posterior.
        kl_weight: of the KL divergence per latent to the standard normal distribution.
    """
    mean, std = posterior(vae.encode(video))
    decoded = vae.decode(mean + std * noise)
    divergence = 0.5 * (jnp.square(mean) + jnp.square(std) - 1) - jnp.log(std)
    error = decoded - video
    return jnp.abs(error).mean() + kl_weight * divergence.mean(), jnp.square(error).mean()


def to_pixels(frames):
    """[...] uint8 -> [-1, 1] float32."""
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def make_task(config, model_config, clips, held_out, seed):
    """`loop.Task` of the VAE; its state is (parameters, optimiser state).

    Args:
        config: AutoencoderConfig. model_config: VAEConfig. clips, held_out: Clips.
    """
    create = networks.creator("vae", model_config)
    leaves = initial_vae(model_config, seed)
    # blocks are not stacked here, and every name counts as it is
    optimizer = make_optimizer(config.optimizer, config.steps, leaves)

    def loss_of(leaves, video, noise):
        vae = params.build(create, leaves, what="vae")
        return reconstruction_loss(vae, video, noise, config.kl_weight)

    def latents_like(video):
        _, frames, height, width, _ = video.shape
        size, frames = model_config.spatial_compression, latent_frames(frames)
        return (len(video), frames, height // size, width // size, model_config.latent_channels)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, video, number):
        leaves, opt_state = state
        video = to_pixels(video)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), latents_like(video))
        (loss, mse), gradient = jax.value_and_grad(loss_of, has_aux=True)(leaves, video, noise)
        updates, opt_state = optimizer.update(gradient, opt_state, leaves)
        values = {"loss": loss, "grad_norm": optax.tree.norm(gradient), "mse": mse}
        return (optax.apply_updates(leaves, updates), opt_state), values

    @jax.jit
    def psnr(leaves, video):
        video = to_pixels(video)
        vae = params.build(create, leaves, what="vae")
        decoded = jnp.clip(vae.decode(posterior(vae.encode(video))[0]), -1, 1)
        squared = jnp.square((decoded - video) / 2).mean((2, 3, 4))
        return -10 * jnp.log10(squared).mean(1), jnp.abs(decoded - video).mean()

    def validate(state):
        groups = [held_out.color[:VALIDATION_CLIPS], _grey(held_out.sketch[:VALIDATION_CLIPS])]
        groups.append(held_out.color[:VALIDATION_CLIPS, :1])
        found = [[psnr(state[0], group[i : i + 4]) for i in range(0, len(group), 4)] for group in groups]
        clips, sketches, images = (float(np.mean([score for score, _ in group])) for group in found)
        loss = float(np.mean([loss for _, loss in found[0]]))
        return {"loss": loss, "psnr": clips, "psnr_sketch": sketches, "psnr_image": images}

    return Task(
        (leaves, optimizer.init(leaves)), step, functools.partial(draw_batch, config, clips, seed),
        config.steps, config.batch_size, learning_rate_schedule(config.optimizer, config.steps), validate,
    )  # fmt: skip


def _grey(sketch):
    return np.repeat(sketch[..., None], 3, axis=-1)


def draw_batch(config, clips, seed, number):
    """The batch of a step, [B, T, h, w, 3] uint8: crops of clips and of their line art, mirrored at times; or
    single frames."""
    rng = np.random.default_rng([seed, number])
    images = number % config.image_every == config.image_every - 1
    count = config.image_batch_size if images else config.batch_size
    length, height, width = clips.sketch.shape[1:]
    batch = []
    for index in rng.integers(len(clips.sketch), size=count):
        clip = _grey(clips.sketch[index]) if rng.random() < config.sketch_share else clips.color[index]
        if images:
            clip = clip[rng.integers(length)][None]
        else:
            rows, columns = config.crop
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            clip = clip[:, top : top + rows, left : left + columns]
        batch.append(clip[:, :, ::-1] if rng.random() < 0.5 else clip)
    return np.stack(batch)


def train_vae(folder, config, model_config, clips, held_out, seed, deadline):
    """Trains it, or goes on; returns ({name: array}, the scaling factor of its latents)."""
    leaves, _ = train(folder, make_task(config, model_config, clips, held_out, seed), deadline)
    vae = params.build(networks.creator("vae", model_config), leaves, what="vae")
    encode = jax.jit(lambda video: posterior(vae.encode(to_pixels(video)))[0])
    latents = [encode(clips.color[i : i + 4]) for i in range(0, 64, 4)]
    return leaves, float(1 / np.std(np.concatenate(latents)))
