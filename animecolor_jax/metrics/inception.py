"""InceptionV3 as FID uses it: the network of 2015, of which torchvision's is not a copy.

Against torchvision: average pools of a block's pool branch leave the padding out of the mean, the last block
has a max pool in its place, and there is no auxiliary head. Attributes have the names of the checkpoint.
Source: arXiv:1512.00567; mseitzer/pytorch-fid src/pytorch_fid/inception.py. Axes: N images, C channels.
"""

from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax.metrics.layers import conv2d, max_pool, unit_range, windows
from animecolor_jax.metrics.resize import resize

SIZE = 299
NORM_EPS = 1e-3
FEATURES = 2048
STAGES = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "pool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "pool2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
    "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip


class Unit(nnx.Module):
    """Convolution, batch norm with the statistics of training, ReLU.

    With stride 1 the size stays unless `padding` is "VALID".
    """

    def __init__(self, in_channels, channels, size=(1, 1), *, stride=1, padding="SAME", rngs):
        self.stride, self.padding = stride, padding
        create = nnx.initializers.he_normal()
        self.kernel = nnx.Param(create(rngs.params(), (*size, in_channels, channels)))
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x):  # [N, H, W, I] -> [N, H', W', O]
        x = conv2d(x, self.kernel[...], stride=self.stride, padding=self.padding)
        scale = self.scale[...] / jnp.sqrt(self.var[...] + NORM_EPS)
        return jax.nn.relu(x * scale + (self.bias[...] - self.mean[...] * scale))


def average_pool(x):
    """Mean over the 3 x 3 neighbours that there are, [N, H, W, C] -> the same shape."""
    height, width = x.shape[1:3]
    counts = np.outer(_neighbours(height), _neighbours(width))[:, :, None]
    for axis in (1, 2):
        x = reduce(add, windows(_pad(x, axis, 0), axis, 3, 1))
    return x * (1 / counts).astype(np.float32)


def _neighbours(size):
    """How many of a position and the two beside it lie on an axis, [size]."""
    index = np.arange(size)
    return np.minimum(index + 2, size) - np.maximum(index - 1, 0)


def neighbour_max(x):
    """Maximum over the 3 x 3 neighbours that there are, [N, H, W, C] -> the same shape."""
    for axis in (1, 2):
        x = reduce(jnp.maximum, windows(_pad(x, axis, -jnp.inf), axis, 3, 1))
    return x


