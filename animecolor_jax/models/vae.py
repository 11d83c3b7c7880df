"""The causal 3D autoencoder of CogVideoX: a video and its latents, 8 x 8 x 4 times smaller.

Time passes through the network in chunks. A convolution sees what came before through its cache, the last
two frames of its input so far; GroupNorm sees one chunk alone, which is why the chunk lengths belong to the
model. Caches are values: a nested dict by the convolution's name, None before the first chunk.
Source: arXiv:2408.06072 section 2.1; AnimeColor cogvideox/models/autoencoder_magvit.py, diffusers
models/{downsampling,upsampling}.py.

Axes: B batch, T frames, H W height and width, C channels, of videos, latents and all between; t h w those
of latents where both meet; I O channels of a convolution's input and output.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from animecolor_jax.errors import InputError
from animecolor_jax.models.convolution import conv2d
from animecolor_jax.sharding import share_rows

NORM_EPS = 1e-6  # of every norm but those of the encoder's blocks, whatever the config says


class Conv(nnx.Module):
    """The parameters of a convolution, and the dtype it computes in."""

    def __init__(self, kernel_size, in_channels, out_channels, *, dtype, rngs):
        self.dtype = dtype
        create = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(create(rngs.params(), (*kernel_size, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))


class CausalConv(Conv):
    """3x3x3 convolution over a frame and the two before it."""

    def __init__(self, in_channels, out_channels, *, dtype, rngs):
        super().__init__((3, 3, 3), in_channels, out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache, norm=None):
        """[B, T, H, W, I] and the cache -> [B, T, H, W, O] and the next cache.

        Args:
            cache: a pair of frames [B, H, W, I]; without one, the first frame is its own past.
            norm: a `FrameNorm`, through which and SiLU the frames go before they are convolved, or None.
        """
        kernel = rearrange(self.kernel[...], "t h w i o -> h w (t i) o").astype(self.dtype)
        bias = self.bias[...].astype(self.dtype)

        def prepare(frame, given):
            return (frame if norm is None else nnx.silu(norm.apply(frame, given))).astype(self.dtype)

        def convolve(past, xs):  # frame by frame: a whole chunk in float32 would take gigabytes
            frame = prepare(*xs)
            return (past[1], frame), conv2d(jnp.concatenate([*past, frame], axis=-1), kernel) + bias

        frames = x.swapaxes(0, 1), None if norm is None else norm.given
        if cache is None:
            first = prepare(*jax.tree.map(lambda each: each[0], frames))
            cache = first, first
        cache, out = jax.lax.scan(convolve, cache, frames)
        return rearrange(out, "t b h w c -> b t h w c"), cache


class FrameConv(Conv):
    """3x3 convolution of every frame by itself; `padding` is (low, high) of height and of width."""

    def __init__(self, channels, *, padding, stride=1, enlarge=1, dtype, rngs):
        super().__init__((3, 3), channels, channels, dtype=dtype, rngs=rngs)
        self.padding, self.stride, self.enlarge = padding, stride, enlarge

    def __call__(self, x):
        """[B, T, H, W, C], every pixel `enlarge` times in both directions -> [B, T, H', W', C]."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)

        def convolve(frame):
            for axis in (1, 2):
                frame = jnp.repeat(frame, self.enlarge, axis)
            return conv2d(frame.astype(self.dtype), kernel, self.padding, self.stride) + bias

        return jax.lax.map(convolve, x.swapaxes(0, 1)).swapaxes(0, 1)


class PointwiseConv(Conv):
    """1x1x1 convolution."""

    def __init__(self, in_channels, out_channels, *, dtype, rngs):
        super().__init__((1, 1, 1), in_channels, out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x):  # [B, T, H, W, I] -> [B, T, H, W, O]
        kernel, bias = self.kernel[0, 0, 0].astype(self.dtype), self.bias[...].astype(self.dtype)
        return x.astype(self.dtype) @ kernel + bias


