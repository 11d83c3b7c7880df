"""Speed and memory of training steps; one stage also beside a plain PyTorch loop.

    python tools/benchmark.py train --against torch
    python -m animecolor_jax.benchmarks_train --shape 2b-480x720x49 --json

The second form needs neither tyro nor PyAV nor anything else of data preparation: for a bare machine with
JAX, Flax and Optax. Weights and data are random, made on the device.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import benchmarks, flops
from animecolor_jax.config import AnimeColorConfig, HCEConfig, SchedulerConfig, preset
from animecolor_jax.networks import random_leaf
from animecolor_jax.platforms import GIB
from animecolor_jax.train import stages
from animecolor_jax.train.config import ComputeConfig, OptimizerConfig, TrainConfig
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.step import Objective, input_shapes, make_train_step
from data_pipeline.dataset import DataConfig

STAGES = (stages.SKETCH, stages.HCE, stages.LCG, stages.JOINT)
LOGVAR = -3.0  # of a VAE's posterior


@dataclass(frozen=True)
class Shape:
    """What a step is measured on."""

    text: str
    """What the report calls it."""
    model: AnimeColorConfig
    latents: tuple[int, int, int]
    """(T, H, W) of the clips' latents; references have H and W."""
    dtype: str
    """Of compute and frozen weights."""
    remat: str = "branches"


SMALL_DENOISER = dataclasses.replace(benchmarks.SMALL_DIT, in_channels=32)
SMALL = AnimeColorConfig(
    denoiser=SMALL_DENOISER,
    lcg=benchmarks.SMALL_DIT,
    # as much smaller than the 2B's as the denoiser is
    hce=HCEConfig(
        model_dim=SMALL_DENOISER.dim, num_cross=SMALL_DENOISER.num_layers // 2, dim=272, num_heads=4,
        feature_dim=344, summary_dim=688, output_dim=544, cross_num_heads=4, cross_head_dim=136,
    ),
    scheduler=SchedulerConfig(),
)
SHAPES = {
    "small": Shape("8 blocks x 512, 2026 tokens", SMALL, benchmarks.CPU_CLIP, "float32"),
    "2b-480x720x49": Shape("2B, 49x480x720", preset("animecolor-2b"), (13, 60, 90), "bfloat16", "products"),
    "2b-320x512x49": Shape("2B, 49x320x512", preset("animecolor-2b"), (13, 40, 64), "bfloat16", "products"),
}


def random_parameters(parts, frozen_dtype):
    """(trained, frozen) of `Parts`, made on the device."""
    trained_names, made = set(parts.trained), ({}, {})
    for number, (name, shape) in enumerate(sorted(parts.shapes.items())):
        trained, leaf_name = name in trained_names, name.partition("/")[2]
        dtype = "float32" if trained else frozen_dtype
        made[not trained][name] = random_leaf(leaf_name, shape, jax.random.key(number), dtype)
    return made


def random_inputs(model, latents, batch_size, stage):
    """What `step.clip_losses` reads, one reference for a clip, bfloat16 as in precomputed records."""
    inputs = {}
    for number, (name, shape) in enumerate(input_shapes(stage, model, latents).items()):
        shape = (batch_size, *shape)
        if name.endswith("_logvar"):
            inputs[name] = jnp.full(shape, LOGVAR, jnp.bfloat16)
        else:
            inputs[name] = jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)
    return inputs


class Step:
    """The compiled step of a stage, and what it updates, which is made when it first runs.

    Attributes:
        config: TrainConfig. parts: Parts.
        planned: bytes of the device that the program takes: arguments, temporaries and results, donated ones
            once.
    """

    def __init__(self, stage, shape, batch_size, **compute):
        """
        Args:
            stage: StageConfig. shape: Shape. compute: other fields of ComputeConfig.
        """
        compute = {"dtype": shape.dtype, "frozen_dtype": shape.dtype, "remat": shape.remat} | compute
        self.config = TrainConfig(
            stage, 1000, data=DataConfig(batch_size), compute=ComputeConfig(**compute),
            optimizer=OptimizerConfig(warmup_steps=0),
        )  # fmt: skip
        self.parts = Parts(self.config, shape.model)
        optimizer = make_optimizer(self.config.optimizer, self.config.steps, self.parts.trained)
        objective = Objective(self.parts, shape.model.scheduler, 1.0)
        train_step = make_train_step(objective, optimizer, self.config.optimizer)
        self.number, self._arrays = 0, None

        def make():
            trained, frozen = random_parameters(self.parts, self.config.compute.frozen_dtype)
            inputs = random_inputs(shape.model, shape.latents, batch_size, stage)
            return (trained, optimizer.init(trained), None), (frozen, inputs, jax.random.key(0))

        self._make = make
        updated, kept = jax.eval_shape(make)
        self._program = train_step.lower(*updated, *kept, jnp.int32(0)).compile()
        plan = self._program.memory_analysis()
        self.planned = (
            plan.argument_size_in_bytes + plan.temp_size_in_bytes
            + plan.output_size_in_bytes - plan.alias_size_in_bytes
        )  # fmt: skip

    @property
    def inputs(self):
        """{name: array} that every step reads."""
        return self._state()[1][1]

    def _state(self):
        if self._arrays is None:
            self._arrays = self._make()
        return self._arrays

    def __call__(self):
        """One update, to its end; returns the loss."""
        updated, kept = self._state()
        self._arrays = None  # donated
        *updated, values = self._program(*updated, *kept, jnp.int32(self.number))
        self._arrays, self.number = (jax.block_until_ready(updated), kept), self.number + 1
        return float(values["loss"])


