"""FLOP counts: against the products that traced programs hold, and the figures of the 2B model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from whole_network_stages import STAGES

from animecolor_jax import flops
from animecolor_jax.config import preset
from animecolor_jax.models import attention
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.networks import NETWORKS
from animecolor_jax.train.config import StageConfig

TINY = preset("tiny")
LATENTS, REFERENCE = (3, 4, 8), (4, 6)  # latent sizes of clip and reference
VIDEO, TEXT = flops.tokens_of(TINY.denoiser, LATENTS), TINY.denoiser.text_length
PATCHES = 2 * 3  # of a reference, 16 pixels each


INTERVAL = preset("tiny").hce.interval


def products(jaxpr):
    """FLOPs of all matrix products and convolutions of a jaxpr, those of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            left, (contracted, _) = equation.invars[0].aval, params["dimension_numbers"][0]
            total += 2 * equation.outvars[0].aval.size * math.prod(left.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // out_channels
        else:
            assert name != "while", name
            times = params["length"] if name == "scan" else 1
            if name == "cond":  # the cross-attention after one block of each group
                times = 1 / INTERVAL
            total += times * sum(products(inner) for inner in jaxprs_in_params(params))
    return total


def traced(function, *args):
    """`products` of the function, what it computes for nothing left out as a compiler does."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def network(component, config=None):
    return nnx.eval_shape(lambda: NETWORKS[component](config or getattr(TINY, component), rngs=nnx.Rngs(0)))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def clip(batch=1):
    """Latents, sketch, text and timestep."""
    channels = TINY.denoiser.out_channels
    latents = array(batch, *LATENTS, channels)
    return latents, latents, array(batch, TEXT, TINY.denoiser.text_dim), array(batch)


def reference(batch=1, references=1):
    """Latents, summary and features."""
    return (
        array(batch, references, *REFERENCE, TINY.lcg.in_channels),
        array(batch, references, TINY.hce.summary_dim),
        array(batch, references, PATCHES, TINY.hce.feature_dim),
    )


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("conditions", [(), ("lcg",), ("hce",), ("hce", "lcg")])
def test_forward_of_the_model_is_what_its_program_holds(conditions, references):
    parts = {name: network(name) for name in conditions}
    model = AnimeColor(network("denoiser"), **parts)

    def predict(model, clip, reference):
        return model(*clip, model.conditions(*reference))

    stage = StageConfig("none", ((".*", False),), ("text", "sketch", *conditions))
    counted = flops.train_step(stage, TINY, LATENTS, 3, references, REFERENCE)
    assert counted == traced(predict, model, clip(3), reference(3, references))


def test_forward_of_each_part_is_what_its_program_holds():
    bank = 12
    bank_array = array(TINY.denoiser.num_layers, 1, bank, TINY.denoiser.dim)
    project = traced(lambda m, x: m.project_bank(x), network("denoiser"), bank_array)
    assert flops.project_bank(TINY.denoiser, bank) == project
    latents = array(1, 1, *REFERENCE, TINY.lcg.in_channels)
    write_bank = traced(lambda m, x: m.write_bank(x, TEXT), network("lcg"), latents)
    assert flops.lcg(TINY.lcg, REFERENCE) == write_bank
    key_value = traced(
        lambda m, *xs: m.key_value(m.qformer(*xs)),
        network("hce"),
        array(1, TINY.hce.summary_dim),
        array(1, PATCHES, TINY.hce.feature_dim),
    )
    assert flops.hce(TINY.hce, PATCHES) == key_value


@pytest.mark.parametrize("frames", [1, 5, 8, 11, 13])
def test_vae_encoding_is_what_its_program_holds(frames):
    video = array(1, frames, 16, 24, 3)
    counted = flops.vae_encode(TINY.vae, (frames, 16, 24))
    assert counted == traced(lambda m, x: m.encode(x), network("vae"), video)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_decoding_a_chunk_is_what_its_program_holds(frames):
    latents = array(1, frames, 4, 6, TINY.vae.latent_channels)
    counted = flops.vae_decode_chunk(TINY.vae, (frames, 4, 6))
    assert counted == traced(lambda m, x: m.decode_chunk(x)[0], network("vae"), latents)


def test_text_and_image_encoders_are_what_their_programs_hold():
    ids = array(1, 7, dtype=jnp.int32)
    assert flops.t5(TINY.text_encoder, 7) == traced(lambda m, x: m(x), network("text_encoder"), ids)
    image = array(1, 32, 48, 3)
    assert flops.radio(TINY.image_encoder, (32, 48)) == traced(
        lambda m, x: m(x), network("image_encoder"), image
    )


def step_products(stage, config=TINY):
    """`traced` of loss and gradients of a stage."""
    models = {name: network(name, getattr(config, name)) for name in stage.networks}
    names = flops.trained_networks(stage)
    split = {name: nnx.split(model) for name, model in models.items()}
    states = {name: state for name, (_, state) in split.items()}
    selected = {name: states.pop(name) for name in names}

    def loss(selected, frozen, clip, reference):
        merged = {name: nnx.merge(split[name][0], state) for name, state in (selected | frozen).items()}
        model = AnimeColor(**merged)
        conditions = model.conditions(*reference)
        return jnp.mean(jnp.square(model(*clip, conditions) - clip[0]))

    return traced(jax.value_and_grad(loss), selected, states, clip(2), reference(2))


def test_a_step_of_each_stage_is_what_its_program_holds(monkeypatch):
    # the only backend that computes no scores again
    monkeypatch.setattr(attention, "choose", lambda q: "xla")
    counted = {
        name: flops.train_step(stage, TINY, LATENTS, 2, 1, REFERENCE) for name, stage in STAGES.items()
    }
    # What programs compute beyond what is needed. Scanned blocks are all alike: gradients pass the first as
    # well; of the summary, which is joined to the features, the gradient is made as if all had one.
    both = flops.Gradients(activations=True)
    size = (TINY.denoiser, VIDEO + TEXT)
    wasted = flops.block(*size, gradients=both) - flops.block(*size)
    wasted += flops.dense(VIDEO, TINY.hce.model_dim, TINY.hce.cross_num_heads * TINY.hce.cross_head_dim)
    wasted += flops.dense(PATCHES, TINY.hce.feature_dim, TINY.hce.dim)
    extra = {"sketch": 0, "hce": 2 * wasted, "lcg": 0, "joint": 0}
    assert {name: step_products(stage) - counted[name] for name, stage in STAGES.items()} == extra


def test_a_frozen_bank_costs_no_gradient_of_its_keys_and_values():
    hce_beside_lcg = dataclasses.replace(STAGES["hce"], conditions=("text", "sketch", "hce", "lcg"))
    counted = flops.train_step(hce_beside_lcg, TINY, LATENTS, 1)
    alone = flops.train_step(STAGES["hce"], TINY, LATENTS, 1)
    bank, config = flops.tokens_of(TINY.denoiser, (1, *LATENTS[1:])), TINY.denoiser
    # of scores and values each the product, and in all but the first block the gradient of its left side
    product = 2 * (VIDEO + TEXT) * bank * config.dim
    made = flops.lcg(TINY.lcg, LATENTS[1:]) + flops.project_bank(config, bank)
    assert counted - alone == made + product * (2 + 4 * (config.num_layers - 1))


def test_adapters_alone_are_trained_where_there_are_any():
    adapted = dataclasses.replace(
        TINY, denoiser=dataclasses.replace(TINY.denoiser, lora_rank=4), lcg=None, hce=None
    )
    stage, plain = STAGES["sketch"], flops.train_step(STAGES["sketch"], TINY, LATENTS, 1)
    forward = flops.transformer(TINY.denoiser, LATENTS)
    counted = flops.train_step(stage, adapted, LATENTS, 1)
    assert forward < counted < plain
    assert flops.transformer(adapted.denoiser, LATENTS) == traced(
        lambda m, *xs: m(*xs), network("denoiser", adapted.denoiser),
        array(1, *LATENTS, TINY.denoiser.in_channels), *clip()[2:],
    )  # fmt: skip


def test_encoding_on_the_fly_is_added():
    stage, parts = STAGES["sketch"], flops.encoders(TINY, LATENTS, 2, REFERENCE)
    plain = flops.train_step(stage, TINY, LATENTS, 2, 2, REFERENCE)
    full = flops.train_step(stage, TINY, LATENTS, 2, 2, REFERENCE, on_the_fly=("latents", "text", "image"))
    clips, image = flops.vae_encode(TINY.vae, (9, 32, 64)), flops.vae_encode(TINY.vae, (1, 32, 48))
    assert full - plain == 2 * sum(parts.values()) and parts["latents"] == 2 * clips + 2 * image


def test_a_2b_forward_is_120_tflop_of_which_attention_is_73():
    config = preset("animecolor-2b").denoiser
    total = flops.transformer(config, (13, 60, 90))
    scores = config.num_layers * flops.attention(17776, 17776, config.dim)
    assert flops.tokens_of(config, (13, 60, 90)) + config.text_length == 17776
    assert [round(x / 1e12) for x in (total, total - scores, scores)] == [120, 47, 73]


def test_a_step_costs_three_forward_passes_where_all_is_trained():
    config = preset("animecolor-2b")
    step = flops.train_step(STAGES["sketch"], config, (13, 60, 90), 16)
    assert step / (16 * flops.transformer(config.denoiser, (13, 60, 90))) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_is_of_the_device_kind(kind, peak):
    assert flops.peak_flops(kind, "bfloat16") == peak
    assert flops.peak_flops(kind, "float32") is None


def test_patches_of_a_reference_follow_the_vae():
    full, mini = preset("animecolor-2b"), preset("mini")
    assert flops.image_patches(full, (60, 90)) == (480 // 16) * (720 // 16)
    assert flops.image_patches(mini, (24, 40)) == (96 // 16) * (160 // 16)
