"""Is there writing in the picture: subtitles, credits, signs in front of the drawing.

`text_score` is built in and needs no weights to be downloaded: strokes that stand out from what is around
them are joined into rows, and a small fitted network says how much each row looks like a line of text.
`ModelTextDetector` asks a network of the user's instead.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.sparse.csgraph import connected_components

from animecolor_jax.errors import InputError
from data_pipeline.local_models import import_torch, load_model, load_processor, read_config
from data_pipeline.text_row_weights import BIAS, HIDDEN_BIAS, HIDDEN_WEIGHTS, MEAN, SCALE, WEIGHTS

TEXT_THRESHOLD = 0.5
"""Scores from here on count as text; see `text_score`."""

MIN_HEIGHT, MAX_HEIGHT = 200, 300  # frames are brought to a height in this range
CONTRAST = 44  # levels by which a stroke must stand out from what is around it
STROKE = 0.036  # widest stroke, as a share of the frame's height
MIN_GLYPH, MAX_GLYPH = 0.013, 0.13  # heights of a glyph, as a share of the frame's
MAX_GLYPHS = 300  # of one frame and map, the largest first: bounds the time on busy pictures
FEATURES = (
    "length", "height", "height_spread", "bottom_spread", "top_spread", "gap", "place",
    "width_spread", "widest", "density", "density_spread", "outline", "outline_spread",
    "stroke", "strokes", "cover", "fill_spread", "fill_variation", "fill_chroma",
    "ring_spread", "ring_variation", "ring_lightness", "ring_chroma", "ring_contrast",
    "motion_inside", "motion_around",
)  # fmt: skip


def text_score(frames):
    """How surely a clip shows text.

    Args:
        frames: [K, H, W, 3] uint8 RGB, K >= 1 frames spread over the clip; the analysis size of curation
            (270 x 480) is plenty, and writing should be at least 7 pixels high.

    Returns:
        Float in [0, 1], higher is surer: the mean, over the third of the frames where it is highest, of
        the score of the most text-like row. TEXT_THRESHOLD keeps false alarms on drawn clips below 5 %.

    Raises:
        InputError: frames of another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise InputError(
            f"{list(frames.shape)} {frames.dtype}", where="frames", expected="[K, H, W, 3] uint8"
        )
    frames = [_at_working_size(frame) for frame in frames]
    others = frames[1:] + frames[-2:-1] if len(frames) > 1 else frames
    best = [_score(text_rows(*pair)[1]).max(initial=0.0) for pair in zip(frames, others, strict=True)]
    return _surest_third(best)


