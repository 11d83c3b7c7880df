"""Protocols: what is done to frames before they are scored. Every score is printed with its protocol's name.

The names of the presets keep the papers' width x height; sizes here are (height, width).
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from animecolor_jax.errors import InputError
from data_pipeline.sketch import EXTRACTORS

FILTERS = {
    "box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
FITS = ("crop", "stretch")
VALUES = ("uint8", "float")
MAX_SIDE = 16384
FVD_FRAMES = 10  # fewest of a clip that common_metrics scores
SSIM_SIDE, FLOW_SIDE, LPIPS_SIDE = 11, 32, 31  # smallest frames that they take


@dataclass(frozen=True)
class Protocol:
    """How frames are brought into the form that is scored.

    Raises:
        InputError: a value out of its range.
    """

    name: str
    size: tuple[int, int] | None = None
    """(height, width) in pixels that generated and target frames are resized to; None: the target's own,
    which the generated frames must have."""
    fit: str = "crop"
    """crop: to cover the size, and the middle of it, as training data are; stretch: both sides apart."""
    filter: str = "bicubic"
    """Of Pillow (antialiased when shrinking): box, bilinear, bicubic or lanczos."""
    values: str = "uint8"
    """uint8: resized frames are rounded to 8 bits, as a file would hold them; float: they stay in [0, 1]."""
    skip: int = 0
    """Frames left out at the start of a clip, such as 1 for the reference itself."""
    frames: int = 0
    """Frames of a clip that are scored, after the skipped ones; 0: all."""
    clip_length: int = 0
    """Frames of one sample of FVD: a clip gives as many as fit in it, one after the other; 0: the clip."""
    mask: bool = False
    """Whether the background is made white in generated and target frames; needs masks."""
    extractor: str = "xdog"
    """What makes line art of generated frames, and of the targets where no sketches are given."""
    lpips_spatial: bool = False
    """LPIPS as the mean of its map at the image's size, as common_metrics takes it."""

    def __post_init__(self):
        def require(holds, field, expected):
            if not holds:
                value = getattr(self, field)
                raise InputError(f"{value!r}", where=f"protocol {self.name}, {field}", expected=expected)

        require(isinstance(self.name, str) and self.name, "name", "a name")
        size = self.size or (SSIM_SIDE, SSIM_SIDE)
        require(
            len(size) == 2 and all(isinstance(side, int) and SSIM_SIDE <= side <= MAX_SIDE for side in size),
            "size", f"(height, width) in pixels from {SSIM_SIDE} to {MAX_SIDE}",
        )  # fmt: skip
        for field, known in (
            ("fit", FITS), ("filter", FILTERS), ("values", VALUES), ("extractor", EXTRACTORS),
        ):  # fmt: skip
            value = getattr(self, field)
            require(isinstance(value, str) and value in known, field, f"one of {', '.join(known)}")
        for field in ("skip", "frames", "clip_length"):
            value = getattr(self, field)
            require(type(value) is int and value >= 0, field, "a number of frames, 0 or more")
        require(
            not 0 < self.clip_length < FVD_FRAMES, "clip_length", f"0, or {FVD_FRAMES} or more"
        )
        for field in ("mask", "lpips_spatial"):
            require(type(getattr(self, field)) is bool, field, "true or false")

    def describe(self):
        """One line for reports."""
        size = "own size" if self.size is None else f"{self.size[0]}x{self.size[1]} (height x width)"
        resized = "" if self.size is None else f", {self.fit}, {self.filter}"
        count = f"{self.frames} frames of a clip" if self.frames else "all frames of a clip"
        parts = [f"{size}{resized}, {self.values} values, {count}"]
        parts += [f"the first {self.skip} left out"] * bool(self.skip)
        parts += [f"FVD of {self.clip_length} frames"] * bool(self.clip_length)
        parts += ["background white"] * self.mask
        parts += ["spatial LPIPS"] * self.lpips_spatial
        return ", ".join([*parts, f"line art by {self.extractor}"])

    def num_frames(self, length):
        """How many frames of a clip of `length` frames are scored."""
        rest = max(length - self.skip, 0)
        return min(rest, self.frames) if self.frames else rest

    def choose(self, clip):
        """The frames of a clip [T, ...] that are scored."""
        return clip[self.skip : self.skip + self.num_frames(len(clip))]

    def prepare(self, clip, mask=None):
        """Frames as they are scored.

        Args:
            clip: [T, H, W, 3] uint8 RGB, or line art [T, H, W] uint8; already chosen.
            mask: [T or 1, h, w] uint8, foreground above 127, resized like the frames; where the protocol has
                no masks it must be None.
        Returns:
            [T, *size, 3] or [T, *size], uint8, or float32 in [0, 1] where `values` is float and the frames
            were resized.
        """
        frames = resize_frames(clip, self.size, self.fit, self.filter, self.values)
        if mask is None:
            return frames
        background = resize_frames(mask, frames.shape[1:3], self.fit, "bilinear", "uint8") < 128
        white = 255 if frames.dtype == np.uint8 else 1.0
        background = background.reshape(*background.shape, *(1,) * (frames.ndim - 3))
        return np.where(background, np.asarray(white, frames.dtype), frames)


