"""Makes a training dataset from a folder of videos, and precomputes what the frozen networks say of it.

    python tools/prepare_data.py --videos videos/ --out dataset/
    python tools/prepare_data.py --out dataset/ --precompute latents,text,image --weights weights/

The same command goes on where it was stopped. Flags of Apache Beam, such as --runner FlinkRunner, are
handed on.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from animecolor_jax import cli
from animecolor_jax.encoded_records import PrecomputeConfig
from animecolor_jax.errors import InputError
from data_pipeline.clip_video import ClipEncoding
from data_pipeline.curation import CurationConfig
from data_pipeline.shapes import BucketConfig


@dataclass
class Arguments:
    """Make a training dataset from a folder of videos: curate, caption, store, pack; then --precompute."""

    out: str = ""
    """The dataset: a folder, or a gs:// or s3:// address."""
    videos: str = ""
    """Folder (or address) of videos and images; all its sub-folders are searched."""
    captions: str | None = None
    """Table (.json, .jsonl, .csv, .parquet) or folder of text files; default: text files beside videos."""
    captioner: Path | None = None
    """Vision-language model in transformers format that captions what has no caption."""
    text_detector: Path | None = None
    """Model in transformers format that finds text, instead of the built-in detector."""
    aesthetic: tuple[Path, ...] = ()
    """CLIP model in transformers format, and the file of the linear head that scores its embedding."""
    curation: CurationConfig = field(default_factory=CurationConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    encoding: ClipEncoding = field(default_factory=ClipEncoding)
    test_share: float = 0.02
    """Share of the videos whose clips become the test split."""
    compress: bool = False
    """Compress the shards."""
    precompute: str = ""
    """Of a finished dataset: any of latents,text,image."""
    weights: Path | None = None
    """Weights directory for --precompute."""
    encoded: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    batch_size: int = 2
    """Clips that a device encodes at a time."""
    mesh: str = ""
    """Devices of this process that --precompute uses, e.g. data=4; default: all, each with its own clips."""
    distributed: bool = False
    """--precompute runs on several hosts, one process each, which JAX finds by itself (TPU pods, SLURM)."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args, beam_flags):
    """Prepares or precomputes, and prints the counts."""
    if not args.out:
        raise InputError("is missing", where="--out", expected="the folder of the dataset")
    if bool(args.videos) == bool(args.precompute):
        raise InputError(
            "both are given" if args.videos else "neither is given",
            where="--videos, --precompute",
            expected="one of them",
            fix="prepare with --videos DIR; then --precompute latents,text,image --weights DIR",
        )
    report = precompute(args, beam_flags) if args.precompute else prepare(args, beam_flags)
    size = "other processes go on" if report["bytes"] is None else f"{report['bytes'] / 2**20:.1f} MiB"
    print(f"{report['clips']} clips in {len(report['buckets'])} buckets, {size}")
    for name, count in report["buckets"].items():
        print(f"  {name}: {count}")
    for reason, count in report["dropped"].items():
        print(f"  dropped, {reason}: {count}")
    if report.get("reused"):
        print(f"  {report['reused']} clips with results taken over from other sets")
    if "captioned" in report:
        print(
            f"  videos with a caption: {report['captioned']}, without: {report['without_caption']}; "
            f"captions without a video: {report['unmatched_captions']}"
        )
    for name in ("table", "contact_sheet", "encoded"):
        if name in report:
            print(report[name])
    return report, report["clips"] > 0


def prepare(args, beam_flags):
    """Makes or continues the dataset."""
    from data_pipeline.prepare import PrepareConfig, load_models, prepare

    settings = {"test_share": args.test_share, "compress": args.compress}
    config = PrepareConfig(args.curation, args.buckets, args.encoding, **settings)
    models = load_models(args.text_detector, args.aesthetic, args.captioner)
    options = {"captions": args.captions, "models": models, "beam_flags": beam_flags}
    options["progress"] = functools.partial(tqdm, disable=None)  # bars on a terminal only
    return prepare(args.videos, args.out, config, **options)


def precompute(args, unknown):
    """Runs the networks over the finished dataset."""
    import jax

    from animecolor_jax.precompute import precompute

    if unknown:
        raise InputError(" ".join(unknown), where="arguments", expected="what --help lists", fix="see --help")
    if args.weights is None:
        raise InputError("is missing", where="--weights", expected="the weights directory to precompute with")
    if args.distributed:
        jax.distributed.initialize()
    what = tuple(args.precompute.split(","))
    options = {"batch_size": args.batch_size, "mesh": args.mesh}
    return {"dropped": {}, **precompute(args.out, args.weights, what, args.encoded, **options)}


if __name__ == "__main__":
    cli.main(run, Arguments, hands_on_unknown=True)
