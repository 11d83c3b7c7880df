"""The 3D diffusion transformer of CogVideoX: AnimeColor's denoiser and, as its copy, the LCG.

Text and video tokens share attention and feed-forward; each has its own adaLN modulation. The LCG hands
every block's normed tokens (the bank) to the denoiser, whose own k and v projections turn them into extra
keys and values, once per clip.
Source: arXiv:2408.06072; arXiv:2507.20158 eq. 4; AnimeColor cogvideox/models/{transformer3d,ref,modules}.py.

Axes: B batch, T latent frames, H W height and width, C channels; S video, L text, R reference tokens;
D model width; N heads (H head size inside attention).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from animecolor_jax.models import positions
from animecolor_jax.models.attention import joint_attention
from animecolor_jax.models.layers import (
    BRANCH,
    PRODUCT,
    gelu,
    layer_norm,
    linear,
    remat,
    silu,
    stack,
    unstack,
)
from animecolor_jax.sharding import constrain, shares_tokens


class KeyValue(NamedTuple):
    """Keys and values of attention, each [..., B, tokens, N, H]."""

    k: jax.Array
    v: jax.Array


class PatchEmbed(nnx.Module):
    """Patches of each frame -> tokens, ordered (frame, row, column). Odd sizes lose their last row or
    column."""

    def __init__(self, config, *, rngs):
        self.config = config
        patch = config.patch_size
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (patch, patch, config.in_channels, config.dim)))
        self.bias = nnx.Param(jnp.zeros(config.dim))

    def __call__(self, latents):  # [B, T, H, W, C] -> [B, S, D]
        patch, dtype = self.config.patch_size, self.config.dtype
        height, width = (size // patch * patch for size in latents.shape[2:4])
        patches = rearrange(
            latents[:, :, :height, :width].astype(dtype),
            "b t (h p) (w q) c -> b (t h w) (p q c)",
            p=patch,
            q=patch,
        )
        kernel = self.kernel[...].astype(dtype)
        return patches @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(dtype)


class TimeEmbedding(nnx.Module):
    """Timestep -> temb: sinusoid, linear, SiLU, linear. In float32: it is tiny, and modulates everything."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.up = linear(config.dim, config.time_embed_dim, dtype="float32", rngs=rngs)
        self.out = linear(config.time_embed_dim, config.time_embed_dim, dtype="float32", rngs=rngs)

    def __call__(self, timestep):  # [B] -> [B, time_embed_dim]
        table = timestep_embedding(timestep, self.config.dim)
        return self.out(silu(self.up(table))).astype(self.config.dtype)


def timestep_embedding(timestep, dim):
    """[B] -> [B, dim] float32: cosines of all frequencies, then sines.

    Frequencies are rounded as the reference rounds them: at timestep 999 one unit in the last place of a
    frequency is 6e-5 of the angle.
    """
    half = dim // 2
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x, rope):
    """Applies rotary positions to [B, S, N, H] in float32; pairs of channels are neighbours."""
    cos, sin = (jnp.asarray(table)[None, :, None] for table in rope)
    x32 = x.astype(jnp.float32)
    pairs = x32.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x32 * cos + turned * sin).astype(x.dtype)


def of_both(function, text, video):
    """A function of tokens, any tree of [B, S, ...], for text and for video.

    It is called once, of all tokens. Where the mesh shares them out, it is called for each: joined, most
    tokens would have to move to another device.
    """
    if shares_tokens():
        return function(text), function(video)
    leaves, structure = jax.tree.flatten(function(jnp.concatenate([text, video], axis=1)))
    halves = zip(*(jnp.split(leaf, [text.shape[1]], axis=1) for leaf in leaves), strict=True)
    return tuple(map(structure.unflatten, halves))


class JointAttention(nnx.Module):
    """Attention over text, bank and video tokens; q and k are normalised per head."""

    def __init__(self, config, *, rngs):
        self.config = config
        dim, bias = config.dim, config.attention_bias
        adapter = {"rank": config.lora_rank, "alpha": config.lora_alpha}
        self.q = linear(dim, dim, bias=bias, dtype=config.dtype, rngs=rngs, **adapter)
        self.k = linear(dim, dim, bias=bias, dtype=config.dtype, rngs=rngs, **adapter)
        self.v = linear(dim, dim, bias=bias, dtype=config.dtype, rngs=rngs, **adapter)
        self.out = linear(dim, dim, dtype=config.dtype, rngs=rngs, **adapter)
        self.q_norm = layer_norm(config.head_dim, eps=1e-6, dtype=config.dtype, rngs=rngs)
        self.k_norm = layer_norm(config.head_dim, eps=1e-6, dtype=config.dtype, rngs=rngs)

    def heads(self, x):  # [B, S, D] -> [B, S, N, H]
        return rearrange(checkpoint_name(x, PRODUCT), "b s (n h) -> b s n h", n=self.config.num_heads)

    def key_value(self, tokens):
        """[B, R, D] -> keys and values [B, R, N, H], without positions."""
        return KeyValue(self.k_norm(self.heads(self.k(tokens))), self.heads(self.v(tokens)))

    def project(self, tokens):
        """[B, S, D] -> queries [B, S, N, H], and their `KeyValue`."""
        return self.q_norm(self.heads(self.q(tokens))), self.key_value(tokens)

    def merge(self, attended):  # [B, S, N, H] -> [B, S, D]
        return checkpoint_name(self.out(rearrange(attended, "b s n h -> b s (n h)")), BRANCH)

    def __call__(self, text, video, bank, rope):
        """[B, L, D], [B, S, D], KeyValue [B, R, N, H] or None -> attended ([B, L, D], [B, S, D])."""
        (text_q, text_kv), (q, kv) = of_both(self.project, text, video)
        if rope is not None:  # video tokens only
            q, kv = rotate(q, rope), kv._replace(k=rotate(kv.k, rope))
        sources = [text_kv, kv]
        if bank is not None:
            # both guidance branches, and every clip of the batch, may share one bank
            bank = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(q), *x.shape[1:])), bank)
            sources = [bank, *sources]
        keys, values = zip(*sources, strict=True)
        attended = joint_attention([text_q, q], list(keys), list(values), self.config.attention)
        return of_both(self.merge, *attended)


