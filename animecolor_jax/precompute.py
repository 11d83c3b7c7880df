"""What the frozen networks make of a dataset's clips, computed once and stored beside them.

    DATASET/encoded/NAME/             NAME is a hash of the clips, the weights, what was computed and how
        animecolor_encoded/BUCKET/    a shard for every shard of clips, its records in the same order
        empty_text.npy                [L, D] uint16, bfloat16 bits of the embedding of "", for text dropout
        parts-BUCKET-.../             results for single clips, until their shard is written
        index.json                    which clip is where, for later sets (`earlier_results`)
        encoded.json                  closing metadata, when all is there

The shards are divided among the processes, one per host, each with all of its own devices. Every result is a
file that appears whole, so that a run that is killed loses the batch in hand and nothing else.

Another state of the clips, as when videos were added, or another choice of networks makes another set. It
takes over what the other sets of the dataset hold, finished or not: a network's result for a clip, where the
hash of the network's weights, the whole config, the clip's id, bucket and split, and for text its caption are
the same. Only the rest is computed. The other sets stay, and may be deleted when the new one is finished.
Results taken over are those of the other set bit for bit. Computed anew their last bits might differ, in
bfloat16 on some devices: they depend on the batch, and batches are cut from what there is to compute.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from animecolor_jax.earlier_results import INDEX, ResultReader, find_earlier_results, write_index
from animecolor_jax.encoded_records import PrecomputeConfig, array_specs, choose_frames, shards_of
from animecolor_jax.encoding import COMPONENTS, Encoder, component_hash, local_mesh
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NonFiniteError, use_compilation_cache
from animecolor_jax.weights import Weights
from data_pipeline import clip_table, clip_video, records
from data_pipeline.examples import EMPTY_TEXT
from data_pipeline.sketch import extractor

# In the order they are computed. Results wait until those of the last are there, so the largest come last.
WHAT = ("text", "image", "latents")
BATCHES_AHEAD = 2  # being decoded while the devices compute
POLL_SECONDS = 5.0  # between looks at whether the other processes have finished


def precompute(
    data,
    weights,
    what=WHAT,
    config=None,
    *,
    batch_size=2,
    mesh="",
    process_index=None,
    process_count=None,
    progress=None,
):
    """Encodes all clips of a dataset, or goes on where an earlier call stopped.

    Args:
        data: folder or URL of a finished dataset.
        weights: weights directory.
        what: of `WHAT`.
        config: PrecomputeConfig.
        batch_size: clips that a device takes at a time.
        mesh: see `encoding.local_mesh`; by default all devices of this process share the clips.
        process_index, process_count: this process, and how many there are. By default JAX's own, and every
            process waits for the others; given ones do not wait, and the last to finish closes the set.
        progress: show progress bars; by default where stderr is a terminal.

    Returns:
        {"encoded": folder, "clips": n, "buckets": {name: n}, "bytes": n, "reused": n, "finished": bool};
        bytes is None as long as another process has not finished; reused counts the clips of which this call
        took over results of other sets.

    Raises:
        InputError: no finished dataset, weights that lack a network, or an argument that makes no sense;
            before any network is loaded. Or a damaged clip.
        NonFiniteError: a network's result is infinite or not a number.
    """
    wait = process_count is None
    if wait:
        process_index, process_count = jax.process_index(), jax.process_count()
    what = _check_arguments(what, batch_size, process_index, process_count)
    mesh, clips, weights = local_mesh(mesh), records.open_clips(data), Weights(weights)
    task = _Task(clips, weights, what, config or PrecomputeConfig(), batch_size, mesh)
    if not task.finished:
        use_compilation_cache()
        task.show = sys.stderr.isatty() if progress is None else progress
        task.run(task.shards[process_index::process_count], leader=process_index == 0)
        while not task.close() and wait:
            time.sleep(POLL_SECONDS)
    return task.report()


def _check_arguments(what, batch_size, process_index, process_count):
    """`what` in the order of WHAT; InputError for anything impossible."""
    what = tuple(what)
    if not what or not set(what) <= set(WHAT):
        raise InputError(f"{','.join(what)!r}", where="--precompute", expected=f"some of {','.join(WHAT)}")
    if batch_size < 1:
        raise InputError(f"{batch_size}", where="--batch-size", expected="1 clip or more")
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process {process_index} of {process_count}",
            where="process_index",
            expected="0 or more, less than process_count",
        )
    return tuple(network for network in WHAT if network in what)


class _Task:
    """One set of encoded records in the making; `show` says whether there are progress bars."""

    def __init__(self, clips, weights, what, config, batch_size, mesh):
        self.clips, self.weights, self.what, self.config = clips, weights, what, config
        self.extract = extractor(config.sketch)
        self.create_encoder = functools.partial(Encoder, weights, dtype=config.dtype, mesh=mesh)
        self.batch_size = batch_size * self.create_encoder().num_shares
        weights.require(*(COMPONENTS[network] for network in what))
        self.hashes = {COMPONENTS[network]: component_hash(weights, COMPONENTS[network]) for network in what}
        self.info = {
            "clips": clips.info["digest"],
            "weights": self.hashes,
            "what": list(what),
            "config": dataclasses.asdict(config),
        }
        text = json.dumps([records.FORMAT_VERSION, self.info], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.storage = clips.storage / "encoded" / self.digest[:12]
        self.source = functools.cache(clips.source)
        self.show, self.reused = False, 0

    @functools.cached_property
    def shards(self):
        """All shards of all processes."""
        return list(shards_of(self.clips))

    @functools.cached_property
    def facts(self):
        """What is known of the clips, see `read_facts`."""
        return clip_table.read_facts(self.clips)

    @functools.cached_property
    def earlier(self):
        """What other sets hold already."""
        name = self.digest[:12]
        return find_earlier_results(self.clips.storage, name, self.hashes, self.info["config"], self.what)

    @property
    def finished(self):
        """Whether the closing metadata is there."""
        return self.storage.exists(records.ENCODED_CLOSING)

    def unwritten(self, shards):
        """Those of `shards` that are not there yet."""
        folders = {records.builder_folder(records.ENCODED, shard.bucket) for shard in shards}
        there = {name for folder in folders for name in self.storage.names(folder)}
        return [shard for shard in shards if shard.name not in there]

    # ------------------------------------------------------------ computing

    def run(self, shards, leader):
        """Writes `shards`, and if this process is the leader what there is one of."""
        if not self.storage.exists(INDEX):  # any process does it, all write the same
            write_index(self.storage, self.hashes, self.info["config"], self.shards, self.facts)
        unwritten = set(self.unwritten(shards))
        for shard in shards:
            if shard not in unwritten:
                self.storage.remove(shard.folder)  # a run was killed between writing and removing
        pool = ThreadPoolExecutor(min(16, os.cpu_count()))
        try:
            for network in self.what:
                # Also those that are written, so that batches are cut alike in every run: the bits of a
                # result may depend on its batch.
                groups = self._groups(network, shards)
                groups = [[shard for shard in group if shard in unwritten] for group in groups]
                self._run_network(network, groups, leader, pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _groups(self, network, shards):
        """Divides shards into runs that have a full batch or more to compute: few new clips lie far apart."""
        groups, count = [], 0
        for shard in shards:
            same = groups and (shard.bucket, shard.split) == (groups[-1][0].bucket, groups[-1][0].split)
            if not same or count >= self.batch_size:
                groups.append([])
                count = 0
            groups[-1].append(shard)
            count += len(self._to_compute(network, shard))
        return groups

    def _to_compute(self, network, shard):
        """[(shard, number)] of those of its clips for which no other set has a result."""
        return [(shard, number) for number in shard.numbers if not self._earlier(network, shard, number)]

    def _earlier(self, network, shard, number):
        """Another set's Result for a clip, or None."""
        return self.earlier.find(network, self._facts(shard, number), shard.split)

    def _run_network(self, network, groups, leader, pool):
        """Encodes with one network, which is loaded only if something is left for it to do."""
        encoder = self.create_encoder()
        if network == "text" and leader and not self.storage.exists(EMPTY_TEXT):
            self._write_empty_text(encoder)
        total = sum(len(shard.numbers) for group in groups for shard in group)
        with tqdm(total=total, desc=network, disable=not self.show) as bar:
            for group in groups:
                places = [place for shard in group for place in self._to_compute(network, shard)]
                there = {name for shard in group for name in self.storage.names(shard.folder)}
                starts = range(0, len(places), self.batch_size)
                batches = [places[start : start + self.batch_size] for start in starts]
                left = [b for b in batches if not there.issuperset(s.part(n, network) for s, n in b)]
                bar.update(sum(len(shard.numbers) for shard in group) - sum(map(len, left)))
                for batch, samples in self._samples(network, left, pool):
                    self._write_parts(network, batch, self._encode(encoder, network, samples))
                    bar.update(len(batch))
                if network == self.what[-1]:
                    for shard in group:
                        self._write_shard(shard)

    def _write_empty_text(self, encoder):
        if self.earlier.empty_text:
            self.storage.write(EMPTY_TEXT, self.earlier.empty_text.read(EMPTY_TEXT))
            return
        file = io.BytesIO()
        np.save(file, self._encode(encoder, "text", [{"captions": ""}])["text"][0])
        self.storage.write(EMPTY_TEXT, file.getvalue())

    def _samples(self, network, batches, pool):
        """Yields (batch, samples) of every batch; the next ones are being decoded meanwhile."""
        ahead = collections.deque()
        for batch in batches:
            read = ((shard, self._read(network, shard, number)) for shard, number in batch)
            ahead.append((batch, [pool.submit(self._sample, network, *clip) for clip in read]))
            if len(ahead) > BATCHES_AHEAD:
                batch, samples = ahead.popleft()
                yield batch, [sample.result() for sample in samples]
        for batch, samples in ahead:
            yield batch, [sample.result() for sample in samples]

    def _facts(self, shard, number):
        """What is known of record `number` of the shard's bucket and split."""
        return self.facts[shard.bucket, shard.split][number]

    def _read(self, network, shard, number):
        """The facts of a record, with its video if the network looks at it."""
        facts = self._facts(shard, number)
        if network == "text":
            return facts
        record = self.source(shard.bucket, shard.split)[number]
        if record["id"].decode() != facts["id"]:
            raise InputError(
                f"record {number} of {shard.bucket} is no longer clip {facts['id']}",
                where=self.clips.storage,
                expected="clips that stay as they are while they are encoded",
                fix="run the same command again when the clips are finished",
            )
        return {**facts, "video": record["video"]}

    def _choose(self, shard, record):
        return choose_frames(record["id"], int(record["frames"]), shard.bucket, shard.split, self.config)

    def _sample(self, network, shard, record):
        """What a network needs of a record, by the names of `Encoder`'s arguments."""
        if network == "text":
            return {"captions": record["caption"]}
        start, stride, references = self._choose(shard, record)
        length = shard.bucket.frames if network == "latents" else 0
        window = [start + i * stride for i in range(length)]
        where = f"clip {record['id']}"
        frames = clip_video.decode(record["video"], window + references, where)
        if frames.shape[1:3] != shard.bucket.size:
            height, width = frames.shape[1:3]
            raise InputError(f"is {height}x{width} pixels", where=where, expected=f"bucket {shard.bucket}")
        frames, references = np.split(frames, [length])
        if network == "image":
            return {"references": references}
        return {"frames": frames, "sketches": self.extract(frames), "references": references}

    def _encode(self, encoder, network, samples):
        """{name: [len(samples), ...] uint16, bits of bfloat16}; a short batch is filled up with its last."""
        filled = samples + samples[-1:] * (self.batch_size - len(samples))
        columns = {name: [sample[name] for sample in filled] for name in samples[0]}
        if network != "text":
            columns = {name: np.stack(column) for name, column in columns.items()}
        bits = {}
        for name, array in getattr(encoder, network)(**columns).items():
            array = np.asarray(array.astype(jnp.bfloat16))[: len(samples)]
            if not np.isfinite(array).all():
                raise NonFiniteError(
                    f"{name} is not finite: the weights of {COMPONENTS[network]} are damaged, or the dtype "
                    f"{encoder.dtype} is too narrow (float16 overflows: use bfloat16 or float32)"
                )
            bits[name] = array.view(np.uint16)
        return bits

    # ------------------------------------------------------------ writing

    def _write_parts(self, network, batch, arrays):
        for row, (shard, number) in enumerate(batch):
            with self.storage.writing(shard.part(number, network)) as path:
                np.savez(path, **{name: array[row] for name, array in arrays.items()})

    def _write_shard(self, shard):
        """Packs the results of a shard's clips, and deletes its parts."""
        specs = array_specs(shard.bucket, self.weights.config, self.what, self.config)
        serialize = records.Serializer(records.encoded_features(specs))
        with ResultReader(self.weights.config, self.config) as reader:
            examples = (self._example(shard, number, specs, serialize, reader) for number in shard.numbers)
            records.write_shard(self.storage, shard.name, examples)
        self.storage.remove(shard.folder)
        taken_over = (any(self._earlier(n, shard, number) for n in self.what) for number in shard.numbers)
        self.reused += sum(taken_over)

    def _example(self, shard, number, specs, serialize, reader):
        """A record as bytes, either another set's as it is or composed of the networks' results."""
        clip = self._facts(shard, number)
        head = {name: clip[name] for name in ("id", "source", "fps", "caption", "bucket")}
        head["weights"] = json.dumps(self.hashes, sort_keys=True)
        earlier = {network: self._earlier(network, shard, number) for network in self.what}
        if all(earlier.values()):
            example = reader.example(earlier[self.what[0]], head)
            if example is not None:
                return example
        start, stride, references = self._choose(shard, clip)
        arrays = {"window": np.int32([start, stride]), "reference_frames": np.int32(references)}
        for network in self.what:
            if earlier[network]:
                arrays.update(reader.read(earlier[network]))
                continue
            with self.storage.local(shard.part(number, network)) as path, np.load(path) as part:
                arrays.update(part)
        return serialize({**head, **{name: arrays[name] for name in specs}})

    def close(self):
        """Writes all metadata if the shards of all processes are there; returns whether the set is finished.

        Whichever process finds all of them does so; where several do, they write the same.
        """
        if self.finished:
            return True
        if self.unwritten(self.shards) or ("text" in self.what and not self.storage.exists(EMPTY_TEXT)):
            return False
        total = 0
        for bucket in dict.fromkeys(shard.bucket for shard in self.shards):
            splits = {}
            for shard in self.shards:
                if shard.bucket == bucket:
                    lengths, size = splits.get(shard.split, ([], 0))
                    splits[shard.split] = [*lengths, len(shard.numbers)], size + self.storage.size(shard.name)
            specs = array_specs(bucket, self.weights.config, self.what, self.config)
            features = records.encoded_features(specs)
            records.write_metadata(self.storage, records.ENCODED, bucket, features, splits)
            total += sum(size for _, size in splits.values())
        counts = {"buckets": self.clips.info["buckets"], "bytes": total}
        info = {"digest": self.digest, **self.info, **counts}
        records.close(self.storage, records.ENCODED_CLOSING, info)
        return True

    def report(self):
        """What `precompute` returns."""
        buckets = {name: sum(splits.values()) for name, splits in self.clips.info["buckets"].items()}
        closing = json.loads(self.storage.read(records.ENCODED_CLOSING)) if self.finished else {}
        return {
            "encoded": self.storage.path(),
            "clips": sum(buckets.values()),
            "buckets": buckets,
            "bytes": closing.get("bytes"),
            "reused": self.reused,
            "finished": bool(closing),
        }