class FrameNorm(NamedTuple):
    """A norm that knows its chunk, to be applied frame by frame.

    Attributes:
        apply: function of a frame [B, H, W, C] and of its own part of `given` -> the same in float32.
        given: tree of [T, ...], or None.
    """

    apply: Callable
    given: Any = None


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all of a chunk, in float32."""

    def __init__(self, channels, *, groups, eps, rngs):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):  # [B, T, H, W, C] -> FrameNorm
        mean = self.group_mean(x.astype(jnp.float32))
        variance = self.group_mean(jnp.square(x.astype(jnp.float32) - mean))
        mean, factor = mean[:, 0], jax.lax.rsqrt(variance[:, 0] + self.eps) * self.scale[...]
        return FrameNorm(lambda frame, _: (frame.astype(jnp.float32) - mean) * factor + self.bias[...])

    def group_mean(self, x):  # [B, T, H, W, C] -> [B, 1, 1, 1, C]
        # channel by channel first: reducing neighbouring channels together does not vectorise on a CPU
        means = rearrange(x.mean((1, 2, 3)), "b (g c) -> b g c", g=self.groups).mean(-1)
        return jnp.repeat(means, x.shape[-1] // self.groups, axis=-1)[:, None, None, None]


class SpatialNorm(nnx.Module):
    """GroupNorm, then a scale and a shift that the chunk's latents give every position."""

    def __init__(self, channels, *, config, rngs):
        self.norm = GroupNorm(channels, groups=config.norm_num_groups, eps=NORM_EPS, rngs=rngs)
        self.conv_y = PointwiseConv(config.latent_channels, channels, dtype=config.dtype, rngs=rngs)
        self.conv_b = PointwiseConv(config.latent_channels, channels, dtype=config.dtype, rngs=rngs)

    def __call__(self, x, latents):  # [B, T, H, W, C], [B, t, h, w, Z] -> FrameNorm
        # The reference resizes the latents to x's size (nearest neighbour), then convolves. A 1x1x1
        # convolution commutes with that: it runs on the small latents, and broadcasting resizes space.
        frames = nearest_frames(latents.shape[1], x.shape[1])
        scale_shift = tuple(
            rearrange(conv(latents)[:, frames].astype(jnp.float32), "b t h w c -> t b h 1 w 1 c")
            for conv in (self.conv_y, self.conv_b)
        )
        _, _, h, w, _ = latents.shape
        norm = self.norm(x)

        def apply(frame, given):
            scale, shift = given
            out = rearrange(norm.apply(frame, None), "b (h p) (w q) c -> b h p w q c", h=h, w=w)
            return (out * scale + shift).reshape(frame.shape)

        return FrameNorm(apply, scale_shift)