def _surest_third(scores):
    """Mean of the highest third: writing need not show all the time."""
    return float(np.mean(sorted(scores)[-((len(scores) + 2) // 3) :]))


def _at_working_size(frame):
    height = frame.shape[0]
    if height > MAX_HEIGHT:
        scale, interpolation = (MAX_HEIGHT - 12) / height, cv2.INTER_AREA
    elif height < MIN_HEIGHT:
        scale, interpolation = np.ceil(MIN_HEIGHT / height), cv2.INTER_CUBIC
    else:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=interpolation)


def _score(features):
    """Rows' features [N, F] -> [N] in [0, 1]."""
    inputs = np.clip((features - MEAN) / SCALE, -4, 4)
    hidden = np.tanh(inputs @ HIDDEN_WEIGHTS + HIDDEN_BIAS)
    return 1 / (1 + np.exp(-(hidden @ WEIGHTS + BIAS)))


def text_rows(frame, other):
    """Rows of strokes of equal height and colour.

    Args:
        frame: [H, W, 3] uint8 RGB.
        other: the frame after or before it, to tell what moves.

    Returns:
        (boxes [N, 4] as left, top, right, bottom in pixels, features [N, F] in the order of FEATURES).
    """
    red, green, blue = cv2.split(frame)
    lowest = cv2.min(cv2.min(red, green), blue)  # tells white, but also yellow, from the colours around it
    lab = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    moved = cv2.absdiff(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.cvtColor(other, cv2.COLOR_RGB2GRAY))
    size = max(5, round(frame.shape[0] * STROKE) | 1)
    square = np.ones((size, size), np.uint8)
    maps = (
        cv2.morphologyEx(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.MORPH_TOPHAT, square),
        cv2.morphologyEx(lowest, cv2.MORPH_TOPHAT, square),
        cv2.morphologyEx(lowest, cv2.MORPH_BLACKHAT, square),
    )
    boxes, features = zip(*(_rows_of_map(hat, lab, moved.reshape(-1)) for hat in maps), strict=True)
    return np.concatenate(boxes), np.concatenate(features)


def _rows_of_map(hat, lab, moved):
    """Rows among the strokes of one map: `hat` [H, W] is by how much each pixel stands out."""
    height, width = hat.shape
    strokes = cv2.threshold(hat, CONTRAST, 1, cv2.THRESH_BINARY)[1]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(strokes, connectivity=4, ltype=cv2.CV_16U)
    glyphs, labels = _glyphs(stats, labels, height, width)
    if not len(glyphs):
        return np.zeros((0, 4)), np.zeros((0, len(FEATURES)))
    x, y, w, h, area = glyphs.T
    count = len(glyphs)

    # What each glyph is made of, and a ring around it that leaves out the blurred edge.
    near = cv2.dilate(labels, np.ones((3, 3), np.uint8))
    far = cv2.dilate(labels, np.ones((5, 5), np.uint8))
    inside = np.flatnonzero(labels)
    ring = np.flatnonzero((far > 0) & (near == 0) & (strokes == 0))
    owner, ring_owner = labels.reshape(-1)[inside].astype(int) - 1, far.reshape(-1)[ring].astype(int) - 1
    weight = hat.reshape(-1)[inside].astype(float) ** 2  # the core of a stroke counts more than its edge
    fill, fill_variance = _color(lab[inside], owner, weight, count)
    around, around_variance = _color(lab[ring], ring_owner, np.ones(len(ring)), count)
    motion_inside = _mean(moved[inside], owner, np.ones(len(inside)), count)
    motion_around = _mean(moved[ring], ring_owner, np.ones(len(ring)), count)
    runs_x = np.bincount(owner, _starts(labels, 1).reshape(-1)[inside], count)
    runs_y = np.bincount(owner, _starts(labels, 0).reshape(-1)[inside], count)
    stroke = area / np.maximum(runs_x, runs_y)
    edge = near.reshape(-1)[np.flatnonzero((near > 0) & (labels == 0))].astype(int) - 1
    outline, density = np.bincount(edge, minlength=count) / np.sqrt(area), area / (w * h)

    row = _join(x, y, w, h, fill)
    rows = row.max() + 1
    members = np.bincount(row, minlength=rows)

    def total(values):
        return np.bincount(row, values, rows)

    def mean(values):
        return total(values) / members

    def spread(values):
        return np.sqrt(np.maximum(mean(values**2) - mean(values) ** 2, 0))

    def color_spread(colors):
        return np.log1p(np.sqrt(sum(spread(channel) ** 2 for channel in colors.T)))

    left, top, right, bottom = (
        _extreme(function, values, row, rows)
        for function, values in ((np.minimum, x), (np.minimum, y), (np.maximum, x + w), (np.maximum, y + h))
    )
    tall, long = total(h**2) / total(h), right - left
    fill_row, around_row = (np.stack([mean(channel) for channel in colors.T], 1) for colors in (fill, around))
    gaps = (long - total(w)) / np.maximum(members - 1, 1)
    # fmt: off
    features = np.stack([
        np.log(long / tall), np.log(tall / height), spread(h) / tall, spread(y + h) / tall, spread(y) / tall,
        gaps / tall, (top + bottom) / 2 / height,
        spread(w) / mean(w), np.log(_extreme(np.maximum, w, row, rows) / tall),
        mean(density), spread(density), mean(outline), spread(outline),
        np.log(mean(stroke) / tall), np.log(total(runs_x) / long), np.log(total(area) / (long * tall)),
        color_spread(fill), np.log1p(np.sqrt(mean(fill_variance))), _chroma(fill_row),
        color_spread(around), np.log1p(np.sqrt(mean(around_variance))),
        around_row[:, 0] / 255, _chroma(around_row), np.log1p(np.linalg.norm(fill_row - around_row, axis=1)),
        np.log1p(mean(motion_inside)), np.log1p(mean(motion_around)),
    ], 1)
    # fmt: on
    kept = (long >= 1.2 * tall) & ((members >= 3) | (long >= 2.2 * tall))
    return np.stack([left, top, right, bottom], 1)[kept], features[kept]


def _glyphs(stats, labels, height, width):
    """Components of a glyph's size that have a neighbour: stats [N, 5], and labels 1 ... N, 0 elsewhere."""
    x, y, w, h, area = stats.T.astype(float)
    fits = (h >= max(4, MIN_GLYPH * height)) & (h <= MAX_GLYPH * height) & (w <= 0.35 * width) & (area >= 6)
    fits[0] = False  # what is no stroke
    chosen = np.flatnonzero(fits)
    chosen = chosen[np.argsort(-area[chosen], kind="stable")[:MAX_GLYPHS]]
    near = _neighbours(*(values[chosen] for values in (x, y, w, h)))
    np.fill_diagonal(near, False)
    chosen = chosen[near.any(1) | (w[chosen] >= 2.2 * h[chosen])]
    renumber = np.zeros(len(stats), np.uint16)
    renumber[chosen] = np.arange(1, len(chosen) + 1)
    return stats[chosen].astype(float), renumber[labels]


def _neighbours(x, y, w, h):
    """[N, N] bool: side by side, of similar height, with less than a letter's gap between."""
    x, y, w, h = (values[:, None] for values in (x, y, w, h))
    low, high = np.minimum(h, h.T), np.maximum(h, h.T)
    overlap = np.minimum(y + h, (y + h).T) - np.maximum(y, y.T)
    gap = np.maximum(x, x.T) - np.minimum(x + w, (x + w).T)
    beside = (gap < 0.9 * high) & (gap > -0.5 * np.minimum(w, w.T))
    return (low > 0.42 * high) & (overlap > 0.5 * low) & beside


def _join(x, y, w, h, fill):
    """The row [N] int of each glyph: neighbours of one colour, and their neighbours."""
    same_color = np.abs(fill[:, None] - fill[None]).max(2) < 35
    return connected_components(_neighbours(x, y, w, h) & same_color, directed=False)[1].astype(int)


def _mean(values, owner, weight, count):
    return np.bincount(owner, values * weight, count) / np.maximum(np.bincount(owner, weight, count), 1e-9)


def _color(pixels, owner, weight, count):
    """Mean Lab colour [count, 3] and summed variance [count] of each owner's pixels."""
    channels = pixels.astype(float).T
    mean = np.stack([_mean(channel, owner, weight, count) for channel in channels], 1)
    square = sum(_mean(channel**2, owner, weight, count) for channel in channels)
    return mean, np.maximum(square - (mean**2).sum(1), 0)


def _chroma(lab):
    return np.hypot(lab[:, 1] - 128, lab[:, 2] - 128) / 100


def _starts(labels, axis):
    """[H, W] bool: labelled pixels whose neighbour before them along `axis` is not."""
    before = np.zeros_like(labels)
    if axis:
        before[:, 1:] = labels[:, :-1]
    else:
        before[1:] = labels[:-1]
    return before == 0


def _extreme(function, values, row, rows):
    result = np.full(rows, -np.inf if function is np.maximum else np.inf)
    function.at(result, row, values)
    return result


# ---------------------------------------------------------------- a network of the user's


class ModelTextDetector:
    """A text detector in transformers format: frames [K, H, W, 3] uint8 RGB -> score in [0, 1].

    Two kinds are known: PP-OCR detectors (`pp_ocrv5_mobile_det` and the like), which give a map of where
    text is, and object detectors (DETR, YOLOS, RT-DETR ...) that have a label with "text" in its name. The
    score of a frame is that of its surest text, of a clip the mean over the third of its frames where that is
    highest. It runs in this process, on the GPU where torch sees one, in float32.

    Args:
        model_dir: config.json, preprocessor_config.json and the weights in safetensors.
        batch_size: how many frames go through the network at once.

    Raises:
        InputError: the directory is incomplete, or holds another kind of network.
    Source: PP-OCR's map: DB (arXiv 1911.08947), thresholds as there.
    """

    def __init__(self, model_dir, batch_size=8):
        config = read_config(model_dir, ("config.json", "preprocessor_config.json"))
        kind = config.get("model_type") or ""
        torch, transformers = import_torch()
        detectors = transformers.AutoModelForObjectDetection
        if kind not in {known.model_type for known in detectors._model_mapping}:
            raise InputError(
                f"has the model_type {kind!r}",
                where=Path(model_dir) / "config.json",
                expected="a PP-OCR text detector, or an object detector such as detr, yolos or rt_detr",
            )
        self.batch_size = batch_size
        self._torch = torch
        if kind.startswith("pp_ocr"):
            self._frame_scores, self._prepare = self._map_scores, _PaddlePreparation(model_dir)
        else:
            self._frame_scores = self._box_scores
            self._labels = _text_labels(config, model_dir)
            self._prepare = load_processor(transformers.AutoImageProcessor, model_dir, backend="pil")
        self._model, self._device = load_model(detectors, model_dir, dtype=torch.float32)

    def __call__(self, frames):
        """Frames [K, H, W, 3] uint8 RGB, K >= 1 -> score (float), higher is surer."""
        scores = []
        with self._torch.inference_mode():
            for start in range(0, len(frames), self.batch_size):
                scores += self._frame_scores(list(frames[start : start + self.batch_size]))
        return _surest_third(scores)

    def _map_scores(self, frames):
        """The surest region of each frame's map of probabilities."""
        pixels = self._torch.from_numpy(np.stack([self._prepare(frame) for frame in frames]))
        maps = self._model(pixel_values=pixels.to(self._device)).last_hidden_state[:, 0]  # [B, H, W]
        return [surest_region(probability) for probability in maps.float().cpu().numpy()]

    def _box_scores(self, frames):
        """The surest box of each frame that has a text label."""
        inputs = self._prepare(frames, return_tensors="pt", input_data_format="channels_last")
        found = self._model(**inputs.to(self._device))
        sizes = [frame.shape[:2] for frame in frames]
        boxes = self._prepare.post_process_object_detection(found, threshold=0.0, target_sizes=sizes)
        scores = []
        for box in boxes:
            is_text = np.isin(box["labels"].cpu().numpy(), self._labels)
            scores.append(box["scores"].cpu().numpy()[is_text].max(initial=0.0))
        return scores


def surest_region(probability):
    """The highest mean of a map [H, W] float32 in [0, 1] over a region above 0.3, 3 or more pixels thick."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((probability > 0.3).astype(np.uint8))
    total = np.bincount(labels.ravel(), probability.ravel(), len(stats))
    thick = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].min(1) >= 3
    thick[0] = False  # the background
    return float((total[thick] / stats[thick, cv2.CC_STAT_AREA]).max(initial=0.0))


class _PaddlePreparation:
    """What a PP-OCR detector wants to see, after its preprocessor_config.json.

    transformers has this on torchvision only. Sides become multiples of 32, the longer one at most
    `limit_side_len` (`limit_type` "max"); the channels are blue, green, red.
    """

    def __init__(self, model_dir):
        path = Path(model_dir) / "preprocessor_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        self.limit, kind = config.get("limit_side_len", 960), config.get("limit_type", "max")
        if kind != "max":
            raise InputError(f"limit_type is {kind!r}", where=path, expected="'max'")
        # In the file's order: of red, green, blue, before the channels are turned round.
        self.mean = np.array(config.get("image_mean", (0.406, 0.456, 0.485)), np.float32)
        self.std = np.array(config.get("image_std", (0.225, 0.224, 0.229)), np.float32)

    def __call__(self, frame):
        """[H, W, 3] uint8 RGB -> [3, H', W'] float32."""
        scale = min(1.0, self.limit / max(frame.shape[:2]))
        height, width = (max(32, 32 * round(int(side * scale) / 32)) for side in frame.shape[:2])
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1))


def _text_labels(config, model_dir):
    names = {int(index): str(name) for index, name in config.get("id2label", {}).items()}
    labels = [index for index, name in names.items() if "text" in name.lower()]
    if not labels:
        raise InputError(
            f"its labels are {', '.join(list(names.values())[:5]) or 'not named'}",
            where=Path(model_dir) / "config.json",
            expected="a label with 'text' in its name (id2label)",
        )
    return labels
