"""Trains one stage; the same command goes on where it stopped.

    python tools/train.py --config configs/stage1_sketch.py --data dataset/ --init weights/ --out runs/stage1
    python tools/train.py --config configs/stage4_joint.py --data dataset/ --out runs/stage4 \
        --init runs/stage3 hce=runs/stage2
    python tools/train.py ... --optimizer.learning-rate 1e-5 --compute.mesh fsdp=8
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.train.command import distribute, leave, override, read_config


@dataclass
class Arguments:
    """Train one stage of AnimeColor, on one device or many. Every value of the config can be given as a flag
    of its own, such as --steps 1000 or --optimizer.learning-rate 1e-5; --config FILE --help-config lists
    them."""

    config: Path
    """Python file with CONFIG, a TrainConfig: one of configs/, or your own."""
    data: str = ""
    """Dataset of tools/prepare_data.py: a folder, gs:// or s3://."""
    init: tuple[str, ...] = ()
    """Weights to start from: a weights directory or an earlier stage's run, and NETWORK=PATH for networks
    that come from elsewhere, such as hce=runs/stage2."""
    out: str = ""
    """The run directory; a run that is there goes on."""
    allow_untrained: bool = False
    """Use networks that were never trained where the stage does not train them."""
    export: bool = False
    """Do not train: write the weights directory of the newest checkpoint."""
    profile_steps: int = 0
    """Record so many steps with JAX's profiler, into OUT/profile."""
    coordinator: str = ""
    """Several processes: "auto" on a TPU pod, SLURM or GKE, else HOST:PORT of the first one."""
    num_processes: int | None = None
    """Of HOST:PORT."""
    process_id: int | None = None
    """Of HOST:PORT; from 0."""
    peer_timeout: int = 30
    """Seconds after which a process that does not answer is given up, and all others with it."""
    help_config: bool = False
    """List the flags of the config."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args, unknown):
    """Trains, or exports."""
    config = override(read_config(args.config), ["--help"] if args.help_config else unknown)
    for name in ("data", "init", "out"):
        if not getattr(args, name):
            raise InputError("is missing", where=f"--{name}", expected="a value", fix="see --help")
    distribute(args.coordinator, args.num_processes, args.process_id, args.peer_timeout)
    from animecolor_jax.train.loop import Trainer

    trainer = Trainer(
        config, args.data, args.init, args.out, allow_untrained=args.allow_untrained, command=sys.argv
    )
    report = trainer.export() if args.export else trainer.run(args.profile_steps)
    if trainer.leader:
        print(report["weights"] or report["checkpoint"])
    return report, True


if __name__ == "__main__":
    try:
        cli.main(run, Arguments, hands_on_unknown=True)
    except SystemExit as stop:
        leave(stop.code)
