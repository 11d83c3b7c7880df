"""Shot cuts, found while the frames stream by.

PySceneDetect's ContentDetector proposes every abrupt change; optical flow decides. What moved, panned or
zoomed can be warped from the frame before, and a new shot cannot; light that changes leaves the edges in
place. On painted frames the content score alone would do, on line art it does not: a fast movement drawn on
threes changes as many pixels as a cut.

A fade to black ends in black frames, which become a shot of their own when the next picture comes abruptly; a
dissolve changes too little from frame to frame to be a cut, so the clip holds both shots.
"""

from collections import deque

import cv2
import numpy as np
from scenedetect import ContentDetector, FrameTimecode

ANALYSIS_SIDE = 256  # pixels of the longer side of the frames that all scores but text are computed on
_ANY_RATE = 24.0  # PySceneDetect asks for frames per second, and uses them only for lengths in seconds
_LEAST_SIDE = 32  # OpenCV's flow crashes on less
_FLOW_BLUR, _FLOW_SMOOTHING = 3.0, 6.0  # Gaussian sigmas in analysis pixels, of the frames and of the flow
_GRADIENT_BLUR = 2.0  # the same, of what is compared


def analysis_frame(frame):
    """[H, W, 3] uint8 -> the same scaled so that the longer side is `ANALYSIS_SIDE`."""
    height, width = frame.shape[:2]
    scale = ANALYSIS_SIDE / max(height, width)
    return resized(frame, max(_LEAST_SIDE, round(height * scale)), max(_LEAST_SIDE, round(width * scale)))


def resized(frame, height, width):
    """[H, W, 3] uint8 -> [height, width, 3], by area where it shrinks.

    Halving first takes a tenth of the time; the last row or column of an odd size is lost by that.
    """
    while frame.shape[0] >= 2 * height and frame.shape[1] >= 2 * width:
        half_height, half_width = frame.shape[0] // 2, frame.shape[1] // 2
        even = frame[: 2 * half_height, : 2 * half_width]
        frame = cv2.resize(even, (half_width, half_height), interpolation=cv2.INTER_AREA)
    grows = frame.shape[0] < height or frame.shape[1] < width
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def label_shots(frames, config):
    """Numbers the shots of a video, `config.flash_frames + config.trim_frames` frames late.

    Args:
        frames: iterator of [H, W, 3] uint8 RGB, all of one size; so many of them are held as it lags behind.
        config: `CurationConfig`.

    Yields:
        (index, shot, frame, analysis frame) in order, without the frames that `config.trim_frames` leaves
        out.
    """
    detector = CutDetector(config)
    delay, trim = config.flash_frames + config.trim_frames, config.trim_frames
    waiting, start, shot = deque(), 0, 0

    def release():
        nonlocal start, shot
        index, *pictures = waiting.popleft()
        if index in detector.cuts:
            start, shot = index, shot + 1
        ends_soon = any(index < cut <= index + trim for cut in detector.cuts)
        trimmed = ends_soon or (shot > 0 and index < start + trim)
        detector.forget(index)
        return [] if trimmed else [(index, shot, *pictures)]

    for index, frame in enumerate(frames):
        small = analysis_frame(frame)
        detector.update(index, small)
        waiting.append((index, frame, small))
        if len(waiting) > delay:
            yield from release()
    while waiting:
        yield from release()


class CutDetector:
    """Cuts so far; one is final when `config.flash_frames` more frames have been seen.

    A flash is a change that is over after `flash_frames` frames or fewer: what was there before is seen
    again, if only faintly, as when white fades away.

    Attributes:
        cuts: {index of a shot's first frame: the analysis frame before it}, in order.
    """

    def __init__(self, config):
        self._proposer = ContentDetector(threshold=config.shot_content, min_scene_len=0)
        self._config, self._before = config, None
        self.cuts = {}

    def update(self, index, frame):
        """Takes analysis frame `index`; all frames must be given, in order."""
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        proposed = self._proposer.process_frame(FrameTimecode(index, _ANY_RATE), bgr)
        flash = self._flash_over(index, frame)
        if flash is not None:
            self.cuts = {cut: before for cut, before in self.cuts.items() if cut < flash}
        elif proposed and not self._continues(self._before, frame):
            self.cuts[index] = self._before
        self._before = frame

    def forget(self, index):
        """Lets go of a cut at or before `index`, which nobody will ask for again."""
        self.cuts = {cut: before for cut, before in self.cuts.items() if cut > index}

    def _continues(self, before, after):
        return continuity(before, after) >= self._config.shot_structure

    def _flash_over(self, index, frame):
        """Where the flash began that ends with `frame`; None where none does."""
        for cut, before in self.cuts.items():
            if index - cut <= self._config.flash_frames and self._continues(before, frame):
                return cut
        return None


def continuity(before, after):
    """How well `after` can be made from `before` by moving its parts and changing its light and colours.

    Args:
        before, after: analysis frames [H, W, 3] uint8 RGB.

    Returns:
        Correlation of the edges, at most 1, after `before` was warped along the optical flow.
    """
    grey, old_grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (after, before))
    flow = _flow().calc(*(cv2.GaussianBlur(image, (0, 0), _FLOW_BLUR) for image in (grey, old_grey)), None)
    # a flow free to follow every line could make nearly any drawing from any other
    flow = cv2.GaussianBlur(flow, (0, 0), _FLOW_SMOOTHING)
    height, width = grey.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    warped = cv2.remap(
        old_grey,
        columns + flow[..., 0],
        rows + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    new = _gradient(grey)  # where the flow fails, the frame as it was may fit
    return max(_correlation(_gradient(old), new) for old in (warped, old_grey))


def _flow():
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # the faster ones lose fast line art


def _gradient(grey):
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), _GRADIENT_BLUR)
    return np.stack([cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)])


def _correlation(a, b):
    """Cosine of two gradient fields; 1 where both are flat."""
    energy_a, energy_b, floor = float((a * a).mean()), float((b * b).mean()), 1e-2
    return (float((a * b).mean()) + floor) / np.sqrt((energy_a + floor) * (energy_b + floor))
