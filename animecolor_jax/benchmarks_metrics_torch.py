"""PyTorch counterparts of the metrics, for `tools/benchmark.py metrics --against torch`.

They compute the same at the same accuracy, from the same state dicts, in the way that is usual in PyTorch.
Networks take and give channels first.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from animecolor_jax.metrics.image import IDENTICAL_DB, IDENTICAL_MSE, K1, K2, gaussian_window
from data_pipeline.sketch import XDoG, gaussian_kernel

# ---------------------------------------------------------------- pixels


def psnr(generated, target):
    """[N, H, W, C] uint8 -> [N] dB."""
    mse = ((generated.float() - target.float()) / 255).square().mean((1, 2, 3))
    return torch.where(mse < IDENTICAL_MSE, IDENTICAL_DB, -10 * torch.log10(mse))


def ssim(generated, target):
    """[N, H, W, C] uint8 -> [N].

    In float64, as the reference: in float32 E[x^2] - mu^2 is off by up to 5e-4. Sums of shifted frames,
    because PyTorch's float64 convolutions take twice as long.
    """
    window = torch.tensor(gaussian_window())
    scores = []
    for pair in zip(generated, target, strict=True):  # frame by frame is faster than all at once
        x, y = (frame.permute(2, 0, 1).double() / 255 for frame in pair)
        maps = torch.stack([x, y, x * x, y * y, x * y])
        mu_x, mu_y, xx, yy, xy = _filter(_filter(maps, window, 2), window, 3)
        c1, c2 = K1**2, K2**2
        luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
        contrast = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x**2 + yy - mu_y**2 + c2)
        scores.append((luminance * contrast).mean())
    return torch.stack(scores)


def _filter(maps, weights, axis):
    """Valid correlation along one axis."""
    size = maps.shape[axis] - len(weights) + 1
    result = weights[0] * maps.narrow(axis, 0, size)
    for at in range(1, len(weights)):
        result.add_(maps.narrow(axis, at, size), alpha=weights[at].item())
    return result


def sketch_alignment(frames, sketch):
    """[N, H, W, 3] uint8 RGB, [N, H, W] uint8 -> [N]: XDoG and root mean square difference."""
    return ((xdog(frames).float() - sketch.float()) / 255).square().mean((1, 2)).sqrt()


def xdog(frames):
    """[N, H, W, 3] uint8 RGB -> [N, H, W] uint8, as `data_pipeline.sketch.XDoG()`.

    Blurs are float32 convolutions whose numbers are integers below 2**24, so they are exact.
    """
    parameters = XDoG()
    red, green, blue = frames.int().unbind(-1)
    grey = ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).float()[:, None]
    fine, coarse = (_blur(grey, sigma) for sigma in (parameters.sigma, parameters.sigma * parameters.k))
    dog = fine.double() - parameters.gamma * coarse.double()
    peak = dog.amax((2, 3), keepdim=True)
    paper = (dog / peak >= parameters.epsilon / 255) | (peak <= 0)
    return (paper[:, 0] * 255).to(torch.uint8)


def _blur(grey, sigma):
    kernel = torch.tensor(gaussian_kernel(sigma), dtype=torch.float32)
    half = len(kernel) // 2
    padded = F.pad(grey, (half,) * 4, mode="reflect")
    columns = F.conv2d(padded, kernel.reshape(1, 1, -1, 1))
    return torch.floor((F.conv2d(columns, kernel.reshape(1, 1, 1, -1)) + 32768) / 65536)


# ---------------------------------------------------------------- networks


class Lpips(nn.Module):
    """LPIPS v0.1 on images [N, 3, H, W] in [0, 1] -> [N].

    State: the trunk's `features.*`, and `lin0.model.1.weight` to `lin4...` of the heads.
    """

    LAYERS = {  # convolutions: (out, kernel, stride, padding); M a max pool (kernel, stride)
        "alex": [(64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
        "vgg": [
            (64, 3, 1, 1), (64, 3, 1, 1), "M", (128, 3, 1, 1), (128, 3, 1, 1), "M",
            *[(256, 3, 1, 1)] * 3, "M", *[(512, 3, 1, 1)] * 3, "M", *[(512, 3, 1, 1)] * 3,
        ],
    }  # fmt: skip
    TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}

    def __init__(self, net):
        super().__init__()
        layers, channels = [], 3
        for layer in self.LAYERS[net]:
            if layer == "M":
                layers.append(nn.MaxPool2d(*((3, 2) if net == "alex" else (2, 2))))
            else:
                out, kernel, stride, padding = layer
                layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU(inplace=True)]
                channels = out
        self.features, self.taps = nn.Sequential(*layers), self.TAPS[net]
        widths = [self.features[tap - 1].out_channels for tap in self.taps]
        for k, width in enumerate(widths):
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{k}", head)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, image0, image1):
        x = torch.cat([image0, image1])
        x = (2 * x - 1 - self.shift) / self.scale
        total = 0
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                head = getattr(self, f"lin{self.taps.index(index)}").model
                total = total + head((a - b).square()).mean((1, 2, 3))
        return total


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU; `name` is the convolution's."""

    def __init__(self, name, module, norm, eps):
        super().__init__()
        self.add_module(name, module)
        self.bn, self._name = norm(module.out_channels, eps=eps), name

    def forward(self, x):
        return F.relu(self.bn(getattr(self, self._name)(x)), inplace=True)


