"""I3D, the network of FVD: a video to the 400 class scores of Kinetics, before the softmax.

It is Inception-v1 with a time axis, padded as TensorFlow pads ("SAME"). A convolution runs as one of images:
the frames under its kernel lie side by side on the channel axis, for which a CPU has a fast convolution.
Attributes have the names of the checkpoint.
Source: arXiv:1705.07750; FVD arXiv:1812.01717; common_metrics_on_video_quality fvd/{styleganv,videogpt}.

Axes: B clips, T frames, H W height and width, C channels; I O those of a convolution's input and output.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import nnx

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.layers import HIGHEST, conv2d, unit_range, windows
from animecolor_jax.metrics.resize import resize

SIZE = 224
MIN_FRAMES = 9  # the head averages over two frames after three halvings
FEATURES = 400
PROTOCOLS = ("styleganv", "videogpt")
VIDEOGPT_EPS = 1e-5  # of the batch norms; that of TensorFlow's original is 1e-3

# (size, stride) of the pools, and output channels of the branches b0, b1a, b1b, b2a, b2b, b3b of the blocks
POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
STAGES = (
    "Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3", "Mixed_3b",
    "Mixed_3c", "MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f",
    "MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c",
)  # fmt: skip


def same_padding(length, size, stride):
    """TensorFlow's padding of an axis, (front, back): as little as gives ceil(length / stride) outputs."""
    total = max(size - (length % stride or stride), 0)
    return total // 2, total - total // 2


def conv3d(x, kernel, stride):
    """[B, T, H, W, I], [t, h, w, I, O] -> [B, ceil(T / stride), ceil(H / stride), ceil(W / stride), O]."""
    taps, height, width, in_channels, channels = kernel.shape
    sizes = zip(x.shape[1:4], (taps, height, width), strict=True)
    padding = [same_padding(length, size, stride) for length, size in sizes]
    x = jnp.pad(x, [(0, 0), padding[0], *[(0, 0)] * 3])
    x = jnp.concatenate(windows(x, 1, taps, stride), axis=-1)  # [B, T', H, W, t I]
    images = x.reshape(-1, *x.shape[2:])
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(height, width, taps * in_channels, channels)
    out = conv2d(images, kernel, stride=stride, padding=padding[1:])
    return out.reshape(*x.shape[:2], *out.shape[1:])


def max_pool(x, sizes, strides):
    """[B, T, H, W, C] without negative values -> [B, T', H', W', C], padded with zeros as `same_padding`."""
    for axis, size, stride in zip((1, 2, 3), sizes, strides, strict=True):
        padding = [(0, 0)] * x.ndim
        padding[axis] = same_padding(x.shape[axis], size, stride)
        x = reduce(jnp.maximum, windows(jnp.pad(x, padding), axis, size, stride))
    return x


class Unit(nnx.Module):
    """Convolution, batch norm with the statistics of training, ReLU. `size`: of the cubic kernel."""

    def __init__(self, in_channels, channels, size=1, *, stride=1, eps, rngs):
        self.stride, self.eps = stride, eps
        create = nnx.initializers.he_normal()
        self.kernel = nnx.Param(create(rngs.params(), (*(size,) * 3, in_channels, channels)))
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x):  # [B, T, H, W, I] -> [B, T', H', W', O]
        scale = self.scale[...] / jnp.sqrt(self.var[...] + self.eps)
        x = conv3d(x, self.kernel[...], self.stride)
        return jax.nn.relu(x * scale + (self.bias[...] - self.mean[...] * scale))


class Block(nnx.Module):
    """Four branches side by side: 1x1x1, two with 3x3x3, and a pool."""

    def __init__(self, in_channels, channels, *, eps, rngs):
        unit = partial(Unit, eps=eps, rngs=rngs)
        b0, b1a, b1b, b2a, b2b, b3b = channels
        self.b0 = unit(in_channels, b0)
        self.b1a, self.b1b = unit(in_channels, b1a), unit(b1a, b1b, 3)
        self.b2a, self.b2b = unit(in_channels, b2a), unit(b2a, b2b, 3)
        self.b3b = unit(in_channels, b3b)

    def __call__(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)
        return jnp.concatenate(branches, axis=-1)


