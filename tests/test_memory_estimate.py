"""The memory estimate of a training step: against what XLA plans for the real step, and how it moves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from whole_network_stages import STAGES

from animecolor_jax import sharding
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.platforms import device_memory
from animecolor_jax.train import memory, state
from animecolor_jax.train.config import ComputeConfig, OptimizerConfig, TrainConfig
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.step import Objective, make_train_step
from data_pipeline.dataset import DataConfig
from data_pipeline.shapes import Bucket

LATENTS = (5, 32, 32)
GIB = 2**30


def middle():
    """A model whose activations weigh far more than its constants, and whose blocks are scanned."""
    tiny = preset("tiny")
    denoiser = dataclasses.replace(
        tiny.denoiser, num_layers=8, head_dim=32, text_dim=64, text_length=64, sample_height=32,
        sample_width=32,
    )  # fmt: skip
    hce = dataclasses.replace(
        tiny.hce, model_dim=256, num_cross=4, dim=128, head_dim=32, output_dim=256, cross_num_heads=8,
        cross_head_dim=32,
    )  # fmt: skip
    return dataclasses.replace(
        tiny, denoiser=denoiser, lcg=dataclasses.replace(denoiser, in_channels=4), hce=hce
    )


MIDDLE = middle()


def run(stage, batch_size=8, remat="block", dtype="float32", **optimizer):
    compute = ComputeConfig(dtype=dtype, frozen_dtype=dtype, remat=remat)
    data, optimizer = DataConfig(batch_size), OptimizerConfig(**optimizer)
    return TrainConfig(STAGES[stage], 1000, data=data, compute=compute, optimizer=optimizer)


def planned(config, mesh_sizes):
    """Bytes of each device that XLA plans for the step: (all, of the state)."""
    mesh = sharding.make_mesh(**mesh_sizes)
    parts = Parts(config, MIDDLE)
    optimizer = make_optimizer(config.optimizer, config.steps, parts.trained)
    held = state.abstract(parts, optimizer, config, mesh)
    trained, opt_state = state.state_shardings(optimizer, held.trainable, mesh)
    clips = NamedSharding(mesh, P(("data", "fsdp")))

    def array(*shape):
        return jax.ShapeDtypeStruct((config.data.batch_size, *shape), jnp.bfloat16, sharding=clips)

    channels, (_, height, width) = MIDDLE.denoiser.out_channels, LATENTS
    inputs = {name: array(*LATENTS, channels) for name in ("video_mean", "video_logvar", "sketch")}
    names = ("reference_mean", "reference_logvar")
    inputs |= {name: array(1, height, width, channels) for name in names}
    inputs["text"] = array(MIDDLE.denoiser.text_length, MIDDLE.denoiser.text_dim)
    if "hce" in config.stage.conditions:
        inputs["image_summary"] = array(1, MIDDLE.hce.summary_dim)
        inputs["image_features"] = array(1, height * width // 4, MIDDLE.hce.feature_dim)
    objective = Objective(parts, MIDDLE.scheduler, 1.0)
    step = make_train_step(objective, optimizer, config.optimizer, (trained, opt_state, None))
    args = (held.trainable, held.opt_state, held.ema, held.frozen, inputs, held.key, held.step)
    with jax.set_mesh(mesh):
        plan = step.lower(*args).compile().memory_analysis()
    arguments, results = plan.argument_size_in_bytes, plan.output_size_in_bytes
    return arguments + plan.temp_size_in_bytes + results - plan.alias_size_in_bytes, arguments


@pytest.mark.parametrize(
    ("stage", "remat", "mesh_sizes"),
    [
        ("joint", "block", {"fsdp": 4, "context": 2}),
        ("joint", "products", {"fsdp": 8}),
        ("sketch", "none", {"fsdp": 8}),
    ],
)
@pytest.mark.slow
def test_estimate_is_within_half_of_what_xla_plans(stage, remat, mesh_sizes):
    config = run(stage, remat=remat)
    total, arguments = planned(config, mesh_sizes)
    found = memory.estimate(config, MIDDLE, LATENTS, mesh_sizes)
    assert 1 / 1.5 < found["total"] / total < 1.5
    held = sum(found[name] for name in ("trained", "moments", "ema", "frozen"))
    assert held < arguments < held + found["inputs"]


def test_estimate_is_the_sum_of_its_parts_and_follows_the_config():
    def total(stage="joint", mesh=None, **changes):
        found = memory.estimate(run(stage, **changes), MIDDLE, LATENTS, mesh or {"fsdp": 2})
        assert found["total"] == sum(size for name, size in found.items() if name != "total")
        return found["total"]

    plain = total()
    kept = [total(remat=policy) for policy in ("block", "attention", "branches", "products", "none")]
    assert kept == sorted(kept) and len(set(kept)) == 5
    assert total(mesh={"fsdp": 4}) < plain and total(mesh={"fsdp": 2, "context": 2}) < plain
    assert total(accumulate=4) < plain < total(ema=0.99)
    assert total(name="came") < plain and total(dtype="bfloat16") < plain


def test_frozen_parameters_have_neither_gradients_nor_moments():
    sizes = {name: memory.estimate(run(name), MIDDLE, LATENTS, {"fsdp": 2}) for name in STAGES}
    assert sizes["sketch"]["frozen"] == 0 and sizes["hce"]["frozen"] == sizes["sketch"]["trained"]
    for found in sizes.values():
        assert found["gradients"] == found["trained"]
        assert 2 * found["trained"] <= found["moments"] < 2 * found["trained"] + 100  # and the count


def test_encoders_are_held_only_where_they_encode():
    sizes = [
        memory.estimate(run("hce"), MIDDLE, LATENTS, {}, None, what)["encoders"]
        for what in ((), ("text",), ("text", "image"))
    ]
    assert 0 == sizes[0] < sizes[1] < sizes[2]


def test_a_bucket_that_does_not_fit_is_refused_by_name():
    buckets = [Bucket(17, 256, 256), Bucket(33, 256, 256)]
    config = run("sketch", batch_size=16, remat="none")
    small, large = (memory.estimate(config, MIDDLE, b.latents, {"fsdp": 2})["total"] for b in buckets)
    memory.check(config, MIDDLE, buckets, {"fsdp": 2}, large)
    memory.check(config, MIDDLE, buckets, {"fsdp": 2}, None)
    with pytest.raises(InputError) as caught:
        memory.check(config, MIDDLE, buckets, {"fsdp": 2}, small)
    message = str(caught.value)
    sizes = [f"{size / GIB:.1f} GiB" for size in (large, small)]
    for part in ("33x256x256", *sizes, "saved", "--compute.remat block", "--optimizer.accumulate 8"):
        assert part in message


def test_a_cpu_device_has_its_share_of_the_machine():
    device = jax.devices("cpu")[0]
    share = device_memory(device)
    with open("/proc/meminfo") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    assert share == pytest.approx(1024 * kibibytes / jax.local_device_count(), rel=0.01)
