"""What tools/doctor.py looks at beside whether these devices compute right (`parity.devices`): how fast they
are, and what all of it means.

Rates are of products and attention alone, so times that follow from them are bounds that no step beats.
"""

import contextlib
import platform
import time

import jax
import jax.numpy as jnp

from animecolor_jax import flops
from animecolor_jax.models.attention import attention
from animecolor_jax.platforms import GIB, USABLE, device_memory
from animecolor_jax.train import memory, stages
from animecolor_jax.train.config import REMAT, ComputeConfig, TrainConfig
from data_pipeline.dataset import DataConfig

STAGES = {stages.SKETCH: 50_000, stages.HCE: 25_000, stages.LCG: 30_000, stages.JOINT: 50_000}  # the paper's
PAPER_BATCH = 16
KEEPING = REMAT[1:-1]  # between "none", which keeps norms and the like as well, and "block"
CPU_TOKENS = 2048
MEASURE_SECONDS = 1.0


def environment():
    """Versions and devices."""
    devices = jax.devices()
    limit = device_memory(jax.local_devices()[0])
    return {
        "python": platform.python_version(), "jax": jax.__version__, "platform": jax.default_backend(),
        "device": devices[0].device_kind, "devices": len(devices),
        "memory_gib": limit and limit / GIB,
    }  # fmt: skip


# ---------------------------------------------------------------- rates


def rates(config, latents, dtype):
    """What one device does in a second, on the denoiser's own shapes.

    Args:
        config: TransformerConfig. latents: (T, H, W). dtype: of the arithmetic.

    Returns:
        {"matmul_tflops", "attention_tflops", "attention_backward_tflops", "memory_gb", "peak_tflops" (of the
        data sheet, or None), "tokens"}.
    """
    tokens = config.text_length + flops.tokens_of(config, latents)
    if jax.default_backend() == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    key = jax.random.key(0)

    def normal(*shape):
        return jax.random.normal(key, shape, dtype)

    dim = config.dim
    product, sides = jax.jit(lambda x, w: x @ w), (normal(tokens, dim), normal(dim, 4 * dim))
    q = normal(1, tokens, config.num_heads, config.head_dim)
    forward = jax.jit(lambda q: attention(q, q, q))
    backward = jax.jit(lambda q: jax.vjp(attention, q, q, q)[1](q))
    copied = jnp.zeros(2**22 if jax.default_backend() == "cpu" else 2**26, jnp.float32)
    work = flops.attention(tokens, tokens, dim)
    peak = flops.peak_flops(jax.devices()[0].device_kind, dtype)
    return {
        "tokens": tokens,
        "matmul_tflops": flops.dense(tokens, dim, 4 * dim) / seconds_of(product, *sides) / 1e12,
        "attention_tflops": work / seconds_of(forward, q) / 1e12,
        # twice the forward's products; what is computed again does not count
        "attention_backward_tflops": 3 * work / seconds_of(backward, q) / 1e12,
        "memory_gb": 2 * copied.nbytes / seconds_of(jax.jit(lambda x: x + 1), copied) / 1e9,
        "peak_tflops": peak and peak / 1e12,
    }  # fmt: skip


def seconds_of(function, *args):
    """Seconds of a call of a jitted function, of many that follow each other."""
    jax.block_until_ready(function(*args))
    calls, began = 1, time.perf_counter()
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        now = time.perf_counter()
        if now - began > MEASURE_SECONDS:
            return (now - started) / calls
        calls *= 2


# ---------------------------------------------------------------- what follows


