"""Runs of tools/train.py that take seconds: dataset, weights and config on disk, and processes over them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from small_datasets import WIDE, write_clips, write_encoded

from animecolor_jax.config import AnimeColorConfig, SchedulerConfig, TransformerConfig, preset
from animecolor_jax.weights import write_initial

TOOL = Path(__file__).parents[1] / "tools" / "train.py"
STEPS = 24
CONFIG = f"""
from animecolor_jax.train.config import *
from data_pipeline.dataset import DataConfig

CONFIG = TrainConfig(
    stage=StageConfig("sketch", ((r"denoiser/.*", True),), ("text", "sketch")),
    steps={STEPS},
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    compute=ComputeConfig(dtype="float32", frozen_dtype="float32", remat="none"),
    checkpoint=CheckpointConfig(every=3),
    validation=ValidationConfig(every=0, videos_every=0),
    log_every=1,
)
"""


def write_inputs(folder):
    """`data`, precomputed, so that only the denoiser is compiled, `weights` and `config.py`; the folder."""
    clips = {WIDE: {"train": 11, "test": 2}}
    write_clips(folder / "data", clips)
    write_encoded(folder / "data", ("latents", "text"), clips)
    denoiser = TransformerConfig(
        num_layers=2, num_heads=2, head_dim=8, in_channels=32, time_embed_dim=8, text_dim=8, text_length=6,
        sample_height=4, sample_width=6, sample_frames=9,
    )  # fmt: skip
    vae = dataclasses.replace(preset("tiny").vae, latent_channels=16, sample_height=32, sample_width=48)
    write_initial(
        folder / "weights", AnimeColorConfig(denoiser=denoiser, vae=vae, scheduler=SchedulerConfig())
    )
    (folder / "config.py").write_text(CONFIG)
    return folder


def flags_of(folder, out, *more):
    """The command line of a run."""
    inputs = ["--config", folder / "config.py", "--data", folder / "data", "--init", folder / "weights"]
    return [str(word) for word in (*inputs, "--out", out, *more, "--json")]


class Child:
    """A process of tools/train.py, on `devices` virtual devices; `lines` are those of its stderr so far."""

    def __init__(self, flags, devices=2, **environment):
        xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = {**os.environ, "XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", **environment}
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", TOOL, *flags], env=environment, stdout=self._stdout,
            stderr=subprocess.PIPE, text=True,
            # a test run in the background of a script ignores Ctrl-C, and would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.lines, self._news = [], threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def said(self):
        return "\n".join(self.lines)

    def wait_for(self, text, timeout=240):
        """Returns once a line of stderr starts with `text`."""
        with self._news:
            found = self._news.wait_for(
                lambda: any(line.startswith(text) for line in self.lines) or not self._reader.is_alive(),
                timeout,
            )
        assert found and any(line.startswith(text) for line in self.lines), self.said

    def end(self, timeout=240):
        """(exit code, JSON of the last line of stdout or None); Gloo writes lines of its own there."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        self._reader.join(10)
        self._stdout.seek(0)
        lines = [line for line in self._stdout.read().splitlines() if line.startswith("{")]
        return code, json.loads(lines[-1]) if lines else None

    def finish(self):
        """The JSON of a process that has to succeed."""
        code, report = self.end()
        assert code == 0, self.said
        return report


def metrics(run, kind="train"):
    """The records of metrics.jsonl, which must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    records = [
        json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [record for record in records if record["kind"] == kind]


def history(run):
    """[(step, clips, loss, gradient norm)] of a run."""
    names = "step", "clips", "loss", "grad_norm"
    return [tuple(record[name] for name in names) for record in metrics(run)]
