"""RADIO: parity with NVlabs/RADIO, image sizes, conversion table and config."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from animecolor_jax import params
from animecolor_jax.config import RadioConfig, preset
from animecolor_jax.convert.radio import RULES, config_from_torch, config_to_torch
from animecolor_jax.convert.rules import compare, matching_rules, sources
from animecolor_jax.errors import InputError
from animecolor_jax.models.layers import Buffer, unstack
from animecolor_jax.networks import creator, fresh

FIXTURES = Path(__file__).parent / "fixtures"
MANIFEST = json.loads((FIXTURES / "manifests" / "radio_vit_h16.json").read_text())
MANIFEST_SHAPES = {key: tuple(shape) for key, (shape, _) in MANIFEST["keys"].items()}
TINY = preset("tiny").image_encoder
SIZE = 2 * TINY.patch_size, 3 * TINY.patch_size


def torch_shapes(config):
    """{torch key: shape} of a checkpoint of that network."""
    leaves = sources(RULES, params.abstract(creator("image_encoder", config))[1])
    return {key: source.shape for source in leaves.values() for key in source.keys}


def load_radio(name, dtype, align_corners):
    """(network, tensors, JSON) of a fixture."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    meta = json.loads((FIXTURES / f"{name}.json").read_text())
    weights = {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}
    config = config_from_torch(meta["config"]["model"], {key: x.shape for key, x in weights.items()}, name)
    create = creator("image_encoder", dataclasses.replace(config, dtype=dtype, align_corners=align_corners))
    leaves = sources(RULES, params.abstract(create)[1])
    arrays = {leaf: jnp.asarray(source.load(weights.__getitem__)) for leaf, source in leaves.items()}
    return params.build(create, arrays, what=name, dtype=dtype), tensors, meta


@jax.jit
def encode(radio, pixels):
    return radio(pixels)


@pytest.fixture(scope="module")
def tiny():
    return fresh("image_encoder", TINY, seed=0)


def outputs(radio, tensors, meta):
    """{output name: value} of every case."""
    values = {}
    for case in meta["config"]["cases"]:
        pixels = jnp.asarray(tensors[f"inputs/{case}/pixel_values"]).transpose(0, 2, 3, 1)
        summary, features = encode(radio, pixels.astype(radio.config.dtype))
        prefix = f"{case}/align_corners_{str(radio.config.align_corners).lower()}"
        values[f"{prefix}/summary"], values[f"{prefix}/features"] = summary, features
        values[f"{prefix}/pos_enc"] = radio.position_embedding(*pixels.shape[1:3])
    return {name: np.asarray(x, np.float64) for name, x in values.items()}


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("fixture", ["radio", "radio_mlpnorm", "radio_eps"])
def test_every_output_equals_the_reference(fixture, align_corners):
    radio, tensors, meta = load_radio(fixture, "float32", align_corners)
    ours = outputs(radio, tensors, meta)
    variant = f"align_corners_{str(align_corners).lower()}"
    assert {f"outputs/{name}" for name in ours} == {
        key for key in tensors if key.startswith("outputs/") and variant in key
    }
    for name, value in ours.items():
        reference = tensors[f"outputs/{name}"]
        assert np.abs(value - reference).max() <= meta["tolerance"]["default"] * np.abs(reference).max(), name


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("fixture", ["radio", "radio_mlpnorm"])
def test_bfloat16_error_is_at_most_that_of_the_reference(fixture, align_corners):
    radio, tensors, meta = load_radio(fixture, "bfloat16", align_corners)
    for name, value in outputs(radio, tensors, meta).items():
        reference = tensors[f"outputs/{name}"]
        rel_rms = np.sqrt(np.mean((value - reference) ** 2) / np.mean(reference.astype(np.float64) ** 2))
        assert rel_rms <= 1.5 * meta["bfloat16_vs_float32"][name]["rel_rms"] + 1e-3, name


def test_scan_equals_the_loop_over_blocks(tiny):
    pixels = jax.random.uniform(jax.random.key(0), (2, *SIZE, 3))
    patches = tiny.input_conditioner(pixels).reshape(2, 2, TINY.patch_size, 3, TINY.patch_size, 3)
    patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(2, 6, -1)  # (channel, row, column)
    x = tiny.patch_embed(patches) + tiny.position_embedding(*SIZE)
    x = jnp.concatenate([jnp.stack([tiny.prefix_tokens[...]] * 2), x], axis=1)
    block = jax.jit(lambda block, x: block(x))
    for i in range(TINY.depth):
        x = block(unstack(tiny.blocks, i), x)
    summary, features = encode(tiny, pixels)
    np.testing.assert_allclose(features, x[:, TINY.num_prefix_tokens :], atol=1e-5)
    np.testing.assert_allclose(summary, x[:, : TINY.num_summary_tokens].reshape(2, -1), atol=1e-5)


