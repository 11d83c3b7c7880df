"""LPIPS, version 0.1: the distance of two images in the features of an image classifier.

Source: arXiv:1801.03924; richzhang/PerceptualSimilarity lpips/lpips.py and pretrained_networks.py;
torchvision models/alexnet.py and vgg.py.
Axes: N images, H W height and width of images, h w those of features, C channels.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax.errors import InputError
from animecolor_jax.metrics.layers import HIGHEST, conv2d, max_pool, unit_range
from animecolor_jax.metrics.resize import resize

# of images in [-1, 1]: version 0.1 is trained with them
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10


@dataclass(frozen=True)
class Layer:
    """A convolution and its ReLU; `index` is the convolution's place in torchvision's `features`."""

    index: int
    in_channels: int
    channels: int
    size: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Trunk:
    """The convolutions of a classifier.

    Attributes:
        pool: side of the max pooling windows, which are 2 apart.
        pooled: the stages with a max pooling before them.
        stages: their convolutions; the features of every stage are compared.
        smallest: the least height and width of an image that leaves a feature in every stage.
    """

    pool: int
    pooled: tuple[int, ...]
    stages: tuple[tuple[Layer, ...], ...]
    smallest: int


TRUNKS = {
    "alex": Trunk(
        pool=3,
        pooled=(1, 2),
        stages=(
            (Layer(0, 3, 64, size=11, stride=4, padding=2),),
            (Layer(3, 64, 192, size=5, padding=2),),
            (Layer(6, 192, 384),),
            (Layer(8, 384, 256),),
            (Layer(10, 256, 256),),
        ),
        smallest=31,
    ),
    "vgg": Trunk(
        pool=2,
        pooled=(1, 2, 3, 4),
        stages=(
            (Layer(0, 3, 64), Layer(2, 64, 64)),
            (Layer(5, 64, 128), Layer(7, 128, 128)),
            (Layer(10, 128, 256), Layer(12, 256, 256), Layer(14, 256, 256)),
            (Layer(17, 256, 512), Layer(19, 512, 512), Layer(21, 512, 512)),
            (Layer(24, 512, 512), Layer(26, 512, 512), Layer(28, 512, 512)),
        ),
        smallest=16,
    ),
}


class Conv(nnx.Module):
    """Convolution and ReLU."""

    def __init__(self, layer, *, rngs):
        self.layer = layer
        create = nnx.initializers.he_normal()
        shape = (layer.size, layer.size, layer.in_channels, layer.channels)
        self.kernel = nnx.Param(create(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(layer.channels))

    def __call__(self, x):  # [N, H, W, I] -> [N, H', W', O]
        padding = ((self.layer.padding, self.layer.padding),) * 2
        x = conv2d(x, self.kernel[...], stride=self.layer.stride, padding=padding)
        return jax.nn.relu(x + self.bias[...])


def normalize(features):
    """Features [N, h, w, C], every position divided by its length; where all are zero they stay zero.

    The gradient there is zero too, where the reference's is not a number.
    """
    # a matrix product, since sums over neighbouring channels do not vectorise on a CPU
    square = jnp.matmul(jnp.square(features), jnp.ones((features.shape[-1], 1)), precision=HIGHEST)
    positive = square > 0
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return features / (length + EPSILON)


class Lpips(nnx.Module):
    """LPIPS in the features of "alex" or "vgg" (the 16 layers of VGG)."""

    def __init__(self, net, *, rngs):
        self.net = net
        for layer in self._layers():
            setattr(self, f"conv_{layer.index}", Conv(layer, rngs=rngs))
        for stage, layers in enumerate(self.trunk.stages):
            setattr(self, f"head_{stage}", nnx.Param(jnp.ones((1, 1, layers[-1].channels, 1))))

    @property
    def trunk(self):
        """The trunk's description."""
        return TRUNKS[self.net]

    def _layers(self):
        return [layer for layers in self.trunk.stages for layer in layers]

    def features(self, images):
        """Features of every stage after its last ReLU, not normalised.

        Args:
            images: [N, H, W, 3] uint8, or float32 in [0, 1].

        Returns:
            five arrays [N, h, w, C].

        Raises:
            InputError: the images are smaller than 31 x 31 (alex), 16 x 16 (vgg).
        """
        if min(images.shape[1:3]) < self.trunk.smallest:
            raise InputError(
                f"images are {images.shape[1]}x{images.shape[2]}", where=f"LPIPS ({self.net})",
                expected=f"at least {self.trunk.smallest} pixels on each side",
            )  # fmt: skip
        x = (unit_range(images) * 2 - 1 - SHIFT) / SCALE
        features = []
        for stage, layers in enumerate(self.trunk.stages):
            if stage in self.trunk.pooled:
                x = max_pool(x, self.trunk.pool, stride=2)
            for layer in layers:
                x = getattr(self, f"conv_{layer.index}")(x)
            features.append(x)
        return features

    def layer_maps(self, image0, image1):
        """The distance of every stage at every position, five arrays [N, h, w]."""
        maps = []
        # not as one batch: whatever a device's kernels do, equal images then have equal features
        pairs = zip(self.features(image0), self.features(image1), strict=True)
        for stage, pair in enumerate(pairs):
            # Features are not negative. The ReLU keeps the compiler from fusing one image's normalisation
            # with the difference: a product that is not rounded would set equal images 1e-15 apart.
            features0, features1 = (jax.nn.relu(normalize(features)) for features in pair)
            weights = getattr(self, f"head_{stage}")[0, 0, :, 0]
            maps.append(jnp.matmul(jnp.square(features0 - features1), weights, precision=HIGHEST))
        return maps

    def __call__(self, image0, image1, spatial=False):
        """The distance of images.

        Args:
            image0, image1: [N, H, W, 3] uint8, or float32 in [0, 1].
            spatial: a map in place of its mean. Its own mean is the value of common_metrics, which differs by
                some 1e-4 of it, as it weighs positions differently.

        Returns:
            [N], or [N, H, W] if `spatial`; 0 for equal images.

        Raises:
            InputError: as `features`.
        """
        maps = self.layer_maps(image0, image1)
        if not spatial:
            return sum(layer_map.mean((1, 2)) for layer_map in maps)
        return sum(resize(layer_map[..., None], image0.shape[1:3])[..., 0] for layer_map in maps)