def _pad(x, axis, value):
    return jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], constant_values=value)


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class Block5(nnx.Module):
    """At 35 x 35: 1x1, 5x5, two 3x3 and pooling."""

    def __init__(self, channels, pool_channels, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.branch1x1 = unit(channels, 64)
        self.branch5x5_1 = unit(channels, 48)
        self.branch5x5_2 = unit(48, 64, (5, 5))
        self.branch3x3dbl_1 = unit(channels, 64)
        self.branch3x3dbl_2 = unit(64, 96, (3, 3))
        self.branch3x3dbl_3 = unit(96, 96, (3, 3))
        self.branch_pool = unit(channels, pool_channels)

    def __call__(self, x):
        return _join(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )


class Reduction6(nnx.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, channels, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.branch3x3 = unit(channels, 384, (3, 3), stride=2, padding="VALID")
        self.branch3x3dbl_1 = unit(channels, 64)
        self.branch3x3dbl_2 = unit(64, 96, (3, 3))
        self.branch3x3dbl_3 = unit(96, 96, (3, 3), stride=2, padding="VALID")

    def __call__(self, x):
        return _join(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool(x, 3, stride=2),
        )


class Block6(nnx.Module):
    """At 17 x 17: 1x1, 7x7 and two 7x7 as rows and columns, and pooling. `inner`: channels between them."""

    def __init__(self, inner, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.branch1x1 = unit(768, 192)
        self.branch7x7_1 = unit(768, inner)
        self.branch7x7_2 = unit(inner, inner, (1, 7))
        self.branch7x7_3 = unit(inner, 192, (7, 1))
        self.branch7x7dbl_1 = unit(768, inner)
        self.branch7x7dbl_2 = unit(inner, inner, (7, 1))
        self.branch7x7dbl_3 = unit(inner, inner, (1, 7))
        self.branch7x7dbl_4 = unit(inner, inner, (7, 1))
        self.branch7x7dbl_5 = unit(inner, 192, (1, 7))
        self.branch_pool = unit(768, 192)

    def __call__(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _join(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )


class Reduction7(nnx.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.branch3x3_1 = unit(768, 192)
        self.branch3x3_2 = unit(192, 320, (3, 3), stride=2, padding="VALID")
        self.branch7x7x3_1 = unit(768, 192)
        self.branch7x7x3_2 = unit(192, 192, (1, 7))
        self.branch7x7x3_3 = unit(192, 192, (7, 1))
        self.branch7x7x3_4 = unit(192, 192, (3, 3), stride=2, padding="VALID")

    def __call__(self, x):
        return _join(
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            max_pool(x, 3, stride=2),
        )


class Block7(nnx.Module):
    """At 8 x 8: 1x1, 3x3 and two 3x3, their last convolutions as a row beside a column, and `pool`."""

    def __init__(self, channels, pool, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.pool = pool
        self.branch1x1 = unit(channels, 320)
        self.branch3x3_1 = unit(channels, 384)
        self.branch3x3_2a = unit(384, 384, (1, 3))
        self.branch3x3_2b = unit(384, 384, (3, 1))
        self.branch3x3dbl_1 = unit(channels, 448)
        self.branch3x3dbl_2 = unit(448, 384, (3, 3))
        self.branch3x3dbl_3a = unit(384, 384, (1, 3))
        self.branch3x3dbl_3b = unit(384, 384, (3, 1))
        self.branch_pool = unit(channels, 192)

    def __call__(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


class Inception(nnx.Module):
    """Images -> the 2048 features of FID."""

    def __init__(self, *, rngs):
        unit = partial(Unit, rngs=rngs)
        self.Conv2d_1a_3x3 = unit(3, 32, (3, 3), stride=2, padding="VALID")
        self.Conv2d_2a_3x3 = unit(32, 32, (3, 3), padding="VALID")
        self.Conv2d_2b_3x3 = unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = unit(64, 80)
        self.Conv2d_4a_3x3 = unit(80, 192, (3, 3), padding="VALID")
        self.Mixed_5b = Block5(192, 32, rngs=rngs)
        self.Mixed_5c = Block5(256, 64, rngs=rngs)
        self.Mixed_5d = Block5(288, 64, rngs=rngs)
        self.Mixed_6a = Reduction6(288, rngs=rngs)
        self.Mixed_6b = Block6(128, rngs=rngs)
        self.Mixed_6c = Block6(160, rngs=rngs)
        self.Mixed_6d = Block6(160, rngs=rngs)
        self.Mixed_6e = Block6(192, rngs=rngs)
        self.Mixed_7a = Reduction7(rngs=rngs)
        self.Mixed_7b = Block7(1280, average_pool, rngs=rngs)
        self.Mixed_7c = Block7(2048, neighbour_max, rngs=rngs)

    def preprocess(self, images):
        """Images of any size, uint8 or float32 in [0, 1] -> [N, 299, 299, 3] in [0, 1].

        The sides change independently, and shrinking does not smooth.
        """
        return resize(unit_range(images), (SIZE, SIZE))

    def activations(self, resized):
        """The output of every one of `STAGES`, by its name.

        Args:
            resized: as `preprocess` returns.
        """
        outputs, x = {}, resized * 2 - 1
        for name in STAGES:
            x = max_pool(x, 3, stride=2) if name.startswith("pool") else getattr(self, name)(x)
            outputs[name] = x
        return outputs

    def __call__(self, images):
        """Pools the last stage.

        Args:
            images: [N, H, W, 3] uint8, or float32 in [0, 1].

        Returns:
            [N, 2048] float32.
        """
        return self.activations(self.preprocess(images))["Mixed_7c"].mean((1, 2))
