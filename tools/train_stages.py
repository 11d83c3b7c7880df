"""Trains all four stages, one after the other; the same command goes on where it stopped.

    python tools/train_stages.py --data dataset/ --init weights/ --out runs/
    python tools/train_stages.py --configs configs/tiny --data dataset/ --init weights/ --out runs/ --seed 1
"""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from animecolor_jax import cli
from animecolor_jax.errors import InputError
from animecolor_jax.train.run_log import read_metrics

# name of the config and of its run, and the --init of its command; {0} stands for --init, {1} for --out
STAGES = {
    "stage1_sketch": ("{0}",),
    "stage2_hce": ("{1}/stage1_sketch",),
    "stage3_lcg": ("{1}/stage1_sketch",),
    "stage4_joint": ("{1}/stage3_lcg", "hce={1}/stage2_hce"),
}


@dataclass
class Arguments:
    """Train the four stages of AnimeColor. What else is given goes to every stage's tools/train.py."""

    data: str
    """Dataset of tools/prepare_data.py."""
    init: Path
    """Weights directory of tools/convert_torch.py --init-from."""
    out: Path
    """Folder for the four runs."""
    configs: Path = Path("configs")
    """Folder with stage1_sketch.py and so on."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args, unknown):
    """Runs tools/train.py four times."""
    report = {}
    for name, init in STAGES.items():
        config = args.configs / f"{name}.py"
        if not config.is_file():
            raise InputError("does not exist", where=config, expected="the stage's config")
        out = args.out / name
        command = [sys.executable, str(Path(__file__).with_name("train.py"))]
        command += ["--config", str(config), "--data", args.data, "--out", str(out), "--init"]
        command += [text.format(args.init, args.out) for text in init] + unknown
        print(" ".join(command), file=sys.stderr)
        code = run_stage(command)
        if code or not (out / "weights" / "config.json").exists():
            raise InputError(
                f"ended with exit code {code}" if code else "was stopped", where=name, expected="its weights",
                fix="see above; the same command goes on where it stopped",
            )  # fmt: skip
        report[name] = summary(out)
        values = {key: "unknown" if value is None else f"{value:.4g}" for key, value in report[name].items()}
        print(
            f"{name}: validation loss {values['before']} -> {values['after']}, {values['standard_errors']} "
            f"standard errors lower; PSNR {values['psnr']} dB"
        )
    return report, True


def run_stage(command):
    """Exit code of a command, which is left to save when this one is told to stop."""
    with subprocess.Popen(command) as child:
        # Ctrl-C reaches both; SIGTERM only this one
        before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
        try:
            return child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def summary(run):
    """What a run's validation came to: {"before", "after": mean losses, "standard_errors": the mean fall of
    the
    triples' losses in units of its standard error, "psnr" of the last videos or None}."""
    import numpy as np

    lines = [line for line in read_metrics(run) if line["kind"] == "validation" and "losses" in line]
    if len(lines) < 2:
        return dict.fromkeys(("before", "after", "standard_errors", "psnr"))
    first, last = (np.array(line["losses"]) for line in (lines[0], lines[-1]))
    falls = first - last
    error = falls.std(ddof=1) / np.sqrt(len(falls))
    return {
        "before": float(first.mean()), "after": float(last.mean()),
        "standard_errors": float(falls.mean() / error), "psnr": lines[-1].get("psnr"),
    }  # fmt: skip


if __name__ == "__main__":
    cli.main(run, Arguments, hands_on_unknown=True)
