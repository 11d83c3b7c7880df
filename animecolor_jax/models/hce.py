"""High-level Color Extractor: RADIO features -> colour tokens -> cross-attention in the denoiser.

Source: AnimeColor (arXiv:2507.20158) eq. 1-3; cogvideox/models/radio_extractor.py, where the Q-Former with
its MLPs is `LocalFacialExtractor` and a cross-attention `PerceiverCrossAttention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from animecolor_jax.models.attention import attention
from animecolor_jax.models.layers import gelu, layer_norm, linear, stack
from animecolor_jax.models.transformer import KeyValue

NORM_EPS = 1e-5  # torch's default, which the reference uses throughout


class SummaryMLP(nnx.Module):
    """Summary [B, summary_dim] -> one more spatial feature [B, feature_dim]."""

    def __init__(self, config, *, rngs):
        self.up = linear(config.summary_dim, config.dim, dtype=config.dtype, rngs=rngs)
        self.norm = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.out = linear(config.dim, config.feature_dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, summary):
        return self.out(nnx.leaky_relu(self.norm(self.up(summary)), 0.01))


class SpatialMLP(nnx.Module):
    """Features [B, N, feature_dim] -> [B, N, dim]."""

    def __init__(self, config, *, rngs):
        self.up = linear(config.feature_dim, config.dim, dtype=config.dtype, rngs=rngs)
        self.norm1 = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.mid = linear(config.dim, config.dim, dtype=config.dtype, rngs=rngs)
        self.norm2 = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.out = linear(config.dim, config.dim, dtype=config.dtype, rngs=rngs)

    def __call__(self, features):
        hidden = nnx.leaky_relu(self.norm1(self.up(features)), 0.01)
        return self.out(nnx.leaky_relu(self.norm2(self.mid(hidden)), 0.01))


class QFormerAttention(nnx.Module):
    """Attention of all tokens to all tokens, seen through two norms: twice as many keys as queries."""

    def __init__(self, config, *, rngs):
        self.config = config
        inner = config.num_heads * config.head_dim
        self.norm1 = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.norm2 = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.q = linear(config.dim, inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.kv = linear(config.dim, 2 * inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.out = linear(inner, config.dim, bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens):  # [B, Q + 1 + N, dim]
        queries = self.norm2(tokens)
        context = jnp.concatenate([self.norm1(tokens), queries], axis=1)
        q = rearrange(self.q(queries), "b q (n h) -> b q n h", n=self.config.num_heads)
        k, v = rearrange(self.kv(context), "b k (two n h) -> two b k n h", two=2, n=self.config.num_heads)
        return self.out(rearrange(attention(q, k, v), "b q n h -> b q (n h)"))


class QFormerFeedForward(nnx.Module):
    """LayerNorm, linear, exact GELU, linear."""

    def __init__(self, config, *, rngs):
        hidden = config.ff_mult * config.dim
        self.norm = layer_norm(config.dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.up = linear(config.dim, hidden, bias=False, dtype=config.dtype, rngs=rngs)
        self.down = linear(hidden, config.dim, bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(gelu(self.up(self.norm(x)), approximate=False))


class QFormerLayer(nnx.Module):
    """Attention and feed-forward; residuals are added by the caller, who may look at both."""

    def __init__(self, config, *, rngs):
        self.attn = QFormerAttention(config, rngs=rngs)
        self.ff = QFormerFeedForward(config, rngs=rngs)

    def __call__(self, tokens):
        tokens = tokens + self.attn(tokens)
        return tokens + self.ff(tokens)


class QFormer(nnx.Module):
    """RADIO summary and features -> colour tokens."""

    def __init__(self, config, *, rngs):
        self.config = config
        init = nnx.initializers.normal(config.dim**-0.5)
        self.latents = nnx.Param(init(rngs.params(), (config.num_tokens, config.dim)))
        self.proj_out = nnx.Param(init(rngs.params(), (config.dim, config.output_dim)))
        self.summary_mlp = SummaryMLP(config, rngs=rngs)
        self.spatial_mlp = SpatialMLP(config, rngs=rngs)
        self.layers = stack(lambda rngs: QFormerLayer(config, rngs=rngs), config.depth, rngs=rngs)

    def join(self, summary, features):
        """[B, summary_dim], [B, N, feature_dim] -> spatial tokens [B, 1 + N, dim], the summary first."""
        dtype = self.config.dtype
        summary = self.summary_mlp(summary.astype(dtype))[:, None]
        return self.spatial_mlp(jnp.concatenate([summary, features.astype(dtype)], axis=1))

    def prepend_latents(self, spatial):
        """[B, 1 + N, dim] -> [B, Q + 1 + N, dim]."""
        latents = self.latents[...].astype(spatial.dtype)
        return jnp.concatenate([jnp.broadcast_to(latents, (len(spatial), *latents.shape)), spatial], axis=1)

    def project(self, tokens):
        """[B, Q + 1 + N, dim] -> colour tokens [B, Q, output_dim]."""
        return tokens[:, : self.config.num_tokens] @ self.proj_out[...].astype(tokens.dtype)

    def __call__(self, summary, features):
        """[B, summary_dim], [B, N, feature_dim] -> [B, Q, output_dim]."""
        tokens = self.prepend_latents(self.join(summary, features))
        tokens, _ = jax.lax.scan(lambda x, layer: (layer(x), None), tokens, self.layers)
        return self.project(tokens)


class CrossAttention(nnx.Module):
    """From video tokens to colour tokens."""

    def __init__(self, config, *, rngs):
        self.config = config
        inner = config.cross_num_heads * config.cross_head_dim
        self.norm1 = layer_norm(config.output_dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.norm2 = layer_norm(config.model_dim, eps=NORM_EPS, dtype=config.dtype, rngs=rngs)
        self.q = linear(config.model_dim, inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.kv = linear(config.output_dim, 2 * inner, bias=False, dtype=config.dtype, rngs=rngs)
        self.out = linear(inner, config.model_dim, bias=False, dtype=config.dtype, rngs=rngs)

    def key_value(self, tokens):
        """[B, Q, output_dim] -> keys and values [B, Q, N, H]."""
        kv = self.kv(self.norm1(tokens))
        return KeyValue(*rearrange(kv, "b q (two n h) -> two b q n h", two=2, n=self.config.cross_num_heads))

    def __call__(self, video, key_value):
        """[B, S, D], KeyValue [1 or B, Q, N, H] -> what is added to the video tokens, [B, S, D]."""
        q = rearrange(self.q(self.norm2(video)), "b s (n h) -> b s n h", n=self.config.cross_num_heads)
        k, v = (jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in key_value)
        return self.out(rearrange(attention(q, k, v), "b s n h -> b s (n h)"))


class CrossConditions(NamedTuple):
    """What the denoiser needs of HCE in every step; keys and values were made once per clip."""

    layers: CrossAttention  # stacked [num_cross]
    key_value: KeyValue  # [num_cross, 1 or B, Q, N, H]

    @property
    def interval(self):
        """A cross-attention follows every `interval`-th block, the first included."""
        return self.layers.config.interval

    def add(self, video, layer, key_value):
        """[B, S, D] -> [B, S, D]."""
        return video + self.layers.config.scale * layer(video, key_value)


class HCE(nnx.Module):
    """Q-Former and the stacked cross-attentions."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.qformer = QFormer(config, rngs=rngs)
        self.cross_attn = stack(lambda rngs: CrossAttention(config, rngs=rngs), config.num_cross, rngs=rngs)

    def key_value(self, tokens):
        """Colour tokens [B, Q, output_dim] -> KeyValue [num_cross, B, Q, N, H]."""
        return jax.lax.map(lambda layer: layer.key_value(tokens), self.cross_attn)