PRESETS = {
    protocol.name: protocol
    for protocol in (
        Protocol("animecolor-512x320", size=(320, 512)),
        Protocol("lvcd-256", size=(256, 256), fit="stretch"),
        Protocol("anidoc-256-fg", size=(256, 256), fit="stretch", mask=True),
    )
}


def find_protocol(name):
    """A preset by its name, or a user's own from a TOML file.

    Raises:
        InputError: no such preset or file, or a file that does not describe a protocol.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise InputError(
            f"{name!r}", where="--protocol", expected=f"{', '.join(PRESETS)}, or a .toml file",
            fix='a file has lines such as: name = "mine", size = "320x512", fit = "stretch"',
        )  # fmt: skip
    return read_protocol(path)


def read_protocol(path):
    """A protocol from a TOML file: fields of `Protocol`; size as "HEIGHTxWIDTH".

    Raises:
        InputError: it is missing, no TOML, or has fields or values that a protocol does not have.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise InputError("does not exist", where=path, expected="a TOML file") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=path, expected="a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"is not TOML: {error}", where=path, expected='lines such as size = "320x512"'
        ) from None
    known = [field.name for field in dataclasses.fields(Protocol)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise InputError(f"unknown {', '.join(unknown)}", where=path, expected=f"some of {', '.join(known)}")
    if values.get("name", path.stem) in PRESETS:
        raise InputError(
            f"name {values.get('name', path.stem)!r} is a preset's", where=path, expected="another name",
            fix='add a line name = "..."; scores carry it',
        )  # fmt: skip
    size = values.pop("size", None)
    if size is not None:
        try:
            size = tuple(int(side) for side in size.split("x"))
        except (ValueError, AttributeError):
            raise InputError(f"size {size!r}", where=path, expected='"HEIGHTxWIDTH" in pixels') from None
    try:
        return Protocol(**{"name": path.stem, **values, "size": size})
    except InputError as error:
        raise InputError(error.what, where=f"{path}: {error.where}", expected=error.expected) from None


def resize_frames(clip, size, fit, filter, values):
    """Resizes frames [T, H, W, 3] or [T, H, W] uint8; see `Protocol`. Of the size already: unchanged."""
    height, width = clip.shape[1:3]
    if size is None or (height, width) == tuple(size):
        return clip
    box = None
    if fit == "crop":
        scale = max(size[0] / height, size[1] / width)
        inner = min(size[1] / scale, width), min(size[0] / scale, height)  # rounded, it may be larger
        left, top = (width - inner[0]) / 2, (height - inner[1]) / 2
        box = (left, top, min(left + inner[0], width), min(top + inner[1], height))
    resize = {"size": (size[1], size[0]), "resample": FILTERS[filter], "box": box}
    if values == "uint8":
        return np.stack([np.asarray(Image.fromarray(frame).resize(**resize)) for frame in clip])
    planes = clip.reshape(*clip.shape[:3], -1).transpose(0, 3, 1, 2).reshape(-1, height, width)
    planes = [Image.fromarray(plane.astype(np.float32)).resize(**resize) for plane in planes]
    resized = np.stack([np.asarray(plane) for plane in planes]).reshape(len(clip), -1, *size)
    resized = np.clip(resized / np.float32(255), 0, 1).transpose(0, 2, 3, 1)
    return resized.reshape(len(clip), *size, *clip.shape[3:])
