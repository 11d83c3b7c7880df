"""Whether every metric moves as its definition says: clips against changed versions of themselves."""

from dataclasses import dataclass

import cv2
import numpy as np

BLUR_SIGMA = 2.0  # pixels of the frames given
FLICKER_LEVELS = 12  # brighter and darker by turns
SHIFT_PIXELS = 4
HUE_DEGREES = 120


def blur(frames):
    """Gaussian blur, the same in every frame."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), BLUR_SIGMA) for frame in frames])


def recolor(frames):
    """Hues turned at the same lightness (CIE Lab), the same in every frame: lines and shapes stay."""
    angle = np.deg2rad(HUE_DEGREES)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
    lab = [cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) @ turn.T for frame in frames]
    rgb = np.stack([cv2.cvtColor(frame, cv2.COLOR_LAB2RGB) for frame in lab])
    return np.rint(255 * np.clip(rgb, 0, 1)).astype(np.uint8)


def flicker(frames):
    """Brighter and darker frames by turns."""
    signs = np.where(np.arange(len(frames)) % 2, -1, 1)
    return np.clip(frames + FLICKER_LEVELS * signs[:, None, None, None], 0, 255).astype(np.uint8)


def shift(frames):
    """Everything moved to the right and down, the edge repeated."""
    padded = np.pad(frames, ((0, 0), (SHIFT_PIXELS, 0), (SHIFT_PIXELS, 0), (0, 0)), mode="edge")
    return padded[:, : frames.shape[1], : frames.shape[2]]


VERSIONS = {
    "identical": lambda frames: frames, "blurred": blur, "recoloured": recolor, "flickered": flicker,
    "shifted": shift,
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """Something that a metric's definition says about two versions, or about one version and a number."""

    metric: str
    version: str
    relation: str
    """"<", ">" or "=" (to within `tolerance`)."""
    other: str | float
    tolerance: float = 0.0

    def __str__(self):
        other = self.other if isinstance(self.other, str) else f"{self.other:g}"
        return f"{self.metric}: {self.version} {self.relation} {other}"

    def holds(self, scores):
        """Whether it is true of {version: {metric: value}}."""
        value, other = scores[self.version][self.metric], self.other
        other = scores[other][self.metric] if isinstance(other, str) else other
        if value is None or other is None:
            return False
        same = abs(value - other) <= self.tolerance
        return {"<": value < other, ">": value > other, "=": same}[self.relation]


def _claims():
    changed = [name for name in VERSIONS if name != "identical"]
    perfect = {
        "psnr": (100, "<"), "ssim": (1, "<"), "lpips_alex": (0, ">"), "lpips_vgg": (0, ">"), "fid": (0, ">"),
        "fvd_styleganv": (0, ">"), "fvd_videogpt": (0, ">"), "sa": (0, ">"), "edmd": (0, ">"),
        "flicker": (0, ">"), "tc_dis": (1, None),
    }  # fmt: skip
    for metric, (best, worse) in perfect.items():
        tolerance = 1e-6 if metric.startswith(("fid", "fvd")) else 0.0
        yield Claim(metric, "identical", "=", best, tolerance)
        yield from (Claim(metric, name, worse, "identical") for name in changed if worse)
    # line art follows shapes, not colours; EDMD counts the pixels by which lines moved
    for metric in ("sa", "edmd"):
        for name in ("recoloured", "flickered"):
            yield Claim(metric, "shifted", ">", name)
    # flicker and temporal consistency see what changes from frame to frame
    for name in changed:
        if name != "flickered":
            yield Claim("flicker", "flickered", ">", name)
            yield Claim("tc_dis", "flickered", ">", name)
    yield Claim("tc_dis", "flickered", ">", 1.0)
    yield Claim("tc_dis", "blurred", "<", 1.0)
    # PSNR counts colours, SSIM structure
    yield Claim("psnr", "recoloured", "<", "flickered")
    yield Claim("ssim", "blurred", "<", "flickered")


CLAIMS = tuple(_claims())


def failed_claims(scores, metrics):
    """The claims about `metrics` that are not true of {version: {metric: value}}."""
    return [claim for claim in CLAIMS if claim.metric in metrics and not claim.holds(scores)]
