"""Checks that every metric moves as its definition says, on clips of your own.

    python tools/check_metrics.py --clips clips/ --untrained

Each clip is scored against itself and against blurred, recoloured, flickered and shifted versions of itself.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from animecolor_jax import cli, media
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation import pairs, sensitivity, tables
from animecolor_jax.evaluation import run as evaluation
from animecolor_jax.evaluation.protocol import find_protocol
from animecolor_jax.evaluation.score import NETWORKS, Scorer, load_networks
from animecolor_jax.parity.untrained import untrained_networks


@dataclass
class Arguments:
    """Score clips against changed versions of themselves, and check that every metric moves as it should."""

    clips: Path | None = None
    """Folder of clips: videos, or folders of frames."""
    protocol: str = "animecolor-512x320"
    """As of tools/evaluate.py."""
    metrics: tuple[str, ...] = ()
    """As of tools/evaluate.py; default: all."""
    untrained: bool = False
    """Use networks with random weights for LPIPS, FID and FVD where the published ones are not there. Such
    scores mean nothing beside others, but they have to move in the same directions."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Scores all versions; fails if a claim does not hold."""
    if args.clips is None:
        raise InputError("is missing", where="--clips", expected="a folder of clips")
    protocol, metrics = find_protocol(args.protocol), evaluation.choose_metrics(args.metrics)
    clips = pairs.list_clips(args.clips)
    networks, hashes, skipped = load_networks(metrics, {})
    if args.untrained:
        networks |= untrained_networks(list(skipped))
        for metric in skipped:
            print(f"{metric}: {NETWORKS[metric]} with random weights", file=sys.stderr)
            hashes[NETWORKS[metric]] = {"none": "random weights"}
        skipped = {}
    used = [metric for metric in metrics if metric not in skipped]
    protocol = dataclasses.replace(protocol, values="uint8")
    prepared = dataclasses.replace(protocol, skip=0, frames=0)
    scorer = Scorer(prepared, used, list(sensitivity.VERSIONS), networks)
    for name, path in tqdm(clips.items(), desc="clips", disable=not sys.stderr.isatty()):
        frames = media.read_video(path).frames
        frames = protocol.prepare(protocol.choose(frames))
        versions = {version: make(frames) for version, make in sensitivity.VERSIONS.items()}
        scorer.add(name, frames, versions)
    result = evaluation.make_result(scorer, protocol, metrics, skipped, hashes, "memory", "")
    print(tables.markdown(result))
    found = evaluation.as_json(result, protocol)
    failed = [str(claim) for claim in sensitivity.failed_claims(found["methods"], used)]
    print(*(f"does not hold: {claim}" for claim in failed), sep="\n")
    return found | {"failed": failed}, not failed


if __name__ == "__main__":
    cli.main(run, Arguments)