def test_outputs_have_the_compute_dtype():
    for dtype in ("float32", "bfloat16"):
        radio = nnx.eval_shape(creator("image_encoder", dataclasses.replace(TINY, dtype=dtype)))
        pixels = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32)
        summary, features = jax.eval_shape(encode, radio, pixels)
        assert summary.shape == (2, TINY.num_summary_tokens * TINY.embed_dim)
        assert features.shape == (2, 6, TINY.embed_dim)
        assert {summary.dtype, features.dtype} == {jnp.dtype(dtype)}


def test_position_table_is_unchanged_at_its_own_size():
    side = TINY.table_size * TINY.patch_size
    for align_corners in (True, False):
        radio = fresh("image_encoder", dataclasses.replace(TINY, align_corners=align_corners), seed=0)
        np.testing.assert_array_equal(radio.position_embedding(side, side)[0], radio.position_table[...])


def test_one_patch_has_the_first_position_with_aligned_corners(tiny):
    one = tiny.position_embedding(TINY.patch_size, TINY.patch_size)
    np.testing.assert_array_equal(one[0, 0], tiny.position_table[0])


@pytest.mark.parametrize("size", [(SIZE[0] + 1, SIZE[1]), (SIZE[0], SIZE[1] - 1), (0, SIZE[1])])
def test_sides_must_be_multiples_of_the_patch(tiny, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of {TINY.patch_size}"):
        tiny(jnp.zeros((1, *size, 3)))
    with pytest.raises(ValueError, match="multiples"):
        tiny.position_embedding(*size)


def test_full_size_parameter_count_equals_the_manifest_with_buffers_apart():
    config = config_from_torch(MANIFEST["config"], MANIFEST_SHAPES, "manifest")
    assert config == RadioConfig()
    assert params.parameter_count(creator("image_encoder", config)) == MANIFEST["total_parameters"]
    state = nnx.state(nnx.eval_shape(creator("image_encoder", config)), Buffer)
    buffers = params.flatten(nnx.to_pure_dict(state))
    assert set(buffers) == {"input_conditioner/mean", "input_conditioner/std", "summary_indices"}
    elements = sum(buffer.size for buffer in buffers.values())
    assert elements == MANIFEST["total_state_dict_elements"] - MANIFEST["total_parameters"]


def test_rules_match_every_manifest_key_once_and_with_its_shape():
    assert {len(matching_rules(RULES, key)) for key in MANIFEST_SHAPES} == {1}
    leaves = sources(RULES, params.abstract(creator("image_encoder", RadioConfig()))[1])
    assert not compare(RULES, leaves, MANIFEST_SHAPES)


@pytest.mark.parametrize(
    ("config", "num_heads"),
    [
        ({"timm_model": "vit_base_patch16_224"}, 12),
        ({"model": "vit_large_patch16_224"}, 16),
        ({"args": {"model": "vit_huge_patch16_224"}}, 16),
        ({"args": {"model": "vit_giant_patch16_224"}}, 24),
        ({"timm_model": "vit_huge_patch16_224", "num_heads": 8}, 8),
    ],
)
def test_heads_follow_from_the_config(config, num_heads):
    shapes = torch_shapes(dataclasses.replace(TINY, embed_dim=48))
    assert config_from_torch(config, shapes, "x").num_heads == num_heads


def test_sizes_follow_from_the_shapes_and_the_config_survives_export():
    for config in (
        TINY,
        dataclasses.replace(TINY, mlp_norm=True, align_corners=False, depth=3, norm_eps=1e-5),
        dataclasses.replace(TINY, embed_dim=44, mlp_ratio=48 / 11, patch_size=14, num_summary_tokens=3),
    ):
        exported = json.loads(json.dumps(config_to_torch(config)))
        assert config_from_torch(exported, torch_shapes(config), "x") == config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "number of attention heads is unknown"),
        ({"model": "eradio"}, "eradio"),
        ({"num_heads": 5}, "do not divide"),
        ({"num_heads": "4"}, "num_heads"),
        ({"num_heads": 4, "align_corners": "yes"}, "align_corners"),
    ],
)
def test_an_unusable_config_is_refused(config, named):
    with pytest.raises(InputError, match=f"somewhere.*{named}"):
        config_from_torch(config, torch_shapes(TINY), "somewhere")


def test_a_tensor_that_is_missing_or_misshapen_is_named():
    config, shapes = config_to_torch(TINY), torch_shapes(TINY)
    table = "radio_model.model.patch_generator.pos_embed"
    with pytest.raises(InputError, match=f"{table} is missing"):
        config_from_torch(config, {key: shape for key, shape in shapes.items() if key != table}, "x")
    with pytest.raises(InputError, match=f"(?s){table} is .*square"):
        config_from_torch(config, {**shapes, table: (1, 60, TINY.embed_dim)}, "x")
