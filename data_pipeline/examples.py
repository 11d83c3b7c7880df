"""Rows of batches as NumPy arrays, each from its records alone: what the workers run."""

import io

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.schedule import row_rng, step_rng
from data_pipeline.shapes import latent_frames
from data_pipeline.sketch import extractor
from data_pipeline.sketch_augment import SketchMix
from data_pipeline.views import View, describe, draw_candidates, draw_length, draw_view, read_view

# Precomputed arrays with an axis of latent frames, and with one of reference candidates.
OF_FRAMES = ("video_mean", "video_logvar", "sketch")
OF_REFERENCES = ("reference_mean", "reference_logvar", "image_summary", "image_features")
EMPTY_TEXT = "empty_text.npy"  # beside the records: what the text encoder makes of "", as `text` is stored


class Examples:
    """The rows that one host reads, in the order of steps; picklable.

    `examples(n * step + i)` is the i-th of the host's n rows at `step`: {name: array, or str for `id` and
    `caption`}, as `dataset.Batches` describes them, without the batch axis; bfloat16 still as bits in uint16.

    Raises:
        InputError: when made, the precomputed records do not fit the clips or `config`; when called, a record
            is damaged or of another bucket or clip.
    """

    def __init__(self, clips, encoded, config, schedule, rows):
        """
        Args:
            clips: Records with encoded video.
            encoded: Records of what was precomputed, or None.
            config: dataset.DataConfig.
            schedule: TrainingSchedule or EvaluationSchedule.
            rows: numbers of this host's rows of the global batch.
        """
        self.clips, self.encoded, self.config = clips, encoded, config
        self.schedule, self.rows = schedule, rows
        self._sources = {}
        bucket = schedule.counts[0][0]
        self.arrays = frozenset(encoded.builder(bucket).info.features if encoded else ())
        self.has_latents = "video_mean" in self.arrays
        self.empty_text = None
        if "reference_frames" in self.arrays:
            _require_possible(config, encoded, self.has_latents)
        if "text" in self.arrays and config.view.text_dropout > 0:
            self.empty_text = _read_empty_text(encoded)

    def __getstate__(self):
        return {**self.__dict__, "_sources": {}}  # every worker opens its own files

    def __call__(self, number):
        step, place = divmod(number, len(self.rows))
        row = self.rows[place]
        batch = self.schedule.batch(step)
        length = draw_length(self.config.view, batch.bucket, step_rng(self.config.seed, step))
        index, rng = int(batch.clips[row]), row_rng(self.config.seed, step, row)
        # Drawn first and always: no other setting changes which rows lose their caption or are mirrored.
        drops_text = rng.random() < self.config.view.text_dropout
        flips = rng.random() < self.config.view.flip

        encoded = self._record(self.encoded, batch.bucket, index) if self.encoded else None
        clip = None if self.has_latents else self._record(self.clips, batch.bucket, index)
        if encoded and clip and encoded["id"] != clip["id"]:
            raise InputError(
                f"record {index} of {batch.bucket} is of clip {encoded['id']}, not {clip['id']}",
                where=self.encoded.storage,
                expected="one record for every clip, in the same order",
                fix="precompute again",
            )
        view, candidates = self._draw_view(clip, encoded, batch.bucket, length, rng)
        example = {"frame_numbers": view.frames, "reference_numbers": view.references}
        if clip:
            example |= self._pixels(clip, view, batch.bucket, flips, rng)
        for name in self.arrays.intersection(OF_FRAMES):
            example[name] = encoded[name][: latent_frames(length)]
        for name in self.arrays.intersection(OF_REFERENCES):
            example[name] = encoded[name][candidates]
        if "text" in self.arrays:
            example["text"] = self.empty_text if drops_text else encoded["text"]
        record = clip or encoded
        return {
            **example,
            "id": record["id"],
            "caption": "" if drops_text else record["caption"],
            "fps": np.float32(record["fps"]),
            "valid": batch.valid[row],
        }

    def _draw_view(self, clip, encoded, bucket, length, rng):
        """(View, which of the precomputed references it has or None)."""
        config = self.config.view
        if self.has_latents:
            start, stride = encoded["window"]
            view = View(np.int32(start + stride * np.arange(length)), references=None)
        elif clip["frames"] < bucket.frames:
            raise InputError(
                f"has {clip['frames']} frames", where=describe(clip), expected=f"those of bucket {bucket}"
            )
        else:
            view = draw_view(config, clip["frames"], length, rng)
        if "reference_frames" not in self.arrays:
            return view, None
        candidates = draw_candidates(config, len(encoded["reference_frames"]), rng)
        references = encoded["reference_frames"][candidates]
        if config.reference == "first" and references[0] != view.frames[0]:
            raise InputError(
                f"clip {encoded['id']} has frame {references[0]} as its first reference",
                where=self.encoded.storage,
                expected=f"the first frame of the window, {view.frames[0]}, as in split 'test'",
                fix="set view.reference to any",
            )
        return view._replace(references=references), candidates

    def _pixels(self, clip, view, bucket, flips, rng):
        video, reference = read_view(clip, view, flips)
        if video.shape[1:3] != bucket.size:
            raise InputError(
                f"has frames of {video.shape[1:3]}",
                where=describe(clip),
                expected=f"those of bucket {bucket}",
            )
        pixels = {"video": video, "reference": reference}
        if self.config.sketch is not None:
            pixels["sketch"] = self.config.sketch.draw(rng)(video)
        return pixels

    def _record(self, records, bucket, index):
        key = records.dataset, bucket
        if key not in self._sources:
            self._sources[key] = records.source(bucket, self.config.split)
        try:
            record = self._sources[key][index]
        except RuntimeError as error:  # how the reader says that a checksum is wrong
            raise InputError(
                f"record {index} of {bucket} ({self.config.split}) is damaged: {error}",
                where=records.storage,
                expected="shards as they were written",
                fix="copy the dataset again, or prepare it again",
            ) from error
        record = {
            name: value.decode() if isinstance(value, bytes) and name != "video" else value
            for name, value in record.items()
        }
        if record["bucket"] != str(bucket):
            raise InputError(
                f"{records.dataset} record {record['id']} is of bucket {record['bucket']}",
                where=records.storage,
                expected=str(bucket),
            )
        return record


def _require_possible(config, encoded, has_latents):
    """InputError where `config` asks for what precomputed latents, or references, do not have."""
    made, view = encoded.info["config"], config.view
    checks = [
        ("view.reference", view.reference, view.reference != "outside", "any, or first in the split test"),
        ("view.flip", view.flip, view.flip == 0, "0"),  # image features cannot be mirrored either
    ]
    if has_latents:
        sketches = None, SketchMix((extractor(made["sketch"]),))
        checks += [
            ("view.strides", view.strides, view.strides == (made["stride"],), f"only {made['stride']}"),
            ("sketch", config.sketch, config.sketch in sketches, f"only {made['sketch']}, in its own style"),
        ]
    for where, value, good, expected in checks:
        if not good:
            raise InputError(
                f"{value} with what was precomputed",
                where=where,
                expected=expected,
                fix="precompute in another way, or train from the clips",
            )


def _read_empty_text(encoded):
    if not encoded.storage.exists(EMPTY_TEXT):
        raise InputError(
            f"has no {EMPTY_TEXT}, which stands for the captions that text dropout leaves out",
            where=encoded.storage,
            expected="the output of the text encoder for an empty caption",
            fix="precompute the text again, or set view.text_dropout to 0",
        )
    return np.load(io.BytesIO(encoded.storage.read(EMPTY_TEXT)), allow_pickle=False)
