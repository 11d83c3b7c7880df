"""The jitted pieces of inference: encoders, the once-per-clip conditions, one denoising step, decoding.

Every function takes its network as an argument (modules are pytrees), so that one compilation serves
every call
of the same shapes. Latents are [B, T, H, W, C], pixels [B, T, H, W, 3].
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax import canvas
from animecolor_jax.errors import InputError
from animecolor_jax.models import positions
from animecolor_jax.models.vae import encode_slices, posterior
from animecolor_jax.sampling import guide, scale_input, step
from animecolor_jax.sharding import constrain


@jax.jit
def encode_text(text_encoder, ids):
    """[B, L] int32 -> [B, L, D]; padding takes part, as in the reference."""
    return text_encoder(ids)


@jax.jit
def encode_image(image_encoder, pixels):
    """[B, H, W, 3] in [0, 1] -> RADIO's summary [B, K E] and features [B, N, E]."""
    return image_encoder(pixels)


@jax.jit
def encode_chunk(vae, chunk, cache):
    """[B, T, H, W, 3] in [-1, 1] -> moments and the cache for the next chunk."""
    return vae.encode_chunk(chunk, cache)


@jax.jit
def decode_chunk(vae, chunk, cache):
    """Scaled latents -> [B, T, H, W, 3] uint8-ready float32 in [0, 1], and the cache for the next chunk."""
    frames, cache = vae.decode_chunk(chunk / jnp.asarray(vae.config.scaling_factor, chunk.dtype), cache)
    return jnp.clip(frames.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0), cache


def encode_video(vae, frames, bar=None):
    """Frames [B, T, H, W, 3] uint8 -> the VAE's moments [B, t, h, w, 2 C], chunk by chunk.

    One program serves clips of every length: chunks differ in nothing but the cache. Each updates `bar`.

    Raises:
        InputError: frames or a size that the VAE cannot encode.
    """
    moments, cache = [], None
    for part in encode_slices(frames.shape[1], vae.config):
        pixels = jnp.asarray(frames[:, part]).astype(jnp.float32) / 255 * 2 - 1
        chunk, cache = encode_chunk(vae, pixels, cache)
        moments.append(chunk)
        if bar is not None:
            bar.update()
    return jnp.concatenate(moments, axis=1)


def sketch_latents(vae, moments):
    """Moments -> scaled mode: nothing of the line art is random."""
    mean, _ = posterior(moments)
    return mean * jnp.asarray(vae.config.scaling_factor, mean.dtype)


def reference_latents(vae, moments, noise):
    """Moments and noise [B, T, H, W, C] -> scaled sample."""
    mean, std = posterior(moments)
    return (mean + std * noise.astype(mean.dtype)) * jnp.asarray(vae.config.scaling_factor, mean.dtype)


@jax.jit
def make_conditions(model, reference, summary, features):
    """`AnimeColor.conditions`, compiled: once per clip."""
    return model.conditions(reference, summary, features)