def _unit2d(inputs, out, kernel, stride=1):
    """A unit of Inception, padded to keep the size where the stride is 1; kernel 3 may be (1, 3)."""
    size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(n // 2 for n in size) if stride == 1 else 0
    convolution = nn.Conv2d(inputs, out, size, stride, padding, bias=False)
    return _Unit("conv", convolution, nn.BatchNorm2d, 1e-3)


class _Mixed2d(nn.Module):
    """Branches of units; each branch is a list of (name, out, kernel[, stride]), a list in it two ends.

    pool: "avg" (without padding in its mean) or "max" at stride 1 before the unit `branch_pool`, or
    "reduce": a max pool at stride 2 without a unit.
    """

    def __init__(self, inputs, branches, pool, pool_features=None):
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            channels = inputs
            for step in branch:
                ends = step if isinstance(step, list) else [step]
                for name, *unit in ends:
                    self.add_module(name, _unit2d(channels, *unit))
                channels = sum(unit[1] for unit in ends)
        if pool_features:
            self.branch_pool = _unit2d(inputs, pool_features, 1)

    def forward(self, x):
        found = []
        for branch in self.branches:
            y = x
            for step in branch:
                if isinstance(step, list):
                    y = torch.cat([getattr(self, name)(y) for name, *_ in step], 1)
                else:
                    y = getattr(self, step[0])(y)
            found.append(y)
        if self.pool == "reduce":
            found.append(F.max_pool2d(x, 3, 2))
        else:
            pooled = (
                F.max_pool2d(x, 3, 1, 1)
                if self.pool == "max"
                else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            )
            found.append(self.branch_pool(pooled))
        return torch.cat(found, 1)


def _inception_a(inputs, pool_features):
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    five = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return _Mixed2d(inputs, [[("branch1x1", 64, 1)], five, double], "avg", pool_features)


def _inception_b(inputs):
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]
    return _Mixed2d(inputs, [[("branch3x3", 384, 3, 2)], double], "reduce")


def _inception_c(inputs, width):
    row, column = (1, 7), (7, 1)
    seven = [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)]
    kernels = (1, column, row, column, row)
    double = [(f"branch7x7dbl_{i}", 192 if i == 5 else width, kernel) for i, kernel in enumerate(kernels, 1)]
    return _Mixed2d(inputs, [[("branch1x1", 192, 1)], seven, double], "avg", 192)


def _inception_d(inputs):
    three = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)]
    kernels = ((1,), ((1, 7),), ((7, 1),), (3, 2))
    seven = [(f"branch7x7x3_{i}", 192, *kernel) for i, kernel in enumerate(kernels, 1)]
    return _Mixed2d(inputs, [three, seven], "reduce")


def _inception_e(inputs, pool):
    def ends(name):
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    three = [("branch3x3_1", 384, 1), ends("branch3x3_2")]
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ends("branch3x3dbl_3")]
    return _Mixed2d(inputs, [[("branch1x1", 320, 1)], three, double], pool, 192)


