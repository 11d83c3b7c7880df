"""Sizes that the data pipeline and the model share: latents, aspect buckets, frame counts. Plain Python.

Source: the buckets of CogVideoX-Fun (aigc-apps/VideoX-Fun, videox_fun/data/bucket_sampler.py and
scripts/cogvideox_fun/train.py): aspect ratios around a base area, frames within a token budget.
"""

import re
from dataclasses import dataclass

from animecolor_jax.errors import InputError

SPATIAL_COMPRESSION = 8  # pixels of a latent's side
FRAMES_PER_LATENT = 4  # after the first latent, which holds one frame
SPATIAL_MULTIPLE = 16  # a patch of 2x2 latents

# (height, width) around 512x512; the ratio that selects one is height / width to two decimals.
SIZES_512 = (
    *((256, width) for width in (1024, 992, 960, 928)),
    *((288, width) for width in (896, 864, 832)),
    *((320, width) for width in (800, 768)),
    *((352, width) for width in (736, 704, 672)),
    *((384, width) for width in (672, 640)),
    *((416, width) for width in (608, 576)),
    *((448, width) for width in (576, 544)),
    *((480, width) for width in (544, 512)),
    (512, 512),
    *((height, 480) for height in (512, 544)),
    *((height, 448) for height in (544, 576)),
    *((height, 416) for height in (576, 608)),
    *((height, 384) for height in (640, 672)),
    *((height, 352) for height in (704, 736)),
    *((height, 320) for height in (768, 800)),
    *((height, 288) for height in (832, 864, 896)),
    *((height, 256) for height in (928, 960, 992, 1024)),
)


def latent_frames(num_frames):
    """Latent frames of a clip: the first frame alone, then one for every 4. 1 -> 1, 9 -> 3, 49 -> 13."""
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that all clips of a batch have: `frames` is 4k + 1, or 1 for images; sides in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self):
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def size(self):
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def is_image(self):
        """Whether it holds single images."""
        return self.frames == 1

    @property
    def latents(self):
        """(frames, height, width) of the latents."""
        side = SPATIAL_COMPRESSION
        return latent_frames(self.frames), self.height // side, self.width // side

    @staticmethod
    def parse(name):
        """`"49x320x512"` -> Bucket(49, 320, 512); ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name)
        if not match:
            raise ValueError(f"bucket is named {name!r}, expected FRAMESxHEIGHTxWIDTH such as 49x320x512")
        return Bucket(*map(int, match.groups()))


@dataclass(frozen=True)
class BucketConfig:
    """Which buckets there are.

    A clip goes to the largest base that does not enlarge it (else to the smallest), there to the nearest
    aspect ratio, and takes the largest number of frames that its length and the token budget allow.
    """

    bases: tuple[int, ...] = (512,)
    """Sides in pixels of the squares whose area the buckets have. Several bases keep small clips from being
    enlarged."""
    sizes: tuple[tuple[int, int], ...] = ()
    """HEIGHT WIDTH pairs, such as 480 720, to use instead of the aspect ratios around `bases`."""
    max_pixels: int = 49 * 512 * 512
    """Token budget: frames x height x width at most, so that smaller buckets may have more frames."""
    frame_counts: tuple[int, ...] = (9, 17, 25, 33, 41, 49)
    """Numbers of frames, each 4k + 1. Every bucket is a program to compile, so keep them few. 8m + 1 gives an
    odd number of latents: lengths that the decoder returns exactly."""
    stride: int = 3
    """A window takes every stride-th frame where the clip is long enough for the least number of frames, else
    as many frames apart as it is long enough for."""
    image_base: int = 512
    """The base of single images."""

    def __post_init__(self):
        def require(holds, field, expected):
            if not holds:
                raise InputError(f"{getattr(self, field)}", where=f"buckets.{field}", expected=expected)

        def ascending(values):
            return bool(values) and all(a < b for a, b in zip(values, values[1:], strict=False))

        require(ascending(self.bases) and self.bases[0] >= 64, "bases", "ascending pixels, 64 or more")
        require(self.image_base >= 64, "image_base", "64 pixels or more")
        sides = [side for size in self.sizes for side in size]
        require(
            all(side >= SPATIAL_MULTIPLE and side % SPATIAL_MULTIPLE == 0 for side in sides),
            "sizes",
            f"sides that are multiples of {SPATIAL_MULTIPLE}",
        )
        require(self.stride >= 1, "stride", "1 frame or more")
        require(
            ascending(self.frame_counts) and all(n % 4 == 1 and n > 1 for n in self.frame_counts),
            "frame_counts",
            "ascending numbers 4k + 1, such as 9 17 49",
        )
        areas = [height * width for height, width in self.sizes or aspect_sizes(self.bases[-1])]
        least = max(areas) * self.frame_counts[0]
        require(self.max_pixels >= least, "max_pixels", f"{least} or more: {self.frame_counts[0]} frames")

    def video_bucket(self, num_frames, height, width):
        """The bucket of `num_frames` frames of height x width pixels (after cropping); None where they are
        fewer than frame_counts[0]."""
        if num_frames < self.frame_counts[0]:
            return None
        size = self._size(height, width)
        window = (num_frames - 1) // self.window_stride(num_frames) + 1
        limit = min(window, self.max_pixels // (size[0] * size[1]))
        return Bucket(max(n for n in self.frame_counts if n <= limit), *size)

    def image_bucket(self, height, width):
        """The bucket of a single image."""
        size = _nearest(self.sizes, height, width) or aspect_size(height, width, self.image_base)
        return Bucket(1, *size)

    def window_stride(self, num_frames):
        """The largest stride up to `stride` at which a clip still has frame_counts[0] frames."""
        return max(1, min(self.stride, (num_frames - 1) // (self.frame_counts[0] - 1)))

    def _size(self, height, width):
        if self.sizes:
            return _nearest(self.sizes, height, width)
        fitting = [base for base in self.bases if base**2 <= height * width]
        return aspect_size(height, width, max(fitting, default=self.bases[0]))


def aspect_size(height, width, base):
    """The (height, width) around base x base whose aspect ratio is nearest to height x width."""
    return _scaled(_nearest(SIZES_512, height, width), base)


def aspect_sizes(base):
    """The (height, width) of all aspect ratios around base x base."""
    return tuple(dict.fromkeys(_scaled(size, base) for size in SIZES_512))


def _nearest(sizes, height, width):
    """Of (height, width) sizes the one with the nearest aspect ratio, by two decimals as the source does."""
    ratio = height / width
    return min(sizes, key=lambda size: abs(round(size[0] / size[1], 2) - ratio), default=None)


def _scaled(size, base):
    return tuple(side * base // (512 * SPATIAL_MULTIPLE) * SPATIAL_MULTIPLE for side in size)


def cover_box(height, width, bucket_height, bucket_width):
    """The largest centred (top, left, height, width) of an image that has the bucket's aspect ratio, up to a
    pixel: what is left when the image is resized to cover the bucket and cropped to it."""
    scale = min(height / bucket_height, width / bucket_width)
    box_height = min(height, max(1, round(bucket_height * scale)))
    box_width = min(width, max(1, round(bucket_width * scale)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
