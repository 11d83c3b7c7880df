"""Small datasets on disk whose pixels and arrays say which clip and frame they are."""

import io

import ml_dtypes
import numpy as np

from data_pipeline import records
from data_pipeline.clip_video import ClipEncoding, encode, encode_image
from data_pipeline.shapes import Bucket
from data_pipeline.storage import Storage

WIDE, LONG, IMAGE = Bucket(9, 32, 48), Bucket(17, 32, 32), Bucket(1, 32, 32)
CLIPS = {WIDE: {"train": 9, "test": 3}, LONG: {"train": 4, "test": 1}, IMAGE: {"train": 3, "test": 0}}
CANDIDATE_FRAMES = [0, 2, 5, 8]  # references of a precomputed record
CANDIDATES = len(CANDIDATE_FRAMES)
TEXT_SHAPE = (6, 8)


def draw_frame(bucket, number):
    """[H, W, 3] uint8: a grey that tells the frame's number, and a dark square at the left."""
    frame = np.full((*bucket.size, 3), 60 + 3 * number, np.uint8)
    frame[8:16, 4:12] = 10
    return frame


def frame_numbers(video):
    """[..., H, W, 3] of `draw_frame`, mirrored or not, compressed -> [...] int."""
    grey = video[..., 24:, :, :].mean((-3, -2, -1))
    return np.rint((grey - 60) / 3).astype(int)


def clip_id(bucket, split, index):
    return f"{bucket}-{split}-{index}"


def clip_length(bucket, index):
    return 1 if bucket.is_image else bucket.frames + 11 * index % 40


def write_clips(path, clips=CLIPS):
    """A finished dataset; returns its Records."""
    serialize = records.Serializer(records.clip_features())

    def example(bucket, split, index):
        length = clip_length(bucket, index)
        frames = [draw_frame(bucket, number) for number in range(length)]
        video = (
            encode_image(frames[0]) if bucket.is_image else encode(frames, 24, ClipEncoding(preset="fast"))
        )
        return serialize(
            {
                "id": clip_id(bucket, split, index),
                "source": f"{split}.mp4",
                "start": 0,
                "end": length,
                "fps": 24.0,
                "caption": f"caption of {clip_id(bucket, split, index)}",
                "bucket": str(bucket),
                "frames": length,
                "video": video,
            }
        )

    storage = Storage(path)
    _write(storage, records.CLIPS, records.clip_features(), clips, example)
    records.close(storage, records.CLOSING, {"digest": "clips", "buckets": _names(clips)})
    return records.open_clips(path)


def write_encoded(path, groups=("latents", "text", "image"), clips=CLIPS, name_of=clip_id):
    """Precomputed records below a dataset; returns its Records. Every latent frame, reference candidate and
    text is filled with its number."""
    bf16 = ml_dtypes.bfloat16

    def arrays(bucket, split, index):
        frames, height, width = bucket.latents
        rising = np.arange(frames, dtype=bf16).reshape(-1, 1, 1, 1) * np.ones((1, height, width, 16), bf16)
        candidates = np.arange(CANDIDATES, dtype=bf16)
        chosen = candidates.reshape(-1, 1, 1, 1) * np.ones((height, width, 16), bf16)
        named = {}
        if "latents" in groups:
            named |= {"video_mean": rising, "video_logvar": -rising, "sketch": rising + bf16(100)}
            named |= {"reference_mean": chosen, "reference_logvar": -chosen}
            named |= {"window": np.int32([0 if split == "test" else 1, 3])}
        if "text" in groups:
            named |= {"text": np.full(TEXT_SHAPE, index + 1, bf16)}
        if "image" in groups:
            named |= {"image_summary": candidates[:, None] * np.ones((1, 5), bf16)}
            named |= {"image_features": candidates[:, None, None] * np.ones((1, 3, 5), bf16)}
        if set(groups) & {"latents", "image"}:
            named |= {"reference_frames": np.int32(CANDIDATE_FRAMES)}
        return named

    def example(bucket, split, index):
        named = arrays(bucket, split, index)
        features = records.encoded_features({name: (a.shape, a.dtype) for name, a in named.items()})
        return records.Serializer(features)(
            {
                "id": name_of(bucket, split, index),
                "source": f"{split}.mp4",
                "fps": 24.0,
                "caption": f"caption of {clip_id(bucket, split, index)}",
                "bucket": str(bucket),
                "weights": "{}",
                **{name: a if a.dtype == np.int32 else a.view(np.uint16) for name, a in named.items()},
            }
        )

    storage = Storage(path) / "encoded" / "one"
    for bucket, splits in clips.items():
        shapes = {name: (a.shape, a.dtype) for name, a in arrays(bucket, "", 0).items()}
        _write(storage, records.ENCODED, records.encoded_features(shapes), {bucket: splits}, example)
    if "text" in groups:
        file = io.BytesIO()
        np.save(file, np.zeros(TEXT_SHAPE, np.uint16))
        storage.write("empty_text.npy", file.getvalue())
    info = {"digest": "encoded", "buckets": _names(clips), "clips": "clips", "weights": {}}
    info |= {"what": list(groups), "config": {"stride": 3, "sketch": "xdog"}}
    records.close(storage, records.ENCODED_CLOSING, info)
    return records.open_encoded(path, {})


def _write(storage, dataset, features, clips, example):
    for bucket, splits in clips.items():
        written = {}
        for split, count in splits.items():
            name = records.shard_name(dataset, bucket, split, 0, 1)
            size = records.write_shard(storage, name, [example(bucket, split, n) for n in range(count)])
            written[split] = [count], size
        records.write_metadata(storage, dataset, bucket, features, written)


def _names(clips):
    return {str(bucket): splits for bucket, splits in clips.items()}