def rotary_table(config, size):
    """Rotary table of a clip of `size` = (T, H, W) latents, or None for a model with sincos positions."""
    if not config.rope:
        return None
    frames, height, width = size
    patch = config.patch_size
    grid, base = (
        (height // patch, width // patch),
        (config.sample_height // patch, config.sample_width // patch),
    )
    return positions.rope_table(config.head_dim, frames, grid, positions.grid_crop(grid, base))


def predict(model, latents, sketch, text, timestep, conditions, rope):
    """The network's v for every text.

    Args:
        latents, sketch: [1, T, H, W, C]; text: [G, L, D], negative first; timestep: scalar.

    Returns:
        [G, T, H, W, C].
    """
    return model(*for_every_text(latents, sketch, text, timestep), conditions, rope)


def for_every_text(latents, sketch, text, timestep):
    """What the model is called with, B = G: guidance varies the text only, all else is shared. Arguments are
    those of `predict`."""
    branches = len(text)
    latents, sketch = (jnp.broadcast_to(x, (branches, *x.shape[1:])) for x in (latents, sketch))
    return latents, sketch, text, jnp.full(branches, timestep)


class Layout(NamedTuple):
    """How the windows of a clip share its latent frames; one window is the plain case.

    Attributes:
        weights: [W, T] float32, summing to 1 over the windows of each latent frame of the clip.
        index: [W, T] int32, the latent frame in the clip; a later window's first latent holds a single frame
            and is its own, numbered from `total` on.
        total: latent frames of the clip.
    """

    weights: np.ndarray
    index: np.ndarray
    total: int

    @classmethod
    def of(cls, starts, length):
        """Layout of windows of `length` latents that start at the frames `starts`."""
        index = canvas.latent_index(starts, length)
        total = int(index.max()) + 1
        weights = np.where(index < 0, 1.0, canvas.blend_weights(starts, length, total)).astype(np.float32)
        own = total + np.arange(len(starts), dtype=np.int32)[:, None]
        return cls(weights, np.where(index < 0, own, index), total)

    def spread(self, key, shape):
        """Standard normal [W, T, *shape], equal where windows overlap."""
        count = self.total + len(self.index)
        return jax.random.normal(key, (count, *shape))[self.index]

    def join(self, latents):
        """[W, T, ...] -> the clip's latents [1, total, ...]."""
        _, first = np.unique(self.index, return_index=True)
        return latents.reshape(-1, *latents.shape[2:])[first[: self.total]][None]


def blend(v, weights, index):
    """Makes windows agree: v [W, T, ...] -> each latent frame the weighted mean over the windows that
    hold it."""
    weighted = v * weights.reshape(*weights.shape, *(1,) * (v.ndim - 2))
    bound = weights.size + len(weights)  # no index is larger
    total = jax.ops.segment_sum(weighted.reshape(-1, *v.shape[2:]), index.reshape(-1), num_segments=bound)
    return total[index]


@partial(jax.jit, static_argnames=("dtype", "mesh", "keep"), donate_argnames=("latents", "state"))
def denoise_step(
    model,
    latents,
    state,
    sketch,
    text,
    conditions,
    rope,
    sampler,
    guidance_scale,
    i,
    noise,
    weights,
    index,
    residual=None,
    *,
    dtype,
    mesh=None,
    keep=False,
):
    """One call of the network for every window, guidance, blending and the sampler's update.

    Args:
        latents: [W, T, H, W, C], one row per window of the clip, equal where windows overlap.
        state: the sampler's history. sketch: [W, T, H, W, C].
        text: [2, L, D], negative first, or [1, L, D] for no guidance.
        i: index of the call. noise: like latents, or None if the sampler draws none.
        weights, index: of the `Layout`.
        residual: [W, G, S, D], what the blocks added to the tokens in an earlier call and are taken to add
            again; None runs them.
        dtype: of the latents between steps (the reference rounds them to the network's dtype).
        keep: whether to return what the blocks add.

    Returns:
        (latents, state, whether all latents are finite, `residual` for later calls or None).
    """
    inputs = scale_input(sampler, latents, i).astype(dtype)
    timestep = jnp.asarray(sampler.timesteps)[i]

    def one_window(xs):
        window, window_sketch, added = xs
        window, window_sketch = (shard_latents(x[None], mesh) for x in (window, window_sketch))
        given = for_every_text(window, window_sketch, text, timestep)
        if added is None:
            v, added = model.with_residual(*given, conditions, rope)
        else:
            v = model.from_residual(*given, added)
        v = guide(v[0], v[1], guidance_scale) if len(v) == 2 else v[0].astype(jnp.float32)
        return v, constrain(added) if keep else None

    v, kept = jax.lax.map(one_window, (inputs, sketch, residual))
    latents, state = step(sampler, blend(v, weights, index), latents, state, i, noise)
    latents = latents.astype(dtype)
    return latents, state, jnp.isfinite(latents).all(), kept


def check_step_cache(threshold, sampler):
    """Raises InputError unless it is a finite number of at least 0, and 0 for a sampler that calls the
    network several times within a step."""
    if threshold and sampler == "pndm":
        raise InputError(f"{threshold} with pndm", where="--step-cache", expected="0", fix="use ddim")
    if not 0 <= threshold < float("inf"):
        raise InputError(
            f"{threshold}", where="--step-cache", expected="a finite number of at least 0",
            fix="0 is exact; the larger, the faster and the less like it",
        )  # fmt: skip


def steps_to_run(denoiser, sampler, threshold):
    """Which calls run the network's blocks, where the others take what these added: [N] bool.

    Blocks run again once the timestep's embedding has changed by `threshold` in all, relative to its mean
    size, since they last did; in the first and the last call always. After TeaCache (arXiv:2411.19108), which
    looks at the first block's input as the embedding modulates it, through a polynomial fitted to one model.
    """
    embedded = np.asarray(_embed_timesteps(denoiser, jnp.asarray(sampler.timesteps)), np.float32)
    runs, changed = np.ones(len(embedded), bool), 0.0
    for i in range(1, len(embedded) - 1):
        changed += np.abs(embedded[i] - embedded[i - 1]).mean() / np.abs(embedded[i - 1]).mean()
        runs[i] = changed >= threshold
        changed = 0.0 if runs[i] else changed
    return runs


@jax.jit
def _embed_timesteps(denoiser, timesteps):
    return denoiser.time_embed(timesteps)


def shard_latents(x, mesh):
    """Places latents [B, T, H, W, C] on the mesh, rows over `context` where they divide; None is one
    device."""
    if mesh is None:
        return x
    rows = "context" if x.shape[2] % mesh.shape["context"] == 0 else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, None, rows)))
