"""RADIO: the vision transformer whose summary and features describe the reference image.

Source: AM-RADIO (arXiv:2312.06709); NVlabs/RADIO radio/radio_model.py, vit_patch_generator.py and
input_conditioner.py, timm's VisionTransformer. Letters: E embedding width, N patches, K summary tokens.

Matrix products and attention take the compute dtype (`nnx.Linear` casts its input); everything between them,
the residual stream included, is float32. In bfloat16 that leaves about a fifth less error than the reference
has, which rounds after every operation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from animecolor_jax.models.attention import attention
from animecolor_jax.models.layers import Buffer, layer_norm, promote, stack

MLP_NORM_EPS = 1e-5  # torch's default, unlike the blocks' own norms
# input statistics of a fresh model: OpenAI CLIP's, as in the reference; a checkpoint brings its own
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _linear(in_dim, out_dim, config, *, rngs, bias=True):
    """Linear layer from the compute dtype to float32."""
    return nnx.Linear(
        in_dim, out_dim, use_bias=bias, dtype=jnp.dtype(config.dtype), preferred_element_type=jnp.float32,
        promote_dtype=promote, rngs=rngs,
    )


class InputConditioner(nnx.Module):
    """Pixels [B, H, W, 3] in [0, 1] -> normalised pixels, in float32."""

    def __init__(self):
        self.mean = Buffer(jnp.array(CLIP_MEAN))
        self.std = Buffer(jnp.array(CLIP_STD))

    def __call__(self, pixels):
        mean, std = (x[...].astype(jnp.float32) for x in (self.mean, self.std))
        return (pixels.astype(jnp.float32) - mean) / std


class Attention(nnx.Module):
    """Self-attention of all tokens, with one fused query, key and value projection."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.qkv = _linear(config.embed_dim, 3 * config.embed_dim, config, rngs=rngs)
        self.out = _linear(config.embed_dim, config.embed_dim, config, rngs=rngs)

    def __call__(self, x):
        qkv = self.qkv(x).astype(self.config.dtype)
        q, k, v = rearrange(qkv, "b s (three n h) -> three b s n h", three=3, n=self.config.num_heads)
        return self.out(rearrange(attention(q, k, v), "b s n h -> b s (n h)"))


class MLP(nnx.Module):
    """Linear, exact GELU, in one variant LayerNorm, linear."""

    def __init__(self, config, *, rngs):
        hidden = round(config.embed_dim * config.mlp_ratio)
        self.up = _linear(config.embed_dim, hidden, config, rngs=rngs)
        self.norm = (
            layer_norm(hidden, eps=MLP_NORM_EPS, dtype="float32", rngs=rngs) if config.mlp_norm else None
        )
        self.down = _linear(hidden, config.embed_dim, config, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.up(x), approximate=False)
        return self.down(x if self.norm is None else self.norm(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config, *, rngs):
        self.norm1 = layer_norm(config.embed_dim, eps=config.norm_eps, dtype="float32", rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layer_norm(config.embed_dim, eps=config.norm_eps, dtype="float32", rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x):
        """[B, S, E] -> [B, S, E], float32."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _resize_axis(table, axis, size, count, align_corners):
    """The first `count` of `size` samples of a linear resize along one axis.

    Source: torch.nn.functional.interpolate, mode="bilinear", which finds its sample points in float32.
    """
    last = table.shape[axis] - 1
    index = np.arange(count, dtype=np.float32)
    half = np.float32(0.5)
    if align_corners:
        points = index * (np.float32(last) / np.float32(max(size - 1, 1)))
    else:
        points = np.maximum((index + half) * (np.float32(last + 1) / np.float32(size)) - half, 0)
    lower = np.minimum(points.astype(np.int32), last)
    weight = np.expand_dims(points - lower, tuple(i for i in range(table.ndim) if i != axis))
    upper = np.minimum(lower + 1, last)
    return jnp.take(table, lower, axis) * (1 - weight) + jnp.take(table, upper, axis) * weight


class Radio(nnx.Module):
    """Image -> summary and spatial features. There is no final norm."""

    def __init__(self, config, *, rngs):
        self.config = config
        init = nnx.initializers.normal(config.embed_dim**-0.5)
        self.input_conditioner = InputConditioner()
        self.patch_embed = _linear(
            3 * config.patch_size**2, config.embed_dim, config, bias=False, rngs=rngs
        )
        self.position_table = nnx.Param(init(rngs.params(), (config.table_size**2, config.embed_dim)))
        self.prefix_tokens = nnx.Param(init(rngs.params(), (config.num_prefix_tokens, config.embed_dim)))
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.depth, rngs=rngs)
        self.summary_indices = Buffer(jnp.arange(config.num_summary_tokens, dtype=jnp.int32))

    def _grid(self, height, width):
        patch = self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"image is {height}x{width}, expected positive multiples of {patch}")
        return height // patch, width // patch

    def position_embedding(self, height, width):
        """Cropped position embedding of an image of that size in pixels, [1, N, E] float32.

        The square table is resized to the longer side of the patch grid and cropped at the top left.

        Raises:
            ValueError: a side is not a multiple of `patch_size`.
        """
        rows, columns = self._grid(height, width)
        table = self.position_table[...].astype(jnp.float32)
        table = rearrange(table, "(h w) e -> h w e", w=self.config.table_size)
        for axis, count in enumerate((rows, columns)):
            table = _resize_axis(table, axis, max(rows, columns), count, self.config.align_corners)
        return rearrange(table, "h w e -> 1 (h w) e")

    def __call__(self, pixels):
        """Encodes images.

        Args:
            pixels: [B, H, W, 3] in [0, 1].

        Returns:
            summary [B, K * E] and features [B, N, E], patches in row order, in the compute dtype.

        Raises:
            ValueError: H or W is not a multiple of `patch_size`.
        """
        batch, height, width, _ = pixels.shape
        rows, columns = self._grid(height, width)
        pixels = self.input_conditioner(pixels)
        patches = rearrange(pixels, "b (h p) (w q) c -> b (h w) (c p q)", h=rows, w=columns)
        patches = self.patch_embed(patches) + self.position_embedding(height, width)  # [B, N, E] float32
        prefix = self.prefix_tokens[...].astype(jnp.float32)
        prefix = jnp.broadcast_to(prefix, (batch, *prefix.shape))
        tokens = jnp.concatenate([prefix, patches], axis=1)
        tokens, _ = jax.lax.scan(lambda x, block: (block(x), None), tokens, self.blocks)
        tokens = tokens.astype(self.config.dtype)
        summary = jnp.take(tokens, self.summary_indices[...], axis=1)  # [B, K, E]
        return rearrange(summary, "b k e -> b (k e)"), tokens[:, self.config.num_prefix_tokens :]