class Logits(nnx.Module):
    """The 1x1x1 convolution of the head."""

    def __init__(self, in_channels, channels, *, rngs):
        create = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(create(rngs.params(), (1, 1, 1, in_channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):  # [..., I] -> [..., O]
        return jnp.matmul(x, self.kernel[0, 0, 0], precision=HIGHEST) + self.bias[...]


class I3D(nnx.Module):
    """Clips -> the 400 features of FVD. `eps`: of the batch norms, in which the published files differ."""

    def __init__(self, *, eps=VIDEOGPT_EPS, rngs):
        unit = partial(Unit, eps=eps, rngs=rngs)
        self.Conv3d_1a_7x7 = unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = unit(64, 64)
        self.Conv3d_2c_3x3 = unit(64, 192, 3)
        in_channels = 192
        for name, channels in BLOCKS.items():
            setattr(self, name, Block(in_channels, channels, eps=eps, rngs=rngs))
            b0, _, b1b, _, b2b, b3b = channels
            in_channels = b0 + b1b + b2b + b3b
        self.logits = Logits(in_channels, FEATURES, rngs=rngs)

    def activations(self, clips):
        """The output of every one of `STAGES`, then `avg_pool` [B, T', 1024], in order.

        Raises:
            InputError: as `__call__`.
        """
        if clips.ndim != 5 or clips.shape[1] < MIN_FRAMES or clips.shape[2:] != (SIZE, SIZE, 3):
            raise InputError(
                f"clips of shape {clips.shape}", where="i3d",
                expected=f"[B, T, {SIZE}, {SIZE}, 3] with at least {MIN_FRAMES} frames",
                fix="use longer clips, and `preprocess`",
            )
        outputs, x = {}, clips
        for name in STAGES:
            x = max_pool(x, *POOLS[name]) if name in POOLS else getattr(self, name)(x)
            outputs[name] = x
        frames = x.mean((2, 3))
        outputs["avg_pool"] = (frames[:, :-1] + frames[:, 1:]) / 2
        return outputs

    def __call__(self, clips):
        """Scores every pair of neighbouring frames of the last stage, and takes the mean.

        Args:
            clips: [B, T, 224, 224, 3] float32 in [-1, 1], T >= 9, as `preprocess` returns.

        Returns:
            [B, 400] float32.

        Raises:
            InputError: other sizes, or fewer frames.
        """
        return self.logits(self.activations(clips)["avg_pool"]).mean(1)


@partial(jax.jit, static_argnames="protocol")
def preprocess(frames, protocol):
    """The shorter side to 224, the longer in proportion, and the square in the middle.

    Args:
        frames: [B, T, H, W, 3] uint8, or float32 in [0, 1].
        protocol: one of `PROTOCOLS`. "videogpt" first cuts float32 down to the uint8 below.

    Returns:
        [B, T, 224, 224, 3] float32 in [-1, 1].

    Raises:
        InputError: another protocol, or other frames.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}", where="fvd", expected=" or ".join(PROTOCOLS))
    if frames.ndim != 5 or frames.shape[-1] != 3:
        raise InputError(f"frames of shape {frames.shape}", where="fvd", expected="[B, T, H, W, 3]")
    if protocol == "videogpt":
        frames = to_uint8(frames)
    frames = resize(unit_range(frames), _resized(*frames.shape[2:4]))
    top, left = ((side - SIZE) // 2 for side in frames.shape[2:4])
    return (frames[:, :, top : top + SIZE, left : left + SIZE] - 0.5) * 2


def to_uint8(frames):
    """float32 in [0, 1] -> uint8 by truncation; uint8 as they are."""
    if jnp.issubdtype(frames.dtype, jnp.integer):
        return frames
    return (frames * 255).astype(jnp.uint8)


def _resized(height, width):
    # Rounding up a product of floats as the reference does: 54 * (224 / 48) is a little over 252, hence 253.
    scale = SIZE / min(height, width)
    if height >= width:
        return math.ceil(height * scale), SIZE
    return SIZE, math.ceil(width * scale)


@partial(jax.jit, static_argnames="protocol")
def features(network, frames, protocol):
    """The features of FVD.

    Args:
        network: an `I3D`. frames: [B, T, H, W, 3] uint8, or float32 in [0, 1], T >= 9.
        protocol: as `preprocess`.

    Returns:
        [B, 400] float32.

    Raises:
        InputError: as `preprocess` and `I3D`.
    """
    return network(preprocess(frames, protocol))
