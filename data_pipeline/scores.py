"""What curation measures on a clip: letterbox, movement, light. Text and looks are measured elsewhere."""

import cv2
import numpy as np

_BLOCK = 8  # analysis pixels; a blink fills a few such blocks
# Re-encoding and film grain change a block's mean by up to 3 levels, less in dark scenes; a blink by 20.
_HELD_SHARE, _HELD_LEVELS = 0.15, (2.0, 6.0)  # of the contrast; limits in levels
_LONGEST_STEP = 0.1  # of the diagonal; what the flow finds beyond is mostly wrong


def movement(frames, fps):
    """How much a clip moves.

    Drawings are held for two or three frames, and slow pans change less from frame to frame than grain does,
    so a frame is compared with the last one that was different, not with the one before.

    Args:
        frames: analysis frames [T, H, W, 3] uint8 RGB.
        fps: frames per second.

    Returns:
        (motion, static_share): mean path of all pixels in percent of the diagonal per second, by OpenCV's DIS
        flow; and the share of the T - 1 steps in [0, 1] that show no new drawing (1 for a single frame).
    """
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    diagonal = np.hypot(*greys[0].shape)
    drawing, path, new_drawings = greys[0], 0.0, 0
    held = np.clip(_HELD_SHARE * np.mean([grey.std() for grey in greys]), *_HELD_LEVELS)
    for grey in greys[1:]:
        if _largest_change(drawing, grey) < held:
            continue
        steps = np.linalg.norm(flow.calc(drawing, grey, None), axis=-1) / diagonal
        path += float(np.minimum(steps, _LONGEST_STEP).mean())
        drawing, new_drawings = grey, new_drawings + 1
    steps = len(greys) - 1
    if not steps:
        return 0.0, 1.0
    return 100 * path * fps / steps, 1 - new_drawings / steps


def _largest_change(before, after):
    """Mean difference of the block that changed most, in levels."""
    height, width = after.shape
    size = width // _BLOCK, height // _BLOCK
    return cv2.resize(cv2.absdiff(before, after), size, interpolation=cv2.INTER_AREA).max()


def light(frames):
    """(brightness, contrast) of frames [T, H, W, 3] uint8 RGB: mean and standard deviation of luma in levels.

    Both are averaged over the frames; the deviation is that inside a frame.
    """
    moments = [cv2.meanStdDev(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in frames]
    mean, deviation = np.mean(moments, axis=0).ravel()
    return float(mean), float(deviation)


class Letterbox:
    """Finds bars at top and bottom, and at left and right: both of one colour and size, and always there.

    A bar ends in a straight line with a picture behind it. That tells it from a dark scene, whose border is
    ragged, and from the paper around a drawing, of which only the lines differ. Bars at one side only are
    left alone: a flat sky or floor looks the same.
    """

    LEVELS = 20  # a pixel further from the bar's colour than this in any channel belongs to the picture
    STRAY_SHARE = 0.01  # of a bar's row that may
    PICTURE_SHARE = 0.5  # of the rows behind a bar that must, on average over the frames
    LOPSIDED_SHARE = 0.02  # of the frame's side, by which opposite bars may differ
    BAND_SHARE = 0.02  # of the frame's side: the rows behind a bar that are looked at
    LEAST_SHARE = 0.25  # of the frame's side that is left; what would leave less is no bar

    def __init__(self):
        self._shares = {0: [], 1: []}  # by axis: of every row (0) or column (1), the pixels unlike the border
        self._shape = None

    def add(self, frame):
        """Takes a frame [H, W, 3] uint8 RGB; some frames of a clip are enough."""
        self._shape = frame.shape[:2]
        for axis, shares in list(self._shares.items()):
            share = self._unlike_border(frame if axis == 0 else frame.swapaxes(0, 1))
            if share is None:
                del self._shares[axis]  # no bars here, for the whole clip
            else:
                shares.append(share)

    def _unlike_border(self, frame):
        """Share of pixels of each row that differ from the first and last; None unless these two are flat and
        alike."""
        border = np.concatenate([frame[0], frame[-1]])
        color = np.median(border, axis=0)
        if self._differs(border, color).mean() > self.STRAY_SHARE:
            return None
        return self._differs(frame, color).mean(axis=1)

    def _differs(self, pixels, color):
        low, high = np.clip(color - self.LEVELS, 0, 255), np.clip(color + self.LEVELS, 0, 255)
        inside = cv2.inRange(pixels.reshape(-1, 1, 3), low, high)
        return inside.reshape(pixels.shape[:-1]) == 0

    def box(self):
        """(top, left, height, width) in pixels of what is inside the bars; all of the frame if there are
        none."""
        height, width = self._shape
        runs = {axis: self._runs(np.stack(shares)) for axis, shares in self._shares.items()}
        (top, bottom), (left, right) = runs.get(0, (0, 0)), runs.get(1, (0, 0))
        # a row behind the upper bar is as wide as the picture, which may stand between bars too
        rows = self._edges(0, (top, bottom), (width - left - right) / width)
        columns = self._edges(1, (left, right), (height - sum(rows)) / height)
        return rows[0], columns[0], height - sum(rows), width - sum(columns)

    def _runs(self, shares):
        """Sizes of the two bars [frames, rows] -> (first, last); (0, 0) if they cannot be bars."""
        picture = np.flatnonzero(shares.max(axis=0) > self.STRAY_SHARE)
        rows = shares.shape[1]
        if not len(picture) or picture[-1] - picture[0] + 1 < self.LEAST_SHARE * rows:
            return 0, 0
        first, last = int(picture[0]), int(rows - 1 - picture[-1])
        lopsided = abs(first - last) > max(4, self.LOPSIDED_SHARE * rows)
        return (0, 0) if lopsided or not first or not last else (first, last)

    def _edges(self, axis, bars, visible):
        """The sizes of two bars to the pixel; (0, 0) where no picture is right behind them."""
        if bars == (0, 0):
            return 0, 0
        typical, edges = np.mean(self._shares[axis], axis=0), []
        band = max(5, round(self.BAND_SHARE * len(typical)))
        for size, rows in zip(bars, (typical, typical[::-1]), strict=True):
            behind = rows[size : size + band]
            level = np.median(behind)
            if level < self.PICTURE_SHARE * visible:
                return 0, 0
            # compression blurs the edge: it is where half the picture is there
            edges.append(size + int(np.argmax(behind >= level / 2)))
        return tuple(edges)


def crop(frames, box, size):
    """Frames [..., H, W, 3] of any scale cut to `box` (top, left, height, width), which is in pixels of
    `size`.

    Args:
        size: (height, width) of the frames that the box was found in.
    """
    height, width = frames.shape[-3:-1]
    scale_y, scale_x = height / size[0], width / size[1]
    top, bottom = np.ceil(box[0] * scale_y), np.floor((box[0] + box[2]) * scale_y)
    left, right = np.ceil(box[1] * scale_x), np.floor((box[1] + box[3]) * scale_x)
    return frames[..., int(top) : int(bottom), int(left) : int(right), :]