class Inception(nn.Module):
    """pytorch-fid's InceptionV3 on images [N, 3, H, W] in [0, 1] -> pool3 [N, 2048]."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _unit2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _unit2d(32, 32, 3)
        self.Conv2d_2a_3x3.conv.padding = (0, 0)
        self.Conv2d_2b_3x3 = _unit2d(32, 64, 3)
        self.Conv2d_3b_1x1 = _unit2d(64, 80, 1)
        self.Conv2d_4a_3x3 = _unit2d(80, 192, 3)
        self.Conv2d_4a_3x3.conv.padding = (0, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = map(_inception_a, (192, 256, 288), (32, 64, 64))
        self.Mixed_6a = _inception_b(288)
        for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
            self.add_module(f"Mixed_6{name}", _inception_c(768, width))
        self.Mixed_7a = _inception_d(768)
        self.Mixed_7b, self.Mixed_7c = _inception_e(1280, "avg"), _inception_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, layer in self.named_children():
            if name == "fc":
                return x.mean((2, 3))
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)


def channels_first(frames):
    """[N, H, W, C] uint8 -> [N, C, H, W] float32 in [0, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 255


def i3d_input(clip):
    """[T, H, W, 3] uint8 -> [1, 3, T, 224, 224] in [-1, 1]: the shorter side to 224, the middle."""
    frames = channels_first(clip)
    height, width = frames.shape[2:]
    scale = 224 / min(height, width)
    size = (math.ceil(height * scale), 224) if height >= width else (224, math.ceil(width * scale))
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = ((side - 224) // 2 for side in size)
    frames = frames[:, :, top : top + 224, left : left + 224]
    return 2 * frames.transpose(0, 1)[None] - 1


def _same(x, kernel, stride):
    """Zero padding of the last three axes as TensorFlow's SAME."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max(k - (s if size % s == 0 else size % s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def _pool3d(x, kernel, stride):
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class _Unit3d(_Unit):
    def __init__(self, inputs, out, kernel, stride=1):
        super().__init__("conv3d", nn.Conv3d(inputs, out, kernel, stride, bias=False), nn.BatchNorm3d, 1e-5)

    def forward(self, x):
        return super().forward(_same(x, self.conv3d.kernel_size, self.conv3d.stride))


class _Mixed3d(nn.Module):
    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0, self.b1a, self.b1b = _Unit3d(inputs, b0, 1), _Unit3d(inputs, b1a, 1), _Unit3d(b1a, b1b, 3)
        self.b2a, self.b2b = _Unit3d(inputs, b2a, 1), _Unit3d(b2a, b2b, 3)
        self.b3b = _Unit3d(inputs, b3b, 1)

    def forward(self, x):
        pooled = _pool3d(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """I3D on clips [B, 3, T, 224, 224] in [-1, 1] -> logits [B, 400]."""

    MIXED = {
        "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
        "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64),
        "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
        "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128),
        "5c": (384, 192, 384, 48, 128, 128),
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit3d(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit3d(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit3d(64, 192, 3)
        channels = 192
        for name, widths in self.MIXED.items():
            self.add_module(f"Mixed_{name}", _Mixed3d(channels, *widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, x):
        x = _pool3d(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = _pool3d(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in self.MIXED:
            if name in ("4b", "5b"):
                size = (3 if name == "4b" else 2,) * 3
                x = _pool3d(x, size, (2, 2, 2))
            x = getattr(self, f"Mixed_{name}")(x)
        return self.logits.conv3d(F.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))


def procedural_state(module, prefix):
    """A state dict for `module` in the metrics fixtures' scales, from names and shapes alone.

    Args:
        prefix: of the names that are hashed.
    """
    from animecolor_jax.parity.weights import procedural

    state = {}
    for key, value in module.state_dict().items():
        name, shape = f"{prefix}.{key}", tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            state[key] = value
            continue
        if ".model.1." in key:
            array = abs(procedural(name, shape))
        elif len(shape) > 1:
            array = procedural(name, shape, math.sqrt(2 / math.prod(shape[1:])))
        elif key.endswith((".bn.weight", ".bn.running_var")):
            array = procedural(name, shape, 0.25, 1.0)
        else:
            array = procedural(name, shape, 0.1 if key.startswith("features.") else 0.15)
        state[key] = torch.tensor(array)
    return state
