"""What sets made earlier, of other clips or of other networks, hold of the clips at hand.

Every set has an index, written before its first result and true of finished and unfinished sets:

    {"format_version", "weights": {component: hash}, "config",
     "shards": [[bucket, split, index, count, first number, [[clip id, hash of caption], ...]], ...]}
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from animecolor_jax.encoded_records import Shard, array_specs
from animecolor_jax.encoding import COMPONENTS
from data_pipeline import records
from data_pipeline.examples import EMPTY_TEXT
from data_pipeline.shapes import Bucket
from data_pipeline.storage import Storage

INDEX = "index.json"


class Result(NamedTuple):
    """Where a set keeps what a network made of a clip."""

    storage: Storage  # of the set
    shard: Shard
    number: int  # of the clip's record in its split
    network: str
    packed: bool  # in a finished shard; otherwise in a part


@dataclass(frozen=True)
class EarlierResults:
    """All results to take over."""

    results: dict  # {`result_key`: Result}
    empty_text: Storage | None  # the set that has the embedding of ""

    def find(self, network, facts, split):
        """The Result of a clip given by its facts (`clip_table.read_facts`), or None."""
        return self.results.get(result_key(network, split, facts["bucket"], *_identity(facts)))


def result_key(network, split, bucket, clip_id, caption_hash):
    """What must agree for a result to serve another set; the split decides which frames are chosen."""
    return network, split, bucket, clip_id, caption_hash if network == "text" else ""


def _identity(facts):
    return facts["id"], hashlib.sha256(facts["caption"].encode()).hexdigest()[:16]


def write_index(storage, weights, config, shards, facts):
    """Writes a set's index.

    Args:
        weights: {component: hash}. config: PrecomputeConfig as a dict. shards: all of the set's.
        facts: `clip_table.read_facts`.
    """
    table = []
    for shard in shards:
        rows = facts[shard.bucket, shard.split][shard.numbers.start : shard.numbers.stop]
        place = [str(shard.bucket), shard.split, shard.index, shard.count, shard.numbers.start]
        table.append([*place, [_identity(row) for row in rows]])
    index = {"format_version": records.FORMAT_VERSION, "weights": weights, "config": config, "shards": table}
    storage.write(INDEX, json.dumps(index).encode())


def find_earlier_results(dataset, own, weights, config, what):
    """EarlierResults of all sets of a dataset but the one named `own`; of several the finished ones first.

    A set serves the networks whose weights are the same, if it was made with the same config by the same
    format version.

    Args:
        dataset: the dataset's Storage. weights, config: as in `write_index`. what: networks.
    """
    files = {}
    for name in dataset.names("encoded", recursive=True):
        _, folder, *rest = name.split("/", 2)
        files.setdefault(folder, set()).update(rest)
    results, empty_text = {}, None
    for folder in sorted(files, key=lambda folder: (records.ENCODED_CLOSING not in files[folder], folder)):
        there, storage = files[folder], dataset / "encoded" / folder
        if folder == own or INDEX not in there:
            continue
        index = json.loads(storage.read(INDEX))
        if (index["format_version"], index["config"]) != (records.FORMAT_VERSION, config):
            continue
        same = [n for n in what if index["weights"].get(COMPONENTS[n]) == weights[COMPONENTS[n]]]
        if empty_text is None and "text" in same and EMPTY_TEXT in there:
            empty_text = storage
        for bucket, split, number, count, first, identities in index["shards"]:
            numbers = range(first, first + len(identities))
            shard = Shard(Bucket.parse(bucket), split, number, count, numbers)
            packed = shard.name in there
            for number, identity in zip(numbers, identities, strict=True):
                for network in same:
                    key = result_key(network, split, bucket, *identity)
                    if key not in results and (packed or shard.part(number, network) in there):
                        results[key] = Result(storage, shard, number, network, packed)
    return EarlierResults(results, empty_text)


class ResultReader(contextlib.ExitStack):
    """Reads results; shards, and their copies from an object store, stay open as long as the context lasts.

    Args:
        networks: `AnimeColorConfig`. config: PrecomputeConfig of the sets that are read.
    """

    def __init__(self, networks, config):
        super().__init__()
        self._networks, self._config = networks, config
        self._shards, self._last = {}, (None, None)

    def read(self, result):
        """{name: array as stored, bfloat16 as uint16} of a Result.

        Raises:
            OSError: the set was deleted meanwhile.
        """
        storage, shard, number, network, packed = result
        part = shard.part(number, network)
        if not packed and storage.exists(part):  # if not, its shard has been finished meanwhile
            with storage.local(part) as path, np.load(path) as arrays:
                return dict(arrays)
        specs = array_specs(shard.bucket, self._networks, [network], self._config)
        features = records.encoded_features(
            {name: spec for name, spec in specs.items() if name not in ("window", "reference_frames")}
        )
        example = self._example(storage, shard, number)
        arrays = features.deserialize_example_np(example)
        return {name: arrays[name] for name in specs if name in arrays}

    def example(self, result, head):
        """The bytes of the whole record that a Result is part of, or None if it is not the record wanted.

        Args:
            head: what the record must say besides the arrays; `weights` names the networks it must hold.
        """
        if not result.packed:
            return None
        example = self._example(result.storage, result.shard, result.number)
        features = records.encoded_features({})
        wanted = records.Serializer(features)(head)
        parse = features.deserialize_example_np
        return example if parse(example) == parse(wanted) else None

    def _example(self, storage, shard, number):
        """The record's bytes; the last one is kept, as several networks ask for the same."""
        place = storage.root, shard.name, number
        if self._last[0] != place:
            name = place[:2]
            if name not in self._shards:
                path = self.enter_context(storage.local(shard.name))
                self._shards[name] = reader = ArrayRecordReader(str(path))
                self.callback(reader.close)
            self._last = place, self._shards[name].read([number - shard.numbers.start])[0]
        return self._last[1]
