"""What the frozen networks make of a dataset's clips, computed once and stored beside them.

    DATASET/encoded/NAME/             NAME is a hash of the clips, the weights, what was computed and how
        animecolor_encoded/BUCKET/    a shard for every shard of clips, its records in the same order
        empty_text.npy                [L, D] uint16, bfloat16 bits of the embedding of "", for text dropout
        parts-BUCKET-.../             results for single clips, until their shard is written
        encoded.json                  closing metadata, when all is there

The shards are divided among the processes, one per host, each with all of its own devices. Every result is a
file that appears whole, so that a run that is killed loses the batch in hand and nothing else.
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

from animecolor_jax.encoded_records import PrecomputeConfig, array_specs, choose_frames, shards_of
from animecolor_jax.encoding import COMPONENTS, Encoder, component_hash, local_mesh
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import NonFiniteError, use_compilation_cache
from animecolor_jax.weights import Weights
from data_pipeline import clip_video, records
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
        {"encoded": folder, "clips": n, "buckets": {name: n}, "bytes": n, "finished": bool}; bytes is None as
        long as another process has not finished.

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
        self.show = False

    @functools.cached_property
    def shards(self):
        """All shards of all processes."""
        return list(shards_of(self.clips))

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
        unwritten = self.unwritten(shards)
        for shard in shards:
            if shard not in unwritten:
                self.storage.remove(shard.folder)  # a run was killed between writing and removing
        pool = ThreadPoolExecutor(min(16, os.cpu_count()))
        try:
            for network in self.what:
                self._run_network(network, unwritten, leader, pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _run_network(self, network, shards, leader, pool):
        """Encodes with one network, which is loaded only if something is left for it to do."""
        encoder = self.create_encoder()
        if network == "text" and leader and not self.storage.exists(EMPTY_TEXT):
            file = io.BytesIO()
            np.save(file, self._encode(encoder, network, [{"captions": ""}])["text"][0])
            self.storage.write(EMPTY_TEXT, file.getvalue())
        with tqdm(total=sum(len(s.numbers) for s in shards), desc=network, disable=not self.show) as bar:
            for shard in shards:
                there = set(self.storage.names(shard.folder))
                # Batches are cut alike in every run: the bits of a result may depend on its batch.
                starts = range(0, len(shard.numbers), self.batch_size)
                batches = [shard.numbers[start : start + self.batch_size] for start in starts]
                left = [b for b in batches if not there.issuperset(shard.part(n, network) for n in b)]
                bar.update(len(shard.numbers) - sum(map(len, left)))
                for batch, samples in self._samples(network, shard, left, pool):
                    self._write_parts(network, shard, batch, self._encode(encoder, network, samples))
                    bar.update(len(batch))
                if network == self.what[-1]:
                    self._write_shard(shard)

    def _samples(self, network, shard, batches, pool):
        """Yields (numbers, samples) of every batch; the next ones are being decoded meanwhile."""
        ahead = collections.deque()
        for batch in batches:
            read = (self._read(shard, number) for number in batch)
            ahead.append((batch, [pool.submit(self._sample, network, shard, record) for record in read]))
            if len(ahead) > BATCHES_AHEAD:
                batch, samples = ahead.popleft()
                yield batch, [sample.result() for sample in samples]
        for batch, samples in ahead:
            yield batch, [sample.result() for sample in samples]

    def _read(self, shard, number):
        """Record `number` of the shard's bucket and split, texts as str."""
        record = self.source(shard.bucket, shard.split)[number]
        texts = ("id", "source", "caption", "bucket")
        return {**record, **{name: record[name].decode() for name in texts}}

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

    def _write_parts(self, network, shard, batch, arrays):
        for row, number in enumerate(batch):
            with self.storage.writing(shard.part(number, network)) as path:
                np.savez(path, **{name: array[row] for name, array in arrays.items()})

    def _write_shard(self, shard):
        """Packs the parts of a shard and deletes them."""
        specs = array_specs(shard.bucket, self.weights.config, self.what, self.config)
        serialize = records.Serializer(records.encoded_features(specs))
        examples = (serialize(self._record(shard, number, specs)) for number in shard.numbers)
        records.write_shard(self.storage, shard.name, examples)
        self.storage.remove(shard.folder)

    def _record(self, shard, number, specs):
        clip = self._read(shard, number)
        start, stride, references = self._choose(shard, clip)
        arrays = {"window": np.int32([start, stride]), "reference_frames": np.int32(references)}
        for network in self.what:
            with self.storage.local(shard.part(number, network)) as path, np.load(path) as part:
                arrays.update(part)
        return {
            **{name: clip[name] for name in ("id", "source", "fps", "caption", "bucket")},
            "weights": json.dumps(self.hashes, sort_keys=True),
            **{name: arrays[name] for name in specs},
        }

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
            "finished": bool(closing),
        }
