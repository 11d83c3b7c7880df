"""What a precomputed record holds: which frames of a clip, which arrays, in which shard.

Arrays, bfloat16 stored as its bits in uint16; K reference candidates, t h w C those of latents:

    video_mean, video_logvar            [t, h, w, C] as the VAE gives them: the mean not yet multiplied by the
                                        scaling factor, the log-variance not clamped (`models.vae.posterior`)
    sketch                              [t, h, w, C] mode, not yet multiplied by the scaling factor either
    reference_mean, reference_logvar    [K, h, w, C]
    text                                [L, D]
    image_summary, image_features       [K, S] and [K, N, E] of RADIO, as HCE takes them
    window                              [2] int32, first frame and stride of the window in the clip
    reference_frames                    [K] int32, the candidates' frames in the clip
"""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline import records
from data_pipeline.shapes import Bucket

DTYPES = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class PrecomputeConfig:
    """How clips are encoded. Another config makes another set of records."""

    references: int = 2
    """Reference candidates of a clip, at most as many as its bucket has frames; training draws one of them.
    Random frames in the split "train"; in "test" the first is the clip's first frame. At 49x320x512 one
    candidate takes 1.8 MB, all the rest 5 MB."""
    stride: int = 3
    """A window takes every stride-th frame, or as many apart as the clip is long enough for; as
    BucketConfig.stride."""
    sketch: str = "xdog"
    """The extractor of line art."""
    dtype: str = "bfloat16"
    """Of parameters and computation; results are stored in bfloat16."""
    seed: int = 0
    """Of windows and reference candidates, together with the clip's id."""

    def __post_init__(self):
        for field, holds, expected in (
            ("references", self.references >= 1, "1 or more"),
            ("stride", self.stride >= 1, "1 frame or more"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise InputError(f"{getattr(self, field)!r}", where=f"encoded.{field}", expected=expected)

    def candidates(self, bucket):
        """K, the reference candidates of a bucket's clips."""
        return min(self.references, bucket.frames)


class Choice(NamedTuple):
    """Which frames of a clip are encoded: a window, from `start` every `stride`-th, and K references."""

    start: int
    stride: int
    references: list[int]


def choose_frames(clip_id, num_frames, bucket, split, config):
    """The window and the reference candidates of a clip; the same whenever and wherever it is asked.

    Args:
        clip_id: hex digits. num_frames: of the clip. bucket: its Bucket. config: PrecomputeConfig.

    Raises:
        InputError: the clip has fewer frames than its bucket.
    """
    if num_frames < bucket.frames:
        raise InputError(
            f"has {num_frames} frames", where=f"clip {clip_id}", expected=f"{bucket.frames} or more"
        )
    rng = np.random.default_rng([config.seed, int(clip_id, 16)])
    # the very stride that gave the clip its bucket, BucketConfig.window_stride
    stride = 1 if bucket.is_image else min(config.stride, (num_frames - 1) // (bucket.frames - 1))
    start = int(rng.integers(num_frames - (bucket.frames - 1) * stride))
    references = rng.choice(num_frames, config.candidates(bucket), replace=False).tolist()
    if split == "test":
        start, references = 0, [0, *filter(None, references)][: len(references)]
    return Choice(start, stride, references)


def array_specs(bucket, networks, what, config):
    """{name: (shape, dtype)} of the arrays of a bucket's records.

    Args:
        networks: `AnimeColorConfig`. what: of "text", "image", "latents". config: PrecomputeConfig.
    """
    arrays, candidates, bits = {}, config.candidates(bucket), ml_dtypes.bfloat16
    if "text" in what:
        arrays["text"] = (networks.denoiser.text_length, networks.text_encoder.d_model), bits
    if "image" in what:
        radio = networks.image_encoder
        patches = (bucket.height // radio.patch_size) * (bucket.width // radio.patch_size)
        arrays["image_summary"] = (candidates, radio.num_summary_tokens * radio.embed_dim), bits
        arrays["image_features"] = (candidates, patches, radio.embed_dim), bits
    if "latents" in what:
        frames, *rest = (*bucket.latents, networks.vae.latent_channels)
        for name in ("video_mean", "video_logvar", "sketch"):
            arrays[name] = (frames, *rest), bits
        for name in ("reference_mean", "reference_logvar"):
            arrays[name] = (candidates, *rest), bits
        arrays["window"] = (2,), np.int32
    if "image" in what or "latents" in what:
        arrays["reference_frames"] = (candidates,), np.int32
    return arrays


class Shard(NamedTuple):
    """A shard of clips, and the shard of encoded records that belongs to it."""

    bucket: Bucket
    split: str
    index: int
    count: int  # shards of the bucket and split
    numbers: range  # of its records in the split

    @property
    def name(self):
        """Name of the encoded shard below the set's folder."""
        return records.shard_name(records.ENCODED, self.bucket, self.split, self.index, self.count)

    @property
    def folder(self):
        """Where the results of its clips wait."""
        return f"parts-{self.bucket}-{self.split}-{self.index:05d}-of-{self.count:05d}"

    def part(self, number, network):
        """Name of what a network made of record `number` of the split."""
        return f"{self.folder}/{number:08d}-{network}.npz"


def shards_of(clips):
    """All shards of a dataset's clips, in a fixed order.

    Args:
        clips: `records.Records`.
    """
    for bucket in sorted(map(Bucket.parse, clips.info["buckets"])):
        for split, info in clips.builder(bucket).info.splits.items():
            first = 0
            for index, length in enumerate(info.shard_lengths):
                yield Shard(bucket, split, index, len(info.shard_lengths), range(first, first + length))
                first += length
