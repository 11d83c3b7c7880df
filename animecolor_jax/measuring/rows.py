"""The rows of the measurement: what runs, and how long that is expected to take."""

import importlib.util
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from animecolor_jax import benchmarks, benchmarks_attention, benchmarks_train, doctor, flops
from animecolor_jax.measuring import parts
from animecolor_jax.models.animecolor import Conditions
from animecolor_jax.models.convolution import conv2d

WITHOUT_DIFFUSERS = (
    "diffusers is not installed; without network: `pip download diffusers==0.42.1 --no-deps` elsewhere, here "
    "`pip install --no-deps` of that wheel; of its needs it imports huggingface_hub >= 1.32, safetensors, "
    "regex, requests, filelock, Pillow"
)


RATES = {
    "matmul_tflops": ("matrix products", "TFLOP/s"),
    "attention_tflops": ("attention", "TFLOP/s"),
    "attention_backward_tflops": ("attention with its gradients", "TFLOP/s"),
    "convolution_tflops": ("convolutions of the VAE", "TFLOP/s"),
    "memory_gb": ("memory", "GB/s"),
}


class Lacking(Exception):
    """What a row needs is not installed; the message says what, and how to get it."""


class Row(NamedTuple):
    """One row.

    Attributes:
        text: what it is, for people. measure: function of a `sizes.Size` -> lines as of `benchmarks.compare`.
        seconds: that it is expected to take at size 2b on an H200, with the compilation.
    """

    text: str
    measure: object
    seconds: int


def roofline(size):
    """Rates that the bounds of the other rows are made of."""
    found = doctor.rates(size.model.denoiser, size.latents, size.dtype)
    found["convolution_tflops"] = convolution_rate(size)
    peak = {"peak_tflops": found["peak_tflops"]}
    return [
        benchmarks.compare(name, size.text, [found[key]], unit=unit, dtype=size.dtype) | {"rate": key} | peak
        for key, (name, unit) in RATES.items()
    ]


def convolution_rate(size):
    """TFLOP/s of the VAE's convolutions over a frame and the two before it, of the width that is fastest."""
    best = 0.0
    for level, width in enumerate(size.model.vae.block_out_channels):
        height, columns = (side // 2**level for side in size.clip[1:])
        frame = size.normal(0, 1, height, columns, 3 * width)
        kernel = size.normal(1, 3, 3, 3 * width, width)
        seconds = doctor.seconds_of(jax.jit(conv2d), frame, kernel)
        best = max(best, flops.dense(height * columns, 27 * width, width) / seconds / 1e12)
    return best


def attention(size):
    """Every backend, against PyTorch where that is installed."""
    against = "torch" if importlib.util.find_spec("torch") else "none"
    return benchmarks_attention.attention(against, size.repeats, size.attention)


def extra(size):
    """A step of AnimeColor against one of plain CogVideoX: ratios are plain / AnimeColor."""
    ours, theirs = parts.animecolor_loop(size, size.animecolor()), plain_loop(size, size.plain())
    seconds = benchmarks.alternate({"ours": ours, "theirs": theirs}, size.repeats)
    name = "step of AnimeColor against plain CogVideoX"
    return [benchmarks.compare(name, size.text, **seconds, calls=size.loop_steps, dtype=size.dtype)]


def plain_loop(size, model):
    """Function of nothing that runs `loop_steps` steps of plain CogVideoX with guidance."""
    latents, text, sampler = parts.loop_inputs(size)
    empty = jnp.zeros((*latents.shape[:-1], 0), size.dtype)
    return lambda: benchmarks.denoise_loop(model, latents, empty, text, Conditions(None, None), sampler)


def cogvideox(against, size):
    """A step of plain CogVideoX against diffusers.

    Args:
        against: "eager" or "torch.compile".
    """
    try:
        import torch
        from diffusers import CogVideoXTransformer3DModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # diffusers' lazy imports raise the latter
        if importlib.util.find_spec("torch") is None:
            raise Lacking("PyTorch is not installed: pip install torch") from error
        raise Lacking(f"{WITHOUT_DIFFUSERS} ({error})") from error
    latents, text, _ = parts.loop_inputs(size)
    model = benchmarks.torch_transformer(size.model.lcg, size.dtype, benchmarks.torch_device())
    if against == "torch.compile":
        model = torch.compile(model, backend=size.torch_backend)
    sides = {
        "ours": plain_loop(size, size.plain()),
        "theirs": benchmarks.torch_loop(model, latents, text, size.loop_steps, size.model.scheduler),
    }
    name = f"step of plain CogVideoX against diffusers, {against}"
    seconds = benchmarks.alternate(sides, size.repeats)
    return [benchmarks.compare(name, size.text, **seconds, calls=size.loop_steps, dtype=size.dtype)]


def train(stage, shape_name, size):
    """A training step of one clip."""
    shape = size.train[shape_name]
    step = benchmarks_train.Step(stage, shape, 1)
    line = benchmarks_train.speed(step, shape, None, size.repeats)
    return [line | {"stage": stage.name, "train": shape_name}]


def rows(size):
    """{name: Row}, those that matter most first."""
    found = {
        "roofline": Row("rates of products, attention, convolutions and memory", roofline, 60),
        "clip": Row("seconds per clip and cold start", parts.clip, 300),
        "step": Row("one denoising step", parts.step, 70),
        "cogvideox-eager": Row("plain CogVideoX against diffusers", partial(cogvideox, "eager"), 100),
        "cogvideox-compiled": Row(
            "plain CogVideoX against diffusers, compiled", partial(cogvideox, "torch.compile"), 240
        ),
        "extra": Row("AnimeColor against plain CogVideoX", extra, 90),
        "vae-decode": Row("VAE decode", parts.vae_decode, 60),
        "vae-encode": Row("VAE encode", parts.vae_encode, 60),
        "conditions": Row("LCG and HCE", parts.conditions, 50),
        "text": Row("text encoder", parts.text, 50),
        "image": Row("image encoder", parts.image, 40),
        "clip-step-cache": Row("seconds per clip, fewer steps of the blocks", parts.clip_step_cache, 120),
        "clip-offloaded": Row("seconds per clip, networks offloaded", parts.clip_offloaded, 240),
        "attention": Row("attention against PyTorch", attention, 60),
    }
    for shape in size.train:
        for stage in benchmarks_train.STAGES:
            measure = partial(train, stage, shape)
            found[f"train-{stage.name}-{shape}"] = Row(f"training step, {stage.name}, {shape}", measure, 120)
    return found
