"""What is on disk: TFDS datasets of ArrayRecord shards, one builder config per bucket, without TensorFlow.

    DATASET/dataset.json                                       closing metadata; refused without it
    DATASET/clips.parquet                                      every clip found, its scores, kept or why not
    DATASET/animecolor/49x320x512/1.0.0/                       records with encoded video (`clip_features`)
    DATASET/encoded/NAME/encoded.json, index.json              closing metadata and ids of a precomputed set
    DATASET/encoded/NAME/animecolor_encoded/49x320x512/1.0.0/  records with latents (`encoded_features`)
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from animecolor_jax.errors import InputError
from data_pipeline.shapes import Bucket
from data_pipeline.storage import Storage

FORMAT_VERSION = 1
VERSION = "1.0.0"  # of the TFDS builders
SPLITS = ("train", "test")
CLIPS, ENCODED = "animecolor", "animecolor_encoded"  # names of the TFDS datasets
CLOSING, ENCODED_CLOSING = "dataset.json", "encoded.json"


def clip_features():
    """TFDS features of a record with encoded video.

    id (32 hex digits: hash of the source's contents, the frames, crop, bucket and encoder settings), source
    (path below the folder of videos), start and end (frames of the source), fps, caption, bucket, frames (how
    many `video` holds, all those of the clip), video (MP4 of the bucket's height and width; PNG of an image).
    """
    text, integer = tfds.features.Text, np.int64
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "source": text(),
            "start": integer,
            "end": integer,
            "fps": np.float32,
            "caption": text(),
            "bucket": text(),
            "frames": integer,
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
        }
    )


def encoded_features(arrays):
    """TFDS features of a record with what the networks made of a clip.

    Args:
        arrays: {name: (shape, dtype)} of the arrays; bfloat16 is stored as its bits in uint16.
    """
    text = tfds.features.Text
    features = {
        "id": text(),
        "source": text(),
        "fps": np.float32,
        "caption": text(),
        "bucket": text(),
        "weights": text(),  # JSON {component: hash of the weights that made the arrays}
    }
    for name, (shape, dtype) in arrays.items():
        stored = np.uint16 if np.dtype(dtype).name == "bfloat16" else dtype
        features[name] = tfds.features.Tensor(
            shape=tuple(shape), dtype=stored, encoding=tfds.features.Encoding.BYTES if shape else "none"
        )
    return tfds.features.FeaturesDict(features)


class Serializer:
    """Records of given features as bytes of a tf.train.Example."""

    def __init__(self, features):
        self.features = features
        self._serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def __call__(self, record):
        """Bytes of {name: value}; ValueError from TFDS where a value does not fit its feature."""
        return self._serializer.serialize_example(self.features.encode_example(record))


def builder_folder(dataset, bucket):
    """Where the shards of a bucket lie below the dataset's folder."""
    return f"{dataset}/{bucket}/{VERSION}"


def shard_name(dataset, bucket, split, index, count):
    """Name of a shard below the dataset's folder, as TFDS expects it."""
    return f"{builder_folder(dataset, bucket)}/{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(storage, name, examples, *, compress=False):
    """Writes one shard; returns its bytes of records.

    Groups of one record, so that any record can be read alone. Uncompressed by default: video and latents
    hardly shrink, and decompression would cost more than reading.

    Args:
        examples: iterable of bytes.
    """
    total = 0
    with storage.writing(name) as path:
        writer = ArrayRecordWriter(str(path), f"group_size:1,{'zstd:3' if compress else 'uncompressed'}")
        try:
            for example in examples:
                writer.write(example)
                total += len(example)
        finally:
            writer.close()
    return total


def write_metadata(storage, dataset, bucket, features, splits):
    """Writes the dataset_info.json and features.json that make the shards of a bucket a TFDS builder.

    Args:
        splits: {"train": (records of each shard, bytes of records)}.
    """
    with tempfile.TemporaryDirectory() as folder:
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(lengths),
                num_bytes=size,
                filename_template=tfds.core.ShardedFileTemplate(
                    dataset_name=dataset, split=split, filetype_suffix="array_record", data_dir=folder
                ),
            )
            for split, (lengths, size) in splits.items()
        ]
        for split, (lengths, _) in splits.items():  # TFDS reads the dataset's name off the files it finds
            for index in range(len(lengths)):
                Path(folder, Path(shard_name(dataset, bucket, split, index, len(lengths))).name).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features,
            split_infos=infos,
            filename_template=None,
            version=VERSION,
            check_data=False,  # the check would import TensorFlow
        )
        for path in sorted(Path(folder).glob("*.json")):
            storage.write(f"{builder_folder(dataset, bucket)}/{path.name}", path.read_bytes())