class Modulation(nnx.Module):
    """One LayerNorm for text and video, with a shift, scale and gate for each."""

    def __init__(self, config, *, rngs):
        self.linear = linear(config.time_embed_dim, 6 * config.dim, dtype=config.dtype, rngs=rngs)
        self.norm = layer_norm(config.dim, eps=config.norm_eps, dtype=config.dtype, rngs=rngs)

    def __call__(self, text, video, temb):
        """Returns modulated text and video, and their gates [B, 1, D]."""
        parts = jnp.split(self.linear(silu(temb))[:, None], 6, axis=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        text = self.norm(text) * (1 + text_scale) + text_shift
        video = self.norm(video) * (1 + scale) + shift
        return text, video, text_gate, gate


class FeedForward(nnx.Module):
    """Linear, tanh GELU, linear."""

    def __init__(self, config, *, rngs):
        self.up = linear(config.dim, 4 * config.dim, dtype=config.dtype, rngs=rngs)
        self.down = linear(4 * config.dim, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, x):
        hidden = checkpoint_name(self.up(x), PRODUCT)
        return checkpoint_name(self.down(gelu(hidden, approximate=True)), BRANCH)


class Block(nnx.Module):
    """One transformer block."""

    def __init__(self, config, *, rngs):
        self.norm1 = Modulation(config, rngs=rngs)
        self.attn = JointAttention(config, rngs=rngs)
        self.norm2 = Modulation(config, rngs=rngs)
        self.ff = FeedForward(config, rngs=rngs)

    def __call__(self, text, video, temb, bank=None, rope=None):
        """[B, L, D], [B, S, D], [B, time_embed_dim] -> text, video, the normed video tokens (the bank)."""
        normed_text, normed, text_gate, gate = self.norm1(text, video, temb)
        attended_text, attended = self.attn(normed_text, normed, bank, rope)
        text, video = text + text_gate * attended_text, video + gate * attended

        ff_text, ff_video, text_gate, gate = self.norm2(text, video, temb)
        ff_text, ff_video = of_both(self.ff, ff_text, ff_video)
        return text + text_gate * ff_text, video + gate * ff_video, normed


class Transformer(nnx.Module):
    """Denoiser or LCG. Blocks are stacked: every block parameter has a leading [depth] axis."""

    def __init__(self, config, *, rngs):
        self.config = config
        patch = config.patch_size
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.text_embed = linear(config.text_dim, config.dim, dtype=config.dtype, rngs=rngs)
        self.time_embed = TimeEmbedding(config, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm_final = layer_norm(config.dim, eps=config.norm_eps, dtype=config.dtype, rngs=rngs)
        self.norm_out = layer_norm(config.dim, eps=config.norm_eps, dtype=config.dtype, rngs=rngs)
        self.modulation_out = linear(config.time_embed_dim, 2 * config.dim, dtype=config.dtype, rngs=rngs)
        self.out = linear(config.dim, patch * patch * config.out_channels, dtype=config.dtype, rngs=rngs)

    def patchify(self, latents, text):
        """[B, T, H, W, C], [B, L, text_dim] -> text [B, L, D], video [B, S, D], before positions."""
        return self.text_embed(text.astype(self.config.dtype)), self.patch_embed(latents)

    def add_positions(self, text, video, size):
        """Adds the sincos table resized to `size` = (T, H, W) in latents; text is left alone.

        Raises:
            ValueError: more latent frames than the table holds, or another text length.
        """
        config, (frames, height, width) = self.config, size
        if config.rope:
            return text, video
        if frames > config.max_latent_frames:
            raise ValueError(
                f"{frames} latent frames, but the position table holds {config.max_latent_frames} "
                f"({config.sample_frames} frames): use windows"
            )
        if text.shape[1] != config.text_length:
            raise ValueError(f"{text.shape[1]} text tokens, expected {config.text_length}")
        patch = config.patch_size
        table = (config.sample_height // patch, config.sample_width // patch)
        time, rows, columns = positions.sincos_axes(
            config.dim,
            frames,
            *table,
            config.spatial_interpolation_scale,
            config.temporal_interpolation_scale,
        )
        rows = positions.resize_matrix(table[0], height // patch) @ rows.astype(np.float32)
        columns = positions.resize_matrix(table[1], width // patch) @ columns.astype(np.float32)
        # added part by part: the whole table is never a constant of the compiled program
        video = video.reshape(len(video), frames, height // patch, width // patch, -1)
        first, second = time.shape[1], time.shape[1] + columns.shape[1]
        time, rows, columns = (jnp.asarray(x, video.dtype) for x in (time, rows, columns))
        video = jnp.concatenate(
            [
                video[..., :first] + time[:, None, None],
                video[..., first:second] + columns,
                video[..., second:] + rows[:, None],
            ],
            axis=-1,
        )
        return text, video.reshape(len(video), -1, video.shape[-1])

    def embed(self, latents, text):
        """Tokens of block 0: text [B, L, D] and video [B, S, D], positions added."""
        return self.add_positions(*self.patchify(latents, text), latents.shape[1:4])

    def head(self, video, temb, size):
        """[B, S, D] -> [B, T, H, W, out_channels]; `size` = (T, H, W) in latents."""
        frames, height, width = size
        patch = self.config.patch_size
        shift, scale = jnp.split(self.modulation_out(silu(temb))[:, None], 2, axis=-1)
        video = self.norm_out(self.norm_final(video)) * (1 + scale) + shift
        return rearrange(
            self.out(video),
            "b (t h w) (c p q) -> b t (h p) (w q) c",
            t=frames,
            h=height // patch,
            w=width // patch,
            p=patch,
            q=patch,
        )

    def write_bank(self, latents, text_length):
        """LCG: every block's normed tokens of the reference.

        Called with timestep 0, zero text and no rotary positions, as the reference does.

        Args:
            latents: [B, T, H, W, C] reference latents, one frame each.

        Returns:
            [depth, B, R, D]. Source: cogvideox/models/ref.py, mode "write".
        """
        text = jnp.zeros((len(latents), text_length, self.config.text_dim), self.config.dtype)
        temb = self.time_embed(jnp.zeros(len(latents), jnp.int32))

        def body(tokens, block):
            text, video = (constrain(x, "context") for x in tokens)
            text, video, normed = block(text, video, temb)
            return (text, video), normed

        body = remat(body, self.config.remat)
        return jax.lax.scan(body, self.embed(latents, text), self.blocks)[1]

    def project_bank(self, bank):
        """Bank [depth, B, R, D] -> this denoiser's keys and values of it, [depth, B, R, N, H]."""
        return jax.lax.scan(lambda _, xs: (None, xs[0].attn.key_value(xs[1])), None, (self.blocks, bank))[1]

    def __call__(self, latents, text, timestep, *, bank=None, cross=None, rope=None):
        """Predicts v.

        Args:
            latents: [B, T, H, W, in_channels] noisy latents, then the sketch's, on the channel axis.
            text: [B, L, text_dim].
            timestep: [B].
            bank: KeyValue [depth, 1 or B, R, N, H] from `project_bank`; or [depth, B, R, D] from
                `write_bank`, which every block projects itself, for training, where nothing is reused; or
                None.
            cross: a `hce.CrossConditions`, or None.
            rope: (cos, sin) [S, head size] for the rotary variant, else None.

        Returns:
            [B, T, H, W, out_channels].
        """
        return self.with_residual(latents, text, timestep, bank=bank, cross=cross, rope=rope)[0]

    def with_residual(self, latents, text, timestep, *, bank=None, cross=None, rope=None):
        """As `__call__`, and what all blocks together add to the video tokens, [B, S, D]."""
        temb = self.time_embed(timestep)

        def body(tokens, xs):
            index, block, bank = xs
            text, video = (constrain(x, "context") for x in tokens)
            bank = block.attn.key_value(bank) if isinstance(bank, jax.Array) else bank
            text, video, _ = block(text, video, temb, bank, rope)
            if cross is not None:
                video = jax.lax.cond(index % cross.interval == 0, add_cross, lambda x, _: x, video, index)
            return (text, video), None

        def add_cross(video, index):
            layer = unstack((cross.layers, cross.key_value), index // cross.interval)
            return cross.add(video, *layer)

        body = remat(body, self.config.remat)
        xs = jnp.arange(self.config.num_layers), self.blocks, bank
        text, before = self.embed(latents, text)
        (_, video), _ = jax.lax.scan(body, (text, before), xs)
        return self.head(video, temb, latents.shape[1:4]), video - before

    def from_residual(self, latents, text, timestep, residual):
        """v as `__call__` would predict it if its blocks added `residual`, of another call's
        `with_residual`."""
        _, video = self.embed(latents, text)
        return self.head(video + residual, self.time_embed(timestep), latents.shape[1:4])
