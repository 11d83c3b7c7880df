"""A training run, from the command line's values to the weights it ends with.

Every process of a multi-host run does the same, in the same order; the first one writes and talks.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils

from animecolor_jax import flops, loading, sharding
from animecolor_jax.metrics.image import psnr
from animecolor_jax.pipeline import NonFiniteError, use_compilation_cache
from animecolor_jax.platforms import GIB, device_memory
from animecolor_jax.train import inputs, memory, peers, run_directory, state
from animecolor_jax.train.checkpoints import Checkpoints, read_params
from animecolor_jax.train.export import export_weights
from animecolor_jax.train.optimizer import learning_rate_schedule, make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.run_log import RunLog
from animecolor_jax.train.sources import WEIGHTS, Sources
from animecolor_jax.train.step import Objective, make_train_step
from animecolor_jax.train.validation import Validation
from data_pipeline import records
from data_pipeline.dataset import training_batches
from data_pipeline.shapes import latent_frames
from data_pipeline.storage import Storage, is_remote

CHECKPOINTS = "checkpoints"
PROFILE = "profile"
PROFILE_AFTER = 5  # steps of an attempt, by which everything is compiled and warm


def make_mesh(text):
    """The mesh of a run: "data=2,fsdp=4"; empty for all devices of a slice on fsdp, and slices on data.
    InputError where devices are missing or, on several hosts, left over."""
    slices = sharding.num_slices(jax.devices())
    sizes = sharding.parse_mesh(text) or {"data": slices, "fsdp": jax.device_count() // slices}
    return sharding.make_mesh(**sizes, whole=jax.process_count() > 1)


class Trainer:
    """Everything a run needs, checked; nothing is compiled or read into memory before `run`.

    Raises:
        InputError: whatever makes the run impossible: weights, data, mesh, batch, memory, run directory.
    """

    def __init__(self, config, data, init, out, *, allow_untrained=False, command=(), show=None):
        """
        Args:
            config: TrainConfig. data: dataset directory. init: texts as of `Sources`. out: the run directory.
            allow_untrained: see `Sources.require_trained`; command: the command line, for the record.
            show: True for a progress bar, False for lines; default: by whether stderr is a terminal.
        """
        self.config, self.out, self.show = config, epath.Path(out), show
        self.leader = jax.process_index() == 0
        self.sources = Sources(init, config.stage)
        self.parts = Parts(config, self.sources.model_config)
        if not allow_untrained:
            self.sources.require_trained(self.parts.trained)
        self.mesh = make_mesh(config.compute.mesh)
        sharding.check_mesh(self.mesh, self.parts.configs)
        rows = loading.rows_of_host(self.mesh, config.data.batch_size)
        loading.rows_of_host(self.mesh, config.data.batch_size // config.optimizer.accumulate)
        self.clips = records.open_clips(data)
        encoded = inputs.open_precomputed(data, self.sources.base, config.stage, config.precomputed)
        self.inputs = inputs.Inputs(
            self.sources, config.stage, encoded, config.compute.frozen_dtype, self.mesh
        )
        self.batches = training_batches(
            self.clips, config.data, encoded=encoded, tokenize=self.inputs.tokenize, rows=rows
        )
        self.objective = Objective(
            self.parts, self.sources.model_config.scheduler, self.sources.base.config.vae.scaling_factor
        )
        self.validation = None
        if config.validation.every or config.validation.videos_every:
            self.validation = Validation(self.objective, config, self.clips, self.inputs, self.mesh)
        self.description = run_directory.describe_run(config, command, self._identities())
        run_directory.open_run(out, self.description, leader=False)  # only compares

    def _identities(self):
        """Hashes of what a resumed run must find unchanged."""
        weights = {"base": self.sources.base, **self.sources.named}
        texts = {name: json.dumps(each.values, sort_keys=True) for name, each in weights.items()}
        found = {f"init.{name}": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        found["data"] = self.clips.info["digest"]
        if self.inputs.encoded is not None:
            found["precomputed"] = self.inputs.encoded.info["digest"]
        return found

    def run(self, profile_steps=0):
        """Trains to the last step, or until the run is told to stop.

        Args:
            profile_steps: steps to record with JAX's profiler, into RUN/profile.

        Returns:
            {"step", "loss", "steps_per_second", "mfu", "checkpoint", "weights" (None unless finished)}.

        Raises:
            NonFiniteError: a loss or gradient was not finite. KeyboardInterrupt: after saving.
        """
        use_compilation_cache()
        config, self.profile_steps = self.config, profile_steps
        memory.check(
            config, self.sources.model_config, self.clips.buckets(config.data.split), dict(self.mesh.shape),
            config.compute.memory_gib * GIB or device_memory(self.mesh.local_devices[0]),
            self.inputs.on_the_fly,
        )  # fmt: skip
        run_directory.open_run(self.out, self.description, leader=self.leader)
        self.optimizer = make_optimizer(config.optimizer, config.steps, self.parts.trained)
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, config.checkpoint)
        device_batches = loading.DeviceBatches(self.batches, self.mesh)
        abstract = state.abstract(self.parts, self.optimizer, config, self.mesh)
        restored = self.checkpoints.restore(abstract)
        if restored is None:
            current = state.create(self.sources, self.parts, self.optimizer, config, self.mesh)
        else:
            current = restored.state
            device_batches.set_state(restored.data_state)
        peak = flops.peak_flops(jax.devices()[0].device_kind, config.compute.dtype)
        with (
            _peers_named(self.checkpoints),
            RunLog(
                self.out, start_step=0 if restored is None else restored.step, total_steps=config.steps,
                batch_size=config.data.batch_size, log_every=config.log_every,
                peak_flops=peak and peak * self.mesh.size, show=self.show, leader=self.leader,
            ) as self.log,
            contextlib.closing(device_batches),
            _Stop() as stop,
        ):  # fmt: skip
            current = self._train(current, device_batches, stop)
            done = int(current.step) == config.steps
            self._save(current, device_batches, wait=True)
            summary = self.log.summary()
        if stop.interrupted:
            raise KeyboardInterrupt
        weights = None
        if done:
            trained = current.trainable if current.ema is None else current.ema
            weights = self._write_weights(WEIGHTS, config.steps, trained)
        return {
            "step": int(current.step), **summary,
            "checkpoint": str(self.out / CHECKPOINTS / str(int(current.step))),
            "weights": weights and str(weights),
        }  # fmt: skip

    def export(self):
        """Writes the weights directory of the newest checkpoint, RUN/weights_STEP, unless it is there.

        Returns:
            as `run`; what only training knows is None.

        Raises:
            InputError: there is no checkpoint.
        """
        step, trained, _, _ = read_params(self.out / CHECKPOINTS)
        return {
            "step": step, "loss": None, "steps_per_second": None, "mfu": None,
            "checkpoint": str(self.out / CHECKPOINTS / str(step)),
            "weights": str(self._write_weights(f"{WEIGHTS}_{step}", step, trained)),
        }  # fmt: skip

    def _write_weights(self, name, step, trained):
        out = self.out / name
        there = self.leader and self._make_room(out, step)
        if multihost_utils.broadcast_one_to_all(jnp.int32(there)):
            return out
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / name if is_remote(out) else Path(out)
            export_weights(made, self.sources, self.parts, self.config, step, trained)
            if is_remote(out) and self.leader:
                _upload(made, Storage(out))
        peers.wait_for_all(f"{name} {step}")
        return out

    def _make_room(self, out, step):
        """Whether the weights directory of that step is there already. One of another step is renamed, as the
        run went on after what was its end; half ones of a killed process are deleted."""
        if not is_remote(out):
            for half in Path(out.parent).glob(f".{out.name}-*"):
                shutil.rmtree(half)
        if not (out / "config.json").exists():
            return False
        notes = json.loads((out / "config.json").read_text())["provenance"]
        own = {name.partition("/")[0] for name in self.parts.trained}
        made = max(notes[name]["trained"]["steps"] for name in own)
        if made == step:
            return True
        before = out.with_name(f"{WEIGHTS}_{made}")
        if before.exists():  # exported then
            out.rmtree()
        else:
            out.rename(before)
        return False

    def _train(self, current, device_batches, stop):
        """The loop; returns the state it ends with. Values are looked at one step late, so that the devices
        always have the next step to do."""
        config, step = self.config, int(current.step)
        of_trained, of_opt_state = state.state_shardings(self.optimizer, current.trainable, self.mesh)
        placed = of_trained, of_opt_state, None if current.ema is None else of_trained
        train_step = make_train_step(self.objective, self.optimizer, config.optimizer, placed)
        rate = learning_rate_schedule(config.optimizer, config.steps)
        first, seen, pending = step, set(), None
        if self.validation is not None and step == 0:
            self._validate(current)
        with contextlib.ExitStack() as profile:
            while step < config.steps and not stop.now(step):
                if self.profile_steps and step == first + PROFILE_AFTER:
                    profile.enter_context(jax.profiler.trace(str(self.out / PROFILE)))
                if self.profile_steps and step == first + PROFILE_AFTER + self.profile_steps:
                    profile.close()
                batch = next(device_batches)
                shape = self._describe(batch)
                with jax.set_mesh(self.mesh):
                    *updated, values = train_step(
                        current.trainable, current.opt_state, current.ema, current.frozen,
                        self.inputs(batch), current.key, current.step,
                    )  # fmt: skip
                    current = state.TrainState(current.step + 1, *updated, current.frozen, current.key)
                step += 1
                self._record(pending)
                facts = {"bucket": shape, "learning_rate": float(rate(step - 1)), "ids": batch["id"]}
                facts["clips"] = self.batches.clips_of(step - 1)
                pending = step, values, facts, shape not in seen
                seen.add(shape)
                checks = config.validation
                ends = step == config.steps
                looks = self.validation and (
                    ends or _due(step, checks.every) or _due(step, checks.videos_every)
                )
                saves = _due(step, config.checkpoint.every)
                if looks or saves or ends:
                    self._record(pending)
                    pending = None
                if looks:
                    self._validate(current)
                if saves:
                    self._save(current, device_batches)
            self._record(pending)
        return current

    def _describe(self, batch):
        """The bucket of a batch, as text: one program is compiled for each."""
        if "video" in batch:
            return "x".join(map(str, batch["video"].shape[1:4]))
        frames, height, width = batch["video_mean"].shape[1:4]
        compression = self.sources.base.config.vae.spatial_compression
        return f"{4 * frames - 3}x{compression * height}x{compression * width}"

    def _record(self, pending):
        """Writes a step's values to the log, once they are there.

        Raises:
            NonFiniteError: they are not finite. No checkpoint is made after that.
        """
        if pending is None:
            return
        step, values, facts, compiled = pending
        loss, norm = (float(values[name]) for name in ("loss", "grad_norm"))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._not_finite(
                f"loss {loss}, gradient norm {norm} in step {step} (bucket {facts['bucket']}, clips "
                f"{', '.join(facts['ids'])})"
            )
        self.log.step(
            step, loss=loss, grad_norm=norm, learning_rate=facts["learning_rate"], bucket=facts["bucket"],
            clips=facts["clips"], flops=self._flops(facts["bucket"]), compiled=compiled,
        )  # fmt: skip

    def _flops(self, bucket):
        frames, height, width = map(int, bucket.split("x"))
        compression = self.sources.base.config.vae.spatial_compression
        as_run = dataclasses.replace(self.sources.model_config, **self.parts.configs)  # with adapters
        return flops.train_step(
            self.config.stage, as_run,
            (latent_frames(frames), height // compression, width // compression),
            self.config.data.batch_size, self.config.data.view.num_references,
            on_the_fly=self.inputs.on_the_fly, trained=self.parts.trained,
        )  # fmt: skip

    def _validate(self, current):
        """Validation loss and videos, where they are due, of the moving average if there is one."""
        config, step = self.config.validation, int(current.step)
        trained = current.trainable if current.ema is None else current.ema
        at_end, found = step == self.config.steps, {}
        with self.log.pause():
            if config.every and (at_end or _due(step, config.every)):
                with jax.set_mesh(self.mesh):
                    found = self.validation.loss(trained, current.frozen)
                if not math.isfinite(found["loss"]):
                    raise self._not_finite(f"validation loss {found['loss']} after step {step}")
            if config.videos_every and step and (at_end or _due(step, config.videos_every)):
                scores = []
                for number, (videos, fps) in enumerate(self.validation.videos(trained, current.frozen)):
                    scores.append(float(psnr(videos["sample"], videos["target"]).mean()))
                    for name, frames in videos.items():
                        self.log.video(f"{number}_{name}", step, frames, fps)
                found |= {"psnr": sum(scores) / len(scores)}
            self.log.validation(step, found.pop("loss", None), **found)

    def _not_finite(self, what):
        self.checkpoints.wait()
        kept = self.checkpoints.latest_step()
        kept = "none yet" if kept is None else self.out / CHECKPOINTS / str(kept)
        return NonFiniteError(
            f"{what}; last good checkpoint: {kept}. Look at these clips, lower --optimizer.learning-rate, or "
            "start again with --compute.dtype float32"
        )

    def _save(self, current, device_batches, wait=False):
        step = int(current.step)
        with self.log.pause():
            if not bool(_finite(current)):  # loss and gradient are those of the parameters before the update
                raise self._not_finite(f"parameters or moments after step {step} are not finite")
            self.checkpoints.save(
                step, current, device_batches.get_state(), self.description["config"], wait=wait
            )


@jax.jit
def _finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _due(step, every):
    return bool(every) and step % every == 0


@contextlib.contextmanager
def _peers_named(checkpoints):
    """Names the process that is gone, where the devices report that they cannot reach those of another.

    Raises:
        ConnectionError: instead of JAX's error.
    """
    def last_checkpoint():
        step = checkpoints.latest_step()
        return None if step is None else checkpoints.directory / str(step)

    peers.keep(last_checkpoint)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        gone = peers.missing()
        if gone is None:  # all are there: this is something else, such as too little memory
            raise
        why = str(error).partition("\n")[0][:200]
        raise ConnectionError(peers.describe_death(gone, why)) from error


def _upload(folder, storage):
    """Copies a weights directory to a URL, config.json, without which it is none, at the end."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        with storage.writing(str(path.relative_to(folder))) as target:
            shutil.copyfile(path, target)


class _Stop:
    """Whether the run was told to stop: by SIGTERM, as preempted machines are, or by Ctrl-C.

    On several hosts JAX watches for SIGTERM, and all of them stop after the same step.
    """

    def __enter__(self):
        self.interrupted = self._told = False
        self._alone = jax.process_count() == 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._handle)}
        if self._alone:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self._told and number == signal.SIGINT:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._told = True
        self.interrupted = number == signal.SIGINT
        saves = self._alone or number == signal.SIGTERM
        print("stopping: saving a checkpoint first" if saves else "stopping", file=sys.stderr)

    def now(self, step):
        """Asked before every step, by every process."""
        if self._alone:
            return self._told
        if self.interrupted:
            raise KeyboardInterrupt  # one process cannot stop the others in an orderly way
        return multihost_utils.reached_preemption_sync_point(step)
