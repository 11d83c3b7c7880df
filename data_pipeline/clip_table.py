"""Which clips a dataset holds and what is known of them, without reading their videos."""

import hashlib
import json

import pyarrow.parquet

from data_pipeline import records
from data_pipeline.shapes import Bucket

TABLE = "clips.parquet"
FACTS = ("id", "source", "fps", "caption", "bucket", "frames")


def clips_digest(rows, shard_bytes, compress):
    """The digest in a dataset's closing metadata.

    Args:
        rows: [(id, source, bucket, split, caption)] of all records, by id.
        shard_bytes, compress: as in `PrepareConfig`.
    """
    layout = [records.FORMAT_VERSION, shard_bytes, compress]
    return hashlib.sha256(json.dumps([layout, [list(row) for row in rows]]).encode()).hexdigest()


def read_facts(clips):
    """{(Bucket, split): [{name: value of FACTS}]} of all records, in their order.

    They stand in the table of clips. Where it is missing, or is not of exactly these records, they are read
    from the records themselves, with all their videos.

    Args:
        clips: `records.Records`.
    """
    rows = _table(clips)
    if rows is None:
        return {
            (bucket, split): [_facts(record) for record in clips.source(bucket, split)]
            for split in records.SPLITS
            for bucket in clips.buckets(split)
        }
    facts = {}
    for row in rows:
        key = Bucket.parse(row["bucket"]), row["split"]
        facts.setdefault(key, []).append({name: row[name] for name in FACTS})
    return facts


def _table(clips):
    """The rows of the kept clips by id, or None if the digest says that they are not those of the records."""
    config = clips.info.get("config")
    if not config or not clips.info["buckets"] or not clips.storage.exists(TABLE):
        return None
    with clips.storage.local(TABLE) as path:
        columns = ["kept", "id", "source", "start", "end", "fps", "caption", "bucket", "split"]
        table = pyarrow.parquet.read_table(path, columns=columns)
    rows = table.filter(table["kept"]).sort_by("id").to_pylist()
    said = [[row[name] for name in ("id", "source", "bucket", "split", "caption")] for row in rows]
    if clips_digest(said, config["shard_bytes"], config["compress"]) != clips.info["digest"]:
        return None
    for row in rows:
        row["frames"] = row["end"] - row["start"]
    return rows


def _facts(record):
    texts = ("id", "source", "caption", "bucket")
    return {name: record[name].decode() if name in texts else record[name] for name in FACTS}