@dataclass(frozen=True)
class Records:
    """A finished dataset, opened by `open_clips` or `open_encoded`.

    Attributes:
        storage: its folder.
        dataset: CLIPS or ENCODED.
        info: the closing metadata.
    """

    storage: Storage
    dataset: str
    info: dict

    def buckets(self, split):
        """{Bucket: number of records} of those that have any, in the order of frames, height, width."""
        counts = {Bucket.parse(name): splits.get(split, 0) for name, splits in self.info["buckets"].items()}
        return {bucket: count for bucket, count in sorted(counts.items()) if count}

    def source(self, bucket, split):
        """Random access to a bucket's records: len(), and source[i] -> {name: value}. Picklable."""
        return self.builder(bucket).as_data_source(split)

    def builder(self, bucket):
        """The TFDS builder of a bucket. Shards of an object store are copied to this host first."""
        folder = builder_folder(self.dataset, bucket)
        return tfds.builder_from_directory(self.storage.mirror(folder, self.info["digest"]))


def close(storage, name, info):
    """Writes the closing metadata: from now on the dataset can be opened.

    Args:
        name: CLOSING or ENCODED_CLOSING.
        info: JSON values, with "digest" (hash of what the records are) and "buckets" ({name: {split: n}}).
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **info}, indent=1, sort_keys=True, allow_nan=False)
    storage.write(name, text.encode())


def open_clips(path):
    """The records with encoded video of a dataset.

    Raises:
        InputError: there is no dataset, its writing was not finished, or its format is another one.
    """
    storage = Storage(path)
    return Records(storage, CLIPS, _closing(storage, CLOSING, "tools/prepare_data.py --videos ..."))


def open_encoded(path, weights, what=()):
    """The precomputed records that were made with given weights; of several sets the one that holds most.

    Args:
        weights: {component: hash} of the weights in use ("vae", "text_encoder", "image_encoder").
        what: which of "latents", "text", "image" they must hold.

    Raises:
        InputError: there are none, or they are unfinished, made by other weights, of another format, or made
            from an earlier state of the clips.
    """
    clips = open_clips(path)
    found = [name.split("/")[1] for name in clips.storage.names("encoded", recursive=True)]
    refusals, fitting = [], []
    for name in sorted(set(found)):
        storage = clips.storage / "encoded" / name
        if not storage.exists(ENCODED_CLOSING):
            refusals.append(f"{name} is not finished")
            continue
        info = _closing(storage, ENCODED_CLOSING, "tools/prepare_data.py --precompute ...")
        others = [part for part, used in info["weights"].items() if weights.get(part) != used]
        if info["clips"] != clips.info["digest"]:
            refusals.append(f"{name} was made from an earlier state of the clips")
        elif others:
            refusals.append(f"{name} was made with another {' and another '.join(others)}")
        elif not set(what) <= set(info["what"]):
            refusals.append(f"{name} holds only {', '.join(info['what'])}")
        else:
            fitting.append(Records(storage, ENCODED, info))
    if fitting:
        return max(fitting, key=lambda records: len(records.info["what"]))
    raise InputError(
        "; ".join(refusals) or "holds no precomputed records",
        where=path,
        expected="records precomputed with the weights in use",
        fix="run tools/prepare_data.py --precompute latents,text,image with these weights",
    )


def _closing(storage, name, command):
    if not storage.exists(name):
        raise InputError(
            f"has no {name}: not a dataset, or its writing was not finished",
            where=storage,
            expected="a folder that tools/prepare_data.py has finished",
            fix=f"run {command} again; it goes on where it stopped",
        )
    try:
        info = json.loads(storage.read(name))
        version = info["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot be read ({error})", where=storage.path(name), expected="JSON as it was written"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"format version {version}",
            where=storage.path(name),
            expected=f"version {FORMAT_VERSION}",
            fix="prepare the data again with this release",
        )
    return info


def decode_bits(array):
    """uint16 bits, as stored, -> bfloat16 of the same shape."""
    return array.view(ml_dtypes.bfloat16)