def nearest_frames(source, target):
    """Which of `source` frames each of `target` takes; of an odd number the first frame goes to the first."""
    if target > 1 and target % 2:
        return np.concatenate([[0], 1 + np.arange(target - 1) * (source - 1) // (target - 1)])
    return np.arange(target) * source // target


class ResnetBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice, around a shortcut. `norm`: function of the channels."""

    def __init__(self, in_channels, out_channels, norm, *, dtype, rngs):
        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1 = CausalConv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.conv2 = CausalConv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        shortcut = partial(PointwiseConv, in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.conv_shortcut = shortcut() if in_channels != out_channels else None

    def __call__(self, x, cache, *latents):
        """[B, T, H, W, I], cache, and in the decoder latents for the norms -> [B, T, H, W, O], cache."""
        old, new = cache or {}, {}
        h, new["conv1"] = self.conv1(x, old.get("conv1"), self.norm1(x, *latents))
        h, new["conv2"] = self.conv2(h, old.get("conv2"), self.norm2(h, *latents))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x)), new


class Level(nnx.Module):
    """`depth` resnet blocks of one resolution."""

    def __init__(self, in_channels, out_channels, depth, norm, *, dtype, rngs):
        self.depth = depth
        for i in range(depth):
            channels = in_channels if i == 0 else out_channels
            setattr(self, f"resnet_{i}", ResnetBlock(channels, out_channels, norm, dtype=dtype, rngs=rngs))

    def __call__(self, x, cache, *latents):  # as ResnetBlock
        old, new = cache or {}, {}
        x = share_rows(x, (latents[0] if latents else x).shape[2])
        for name in (f"resnet_{i}" for i in range(self.depth)):
            x, new[name] = getattr(self, name)(x, old.get(name), *latents)
        return x, new


class DownLevel(Level):
    """A level of the encoder, after which height and width, and perhaps time, are halved."""

    def __init__(self, in_channels, out_channels, norm, *, index, config, rngs):
        depth = config.layers_per_block
        super().__init__(in_channels, out_channels, depth, norm, dtype=config.dtype, rngs=rngs)
        self.compress_time = compresses_time(index, config)
        conv = partial(FrameConv, out_channels, padding=(0, 1), stride=2, dtype=config.dtype, rngs=rngs)
        self.downsample = conv() if index < len(config.block_out_channels) - 1 else None

    def __call__(self, x, cache):
        x, cache = super().__call__(x, cache)
        if self.downsample is None:
            return x, cache
        return self.downsample(halve_time(x) if self.compress_time else x), cache


class UpLevel(Level):
    """A level of the decoder, after which height and width, and perhaps time, are doubled."""

    def __init__(self, in_channels, out_channels, norm, *, index, config, rngs):
        depth = config.layers_per_block + 1
        super().__init__(in_channels, out_channels, depth, norm, dtype=config.dtype, rngs=rngs)
        self.compress_time = compresses_time(index, config)
        conv = partial(
            FrameConv, out_channels, padding=(1, 1), enlarge=2, dtype=config.dtype, rngs=rngs
        )
        self.upsample = conv() if index < len(config.block_out_channels) - 1 else None

    def __call__(self, x, cache, latents):
        x, cache = super().__call__(x, cache, latents)
        if self.upsample is None:
            return x, cache
        x = self.upsample(x)
        # the reference repeats frames first; the convolution, which sees one at a time, then works twice
        return double_time(x) if self.compress_time else x, cache


def compresses_time(index, config):
    """Whether the resampling after level number `index` includes time."""
    return 2 ** (index + 1) <= config.temporal_compression


def halve_time(x):
    """Averages pairs of frames [B, T, H, W, C]; of an odd number the first stays as it is."""
    alone = x.shape[1] % 2
    pairs = rearrange(x[:, alone:], "b (t p) h w c -> b t p h w c", p=2)
    return jnp.concatenate([x[:, :alone], pairs.mean(2)], axis=1)


def double_time(x):
    """Repeats every frame of [B, T, H, W, C]; of an odd number the first stays single."""
    alone = x.shape[1] % 2
    return jnp.concatenate([x[:, :alone], jnp.repeat(x[:, alone:], 2, axis=1)], axis=1)


class Encoder(nnx.Module):
    """Chunk of video -> moments of its latents."""

    def __init__(self, config, *, rngs):
        self.config = config
        widths, dtype = config.block_out_channels, config.dtype
        norm = partial(GroupNorm, groups=config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
        self.conv_in = CausalConv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        for i, width in enumerate(widths):
            level = DownLevel(widths[max(i - 1, 0)], width, norm, index=i, config=config, rngs=rngs)
            setattr(self, f"down_{i}", level)
        self.mid = Level(widths[-1], widths[-1], 2, norm, dtype=dtype, rngs=rngs)
        self.norm_out = norm(widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):  # [B, T, H, W, 3] -> [B, t, h, w, 2 latent_channels]
        old, new = cache or {}, {}
        x, new["conv_in"] = self.conv_in(x, old.get("conv_in"))
        for name in (f"down_{i}" for i in range(len(self.config.block_out_channels))):
            x, new[name] = getattr(self, name)(x, old.get(name))
        x, new["mid"] = self.mid(x, old.get("mid"))
        x, new["conv_out"] = self.conv_out(x, old.get("conv_out"), self.norm_out(x))
        return x, new


class Decoder(nnx.Module):
    """Chunk of latents -> video."""

    def __init__(self, config, *, rngs):
        self.config = config
        widths, dtype = config.block_out_channels[::-1], config.dtype
        norm = partial(SpatialNorm, config=config, rngs=rngs)
        self.conv_in = CausalConv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid = Level(widths[0], widths[0], 2, norm, dtype=dtype, rngs=rngs)
        for i, width in enumerate(widths):
            level = UpLevel(widths[max(i - 1, 0)], width, norm, index=i, config=config, rngs=rngs)
            setattr(self, f"up_{i}", level)
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, latents, cache):  # [B, t, h, w, latent_channels] -> [B, T, H, W, 3]
        old, new = cache or {}, {}
        x, new["conv_in"] = self.conv_in(latents, old.get("conv_in"))
        x, new["mid"] = self.mid(x, old.get("mid"), latents)
        for name in (f"up_{i}" for i in range(len(self.config.block_out_channels))):
            x, new[name] = getattr(self, name)(x, old.get(name), latents)
        x, new["conv_out"] = self.conv_out(x, old.get("conv_out"), self.norm_out(x, latents))
        return x, new


class VAE(nnx.Module):
    """Encoder and decoder. Results have the compute dtype, `config.dtype`.

    Every call starts with empty caches (the reference keeps those of a one-frame encode for the next call).
    """

    def __init__(self, config, *, rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video):
        """[B, T, H, W, 3] in [-1, 1] -> moments [B, t, h, w, 2 C]: means, then unclamped log-variances.

        Raises:
            InputError: frames or a size that cannot be encoded (`encode_slices`, `check_size`).
        """
        return _in_chunks(self.encode_chunk, video, encode_slices(video.shape[1], self.config))

    def decode(self, latents):
        """[B, t, h, w, C], already divided by the scaling factor -> video [B, T, H, W, 3], about [-1, 1].

        An odd number of latent frames gives T = 4 (t - 1) + 1, an even one 4 t.
        """
        return _in_chunks(self.decode_chunk, latents, decode_slices(latents.shape[1], self.config))

    def encode_chunk(self, video, cache=None):
        """One chunk of `encode` -> (its moments, the cache that the next chunk needs).

        Raises:
            InputError: as `check_size`.
        """
        check_size(video, self.config)
        return self.encoder(video, cache)

    def decode_chunk(self, latents, cache=None):
        """One chunk of `decode` -> (its frames, the cache that the next chunk needs)."""
        return self.decoder(latents, cache)


def posterior(moments):
    """Moments [..., 2 C] -> mean and standard deviation [..., C] of the latents."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))


def check_size(video, config):
    """Raises InputError if height or width of [B, T, H, W, 3] is not a whole number of latents."""
    height, width = video.shape[2:4]
    multiple = config.spatial_compression
    if height % multiple or width % multiple:
        raise InputError(
            f"the video is {height}x{width} pixels", where="vae encode",
            expected=f"height and width that are multiples of {multiple}", fix="pad or resize the video",
        )


def encode_slices(frames, config):
    """Which frames each chunk of an encoding has, a list of slices; the first takes the remainder.

    Raises:
        InputError: a number of frames that the reference cannot encode: 2 and 3.
    """
    if frames < 1 or 1 < frames < config.temporal_compression:
        raise InputError(
            f"the video has {frames} frames", where="vae encode",
            expected=f"1 frame, or at least {config.temporal_compression}", fix="repeat the last frame",
        )
    return _slices(frames, config.encode_chunk)


def decode_slices(frames, config):
    """Which latent frames each chunk of a decoding has, a list of slices; the first takes the remainder."""
    return _slices(frames, config.decode_chunk)


def _slices(length, chunk):
    first = min(length, length % chunk + chunk)
    return [slice(0, first), *(slice(start, start + chunk) for start in range(first, length, chunk))]


def _in_chunks(step, x, slices):
    """Runs `step(chunk, cache) -> (out, cache)` over [B, T, ...]; one scan over all but the first chunk."""
    first, *rest = slices
    head, cache = step(x[:, first], None)
    if not rest:
        return head
    chunks = rearrange(x[:, first.stop :], "b (n t) h w c -> n b t h w c", n=len(rest))

    def body(cache, chunk):
        out, cache = step(chunk, cache)
        return cache, out

    _, tail = jax.lax.scan(body, cache, chunks)
    return jnp.concatenate([head, rearrange(tail, "n b t h w c -> b (n t) h w c")], axis=1)
