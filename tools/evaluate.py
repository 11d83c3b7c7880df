"""Scores coloured clips against their targets.

    python tools/evaluate.py --generated ours=colored/ lvcd=other/ --target clips/ --out report/
    python tools/evaluate.py --weights weights/ --data dataset/ --out report/

Clips are matched by name. Networks of LPIPS, FID and FVD are looked for in the folder $ANIMECOLOR_METRICS,
or where --networks says; a metric without its network is skipped, and the file that it wants is named.
"""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import run as evaluation
from animecolor_jax.evaluation import tables
from animecolor_jax.evaluation.generate import ColorConfig, Colored, method_name
from animecolor_jax.evaluation.protocol import find_protocol
from animecolor_jax.evaluation.score import NETWORKS, Scorer, load_networks


@dataclass
class Arguments:
    """Score coloured clips against their targets: folders matched by name, or what weights make of a
    dataset."""

    generated: tuple[str, ...] = ()
    """[NAME=]DIR of every method: videos, or folders of frames, called as in --target."""
    target: Path | None = None
    """Folder of the true clips."""
    sketch: Path | None = None
    """Folder of the sketches that the clips were coloured from; default: made from the targets."""
    mask: Path | None = None
    """Folder of masks, white in the foreground, for a protocol with masks."""
    protocol: str = "animecolor-512x320"
    """animecolor-512x320 (320 high), lvcd-256, anidoc-256-fg, or a .toml file of your own."""
    metrics: tuple[str, ...] = ()
    """psnr ssim lpips_alex sa fid fvd_styleganv lpips_vgg fvd_videogpt edmd tc_dis flicker; default: all."""
    networks: tuple[str, ...] = ()
    """One DIR for all, or NETWORK=FILE_OR_DIR: inception, lpips-alex, lpips-vgg, i3d, i3d-torchscript."""
    out: Path | None = None
    """Folder for the report, tables, scores of all clips, and what a stopped run goes on from."""
    figures: tuple[str, ...] = ()
    """Clips of which temporal profiles and comparison grids are drawn; default: the first."""
    partial: bool = False
    """Score only clips and frames that all folders have, and list the rest."""
    weights: Path | None = None
    """Colour the clips of --data with these weights and score the result, in place of --generated."""
    data: str = ""
    """Dataset of tools/prepare_data.py."""
    color: ColorConfig = dataclasses.field(default_factory=ColorConfig)
    """How --weights colours."""
    num_processes: int = 1
    """Share the clips among so many processes with one --out; the last to finish writes the report."""
    process_id: int = 0
    """Which of them this is, from 0."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Scores, prints the table, and writes the report."""
    protocol, metrics = find_protocol(args.protocol), evaluation.choose_metrics(args.metrics)
    share = _share(args)
    clips = _clips(args, protocol, share)
    if args.out is not None:
        folders = getattr(clips, "folders", ())
        evaluation.check_out(args.out, folders)
    unknown = [name for name in args.figures if name not in clips.facts]
    if unknown:
        raise InputError(f"{', '.join(unknown)}", where="--figures", expected="names of clips")
    networks, hashes, skipped = load_networks(metrics, _networks(args.networks))
    for metric, reason in skipped.items():
        print(f"{metric} is skipped: {reason}", file=sys.stderr)
    for note in clips.notes:
        print(note, file=sys.stderr)
    used = [metric for metric in metrics if metric not in skipped]
    if not used:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise InputError(reasons, where="--metrics", expected="a metric whose network is there")
    scorer, store = Scorer(protocol, used, clips.methods, networks), None
    clips.check(scorer)
    if args.out is not None:
        settings = [dataclasses.asdict(protocol), used, clips.methods, hashes, clips.settings]
        settings += [evaluation.versions()]
        store = evaluation.Store(args.out, settings, clips.facts, *share)
    names = sorted(clips.facts)[share[0] :: share[1]]
    scorer = evaluation.score_all(scorer, names, clips.load, store)
    if scorer is None:
        print(
            "not all processes have finished with these clips and flags; the last one writes the report",
            file=sys.stderr,
        )
        return {"protocol": protocol.name, "clips": len(names), "methods": {}, "skipped": skipped}, True
    command = shlex.join(["python", *sys.argv])
    result = evaluation.make_result(
        scorer, protocol, metrics, skipped, hashes, clips.pixel_source, command
    )
    print(tables.markdown(result))
    if args.out is not None:
        evaluation.write_outputs(result, protocol, args.out, clips, args.figures)
        print(args.out / "report.html")
    return evaluation.as_json(result, protocol, clips.notes), True


def _share(args):
    """(process, processes), checked."""
    share = cli.parse_share(args)
    if args.num_processes > 1 and args.out is None:
        raise InputError("is missing", where="--out", expected="a folder that all processes share")
    return share


def _clips(args, protocol, share):
    """`Files`, or `Colored`."""
    if (args.weights is None) == (not args.generated):
        raise InputError(
            "both" if args.generated else "neither is given", where="--generated, --weights",
            expected="folders to score, or weights to colour with",
        )  # fmt: skip
    if args.weights is None:
        if args.target is None:
            raise InputError("is missing", where="--target", expected="the folder of the true clips")
        if args.data or args.color != ColorConfig():
            raise InputError("is given", where="--data, --color", expected="--weights with it")
        methods = evaluation.parse_methods(args.generated)
        return evaluation.Files(methods, args.target, args.sketch, args.mask, protocol, args.partial)
    for name in ("target", "sketch", "mask", "partial"):
        if getattr(args, name):
            raise InputError("is given", where=f"--{name}", expected="--data alone, with --weights")
    if not args.data:
        raise InputError("is missing", where="--data", expected="a dataset of tools/prepare_data.py")
    cli.check_dtype(args.color.dtype)
    return Colored(args.weights, args.data, method_name(args.weights), args.color, protocol, args.out, *share)


def _networks(texts):
    """{network: path} of --networks."""
    known, paths = sorted(set(NETWORKS.values())), {}
    for text in texts:
        name, _, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
        if name and name not in known:
            raise InputError(f"{name!r}", where="--networks", expected=f"one of {', '.join(known)}")
        if not Path(path).exists():
            raise InputError("does not exist", where=f"--networks {text}", expected="a file or folder")
        paths |= {name: Path(path)} if name else {every: Path(path) for every in known if every not in paths}
    return paths


if __name__ == "__main__":
    cli.main(run, Arguments)