def training(model, latents, found, devices, limit_bytes):
    """For each stage: the largest batch that fits, and how long the paper's iterations take at least.

    Args:
        model: AnimeColorConfig. found: of `rates`. limit_bytes: of a device, or None.

    Returns:
        {stage: {"batch" (0: not even one clip a device; None: memory unknown), "gib" (of each device at the
        paper's batch), "remat" (the policy that computes least again and fits at the paper's batch),
        "seconds_per_step", "hours"}}, the last two at the paper's batch.
    """
    stages_found, paper_batch = {}, -(-PAPER_BATCH // devices) * devices
    for stage, steps in STAGES.items():

        def needed(batch, remat="block", stage=stage):
            compute = ComputeConfig(remat=remat)
            config = TrainConfig(stage=stage, steps=1, data=DataConfig(batch_size=batch), compute=compute)
            return memory.estimate(config, model, latents, {"fsdp": devices})["total"]

        seconds = step_seconds(stage, model, latents, found, PAPER_BATCH) / devices
        batch, remat = None, "block"
        if limit_bytes is not None:
            sizes = (devices * clips for clips in (16, 8, 4, 2, 1))
            batch = next((size for size in sizes if needed(size) <= limit_bytes), 0)
            most = USABLE * limit_bytes
            remat = next((policy for policy in KEEPING if needed(paper_batch, policy) <= most), remat)
        stages_found[stage.name] = {
            "batch": batch, "gib": needed(paper_batch) / GIB, "remat": remat,
            "seconds_per_step": seconds, "hours": seconds * steps / 3600,
        }  # fmt: skip
    return stages_found


def step_seconds(stage, model, latents, found, batch_size):
    """Seconds of one device that no training step of `batch_size` clips beats. Arguments as of `training`."""
    config, work = model.denoiser, flops.train_step(stage, model, latents, batch_size)
    tokens = config.text_length + flops.tokens_of(config, latents)
    attended = config.num_layers * flops.attention(tokens, tokens, config.dim)
    share = attended / flops.transformer(config, latents)
    rates = found["attention_backward_tflops"], found["matmul_tflops"]
    return work / 1e12 * (share / rates[0] + (1 - share) / rates[1])


def loading(path, needed, seconds=10.0, batch_size=4):
    """Clips a second that this computer reads and decodes, one host, and how many a step needs.

    Args:
        path: dataset. needed: clips a second that training uses up. seconds: to measure for.
    """
    from data_pipeline import records  # Grain and its like are an extra
    from data_pipeline.dataset import training_batches

    config = DataConfig(batch_size=batch_size)
    with contextlib.closing(training_batches(records.open_clips(path), config)) as batches:
        next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            count += batch_size
        rate = count / (time.perf_counter() - began)
    return {"clips_per_second": rate, "needed": needed}


def named(check):
    """What a check of `parity.devices` is of, in words."""
    backend = "" if check["backend"] == "auto" else f"attention {check['backend']}"
    return f"{' with '.join(filter(None, (check.get('network'), backend)))} in {check['dtype']}"


def advice(about, checks, found, stages_found, loader=None):
    """What to change, in sentences; none where all is well."""
    said = []
    for check in checks:
        name = named(check)
        if check["passed"] is None:
            said.append(f"no {name} here: it is slow without")
        elif "why" in check:
            said.append(f"{name} does not run: {check['why']}")
        elif not check["passed"]:
            wrong = "not finite" if check["error"] is None else f"wrong by {check['error']:.1e}"
            said.append(
                f"{name} is {wrong} (at most {check['limit']:.0e}): update the driver and JAX, choose "
                "another dtype or backend (--compute.dtype, --compute.attention), and report it"
            )
    if about["platform"] == "cpu":
        said.append("no GPU or TPU is seen: the bundled model and the tiny stages run here, the 2B does not")
    peak = found["peak_tflops"]
    if peak and found["matmul_tflops"] < 0.5 * peak:
        said.append(
            f"products reach {found['matmul_tflops'] / peak:.0%} of the data sheet: is another process on "
            "the device, or its clock limited?"
        )
    for name, stage in stages_found.items():
        if stage["batch"] is not None and stage["batch"] < PAPER_BATCH:
            parts = max(1, PAPER_BATCH // max(stage["batch"], about["devices"]))
            said.append(
                f"{name}: the paper's batch of {PAPER_BATCH} takes {stage['gib']:.0f} GiB of each device: "
                f"use --optimizer.accumulate {parts}, a mesh with context, smaller clips or more devices"
            )
        elif stage["remat"] != "block":
            said.append(
                f"{name}: at the paper's batch of {PAPER_BATCH} memory suffices for --compute.remat "
                f"{stage['remat']}, which computes less again than block"
            )
    if loader is not None and loader["clips_per_second"] < loader["needed"]:
        said.append(
            f"reading gives {loader['clips_per_second']:.1f} clips/s, training takes {loader['needed']:.1f}: "
            "precompute (tools/prepare_data.py --precompute) or add data.load workers"
        )
    return said