def torch_step(step, shape):
    """The same update as `step` of a stage that trains the denoiser alone, as a plain PyTorch loop on
    diffusers' transformer; a function of nothing that returns the loss.

    Weights, timesteps and noise are its own; gradient checkpointing is on unless nothing is computed again
    in ours.
    """
    import torch
    from diffusers import DDPMScheduler

    from animecolor_jax.convert.scheduler import config_to_torch

    config, optimizer_config = step.config, step.config.optimizer
    model = benchmarks.torch_transformer(shape.model.denoiser).train()
    if config.compute.remat != "none":
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        model.parameters(), optimizer_config.learning_rate, (optimizer_config.beta1, optimizer_config.beta2),
        optimizer_config.eps, optimizer_config.weight_decay,
    )  # fmt: skip
    scheduler = DDPMScheduler.from_config(config_to_torch(shape.model.scheduler))

    def tensor(name):  # [B, t, h, w, C] -> [B, t, C, h, w]
        array = np.asarray(step.inputs[name].astype(jnp.float32))
        return torch.tensor(array.transpose(0, 1, 4, 2, 3) if array.ndim == 5 else array)

    mean, logvar, sketch, text = map(tensor, ("video_mean", "video_logvar", "sketch", "text"))

    def run():
        clean = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        predicted = model(torch.cat([noisy, sketch], 2), text, timesteps, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def speed(step, shape, theirs, repeats):
    """A line of the report as in `benchmarks.result`, and the step's "mfu", "planned_gib" and "peak_gib".

    MFU is None where the device has no known peak, and peak memory, that of the process so far, where it
    keeps none.
    """
    stage, batch_size = step.config.stage, step.config.data.batch_size
    sides = {"ours": step} | ({"theirs": theirs} if theirs else {})
    text = f"{shape.text}, batch {batch_size}"
    line = benchmarks.result(f"train step, {stage.name}", text, sides, repeats, dtype=shape.dtype)
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind, shape.dtype)
    work = flops.train_step(stage, shape.model, shape.latents, batch_size)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return line | {
        "tflop": work / 1e12,
        "mfu": peak and work / (line["ours"] * peak),
        "planned_gib": step.planned / GIB,
        "peak_gib": memory and memory / GIB,
    }


def memory_bound(stage, model, latents, batch_size, first, dtype):
    """Bytes that a stage may take by what it holds, where stage 1 takes `first`.

    That is as much as stage 1, and in `dtype` the weights of networks besides the denoiser, or of the
    denoiser where that is frozen and they are trained; and of the LCG its bank [depth, B, R, D], its gradient
    where the LCG is trained, and what its blocks hand to the backward pass, [depth, B, L + R, D]; and the
    image features that HCE reads.
    """
    itemsize = jnp.dtype(dtype).itemsize
    config = TrainConfig(stage, 1, data=DataConfig(batch_size))
    parts = Parts(config, model)
    total = first + itemsize * sum(parts.shapes[name].size for name in parts.frozen)
    if "lcg" in stage.conditions:
        reference, text = flops.tokens_of(model.lcg, (1, *latents[1:])), model.lcg.text_length
        tokens = reference * (2 if parts.trains_lcg else 1) + (text + reference) * parts.trains_lcg
        total += itemsize * model.lcg.num_layers * batch_size * tokens * model.lcg.dim
    if "hce" in stage.conditions:
        patches = flops.image_patches(model, latents[1:])
        total += 2 * batch_size * (model.hce.summary_dim + patches * model.hce.feature_dim)  # bfloat16
    return total


def train(against="none", repeats=5, shape="small", batch_size=1):
    """Time, MFU and memory of a step of each stage; stage 1 against PyTorch.

    Args:
        against: "torch" or "none". shape: name in `SHAPES`.

    Returns:
        A line for each stage, see `speed`, with "bound_gib": see `memory_bound`.
    """
    shape, lines = SHAPES[shape], []
    for stage in STAGES:
        step = Step(stage, shape, batch_size)
        theirs = torch_step(step, shape) if against == "torch" and stage is stages.SKETCH else None
        line = speed(step, shape, theirs, repeats)
        first = lines[0]["planned_gib"] if lines else line["planned_gib"]
        bound = memory_bound(stage, shape.model, shape.latents, batch_size, first * GIB, shape.dtype)
        lines.append(line | {"bound_gib": bound / GIB})
        del step, theirs  # before the next stage's weights are made
    return lines


def describe(line):
    """The report's line about what is not seconds: MFU and memory."""
    parts = [f"{line['tflop']:.3f} TFLOP"]
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"planned {line['planned_gib']:.2f} GiB (bound {line['bound_gib']:.2f})")
    if line["peak_gib"] is not None:
        parts.append(f"peak {line['peak_gib']:.2f} GiB")
    return ", ".join(parts)


def main(argv=None):
    """The measure without tools/benchmark.py."""
    parser = argparse.ArgumentParser(description="Time, MFU and memory of training steps.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--against", choices=["none", "torch"], default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args(argv)
    lines = train(args.against, args.repeats, args.shape, args.batch_size)
    for line in lines:
        ratio = "" if line["ratio"] is None else f"   theirs {line['theirs']:.3f}   ratio {line['ratio']:.2f}"
        print(f"{line['name']} ({line['shape']}): {line['ours']:.3f} s{ratio}   {describe(line)}")
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "results": lines}))


if __name__ == "__main__":
    main()
