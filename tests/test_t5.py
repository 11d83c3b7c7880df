"""T5 encoder: parity with transformers, masking, conversion table and config."""

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
from animecolor_jax.config import T5Config, preset
from animecolor_jax.convert.rules import compare, matching_rules, sources
from animecolor_jax.convert.t5 import RULES, config_from_torch, config_to_torch
from animecolor_jax.errors import InputError
from animecolor_jax.models.layers import unstack
from animecolor_jax.models.t5 import relative_position_buckets
from animecolor_jax.networks import creator, fresh

FIXTURES = Path(__file__).parent / "fixtures"
MANIFEST = json.loads((FIXTURES / "manifests" / "t5_v1_1_xxl_encoder.json").read_text())
CASES = [("t5", "no_mask"), ("t5", "with_mask"), ("t5_eps", "small")]
TINY = preset("tiny").text_encoder


def load_encoder(name, dtype):
    """(encoder, tensors, JSON) of a fixture."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    meta = json.loads((FIXTURES / f"{name}.json").read_text())
    weights = {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}
    shapes = {key: x.shape for key, x in weights.items()}
    config = config_from_torch(meta["config"]["model"], shapes, name)
    create = creator("text_encoder", dataclasses.replace(config, dtype=dtype))
    leaves = sources(RULES, params.abstract(create)[1])
    arrays = {leaf: jnp.asarray(source.load(weights.__getitem__)) for leaf, source in leaves.items()}
    return params.build(create, arrays, what=name, dtype=dtype), tensors, meta


def case_inputs(tensors, meta, case):
    ids = jnp.asarray(tensors[f"inputs/{case}/input_ids"].astype(np.int32))
    mask = jnp.asarray(tensors[f"inputs/{case}/attention_mask"])
    return ids, mask if meta["config"]["cases"][case]["mask"] else None


@jax.jit
def encode(encoder, ids, mask=None):
    return encoder(ids, mask)


@pytest.fixture(scope="module")
def tiny():
    return fresh("text_encoder", TINY, seed=0)


def hidden_states(encoder, ids, mask):
    """As transformers numbers them: the last one is after the final norm."""
    x, bias = encoder.embed(ids), encoder.position_bias(ids.shape[1])
    block = jax.jit(lambda block, *inputs: block(*inputs))
    for i in range(encoder.config.num_layers):
        yield x
        x = block(unstack(encoder.blocks, i), x, bias, mask)
    yield encoder.final_norm(x)


def outputs(encoder, ids, mask):
    values = {f"hidden_{i}": x for i, x in enumerate(hidden_states(encoder, ids, mask))}
    values["last_hidden_state"] = encode(encoder, ids, mask)
    return {name: np.asarray(x, np.float64) for name, x in values.items()}


@pytest.mark.parametrize(("fixture", "case"), CASES)
def test_every_hidden_state_equals_the_reference(fixture, case):
    encoder, tensors, meta = load_encoder(fixture, "float32")
    ours = outputs(encoder, *case_inputs(tensors, meta, case))
    wanted = {key for key in tensors if key.startswith(f"outputs/{case}/")}
    assert wanted == {f"outputs/{case}/{name}" for name in ours}
    for name, value in ours.items():
        reference = tensors[f"outputs/{case}/{name}"]
        assert np.abs(value - reference).max() <= meta["tolerance"]["default"] * np.abs(reference).max(), name


@pytest.mark.parametrize("case", ["no_mask", "with_mask"])
def test_bfloat16_error_is_at_most_that_of_the_reference(case):
    encoder, tensors, meta = load_encoder("t5", "bfloat16")
    for name, value in outputs(encoder, *case_inputs(tensors, meta, case)).items():
        reference = tensors[f"outputs/{case}/{name}"]
        rel_rms = np.sqrt(np.mean((value - reference) ** 2) / np.mean(reference.astype(np.float64) ** 2))
        assert rel_rms <= 1.5 * meta["bfloat16_vs_float32"][f"{case}/{name}"]["rel_rms"] + 1e-3, name


def test_output_has_the_compute_dtype():
    for dtype in ("float32", "bfloat16"):
        encoder = nnx.eval_shape(creator("text_encoder", dataclasses.replace(TINY, dtype=dtype)))
        out = jax.eval_shape(encode, encoder, jax.ShapeDtypeStruct((2, 7), jnp.int32))
        assert (out.shape, out.dtype) == ((2, 7, TINY.d_model), jnp.dtype(dtype))


def test_padding_takes_part_unless_it_is_masked(tiny):
    ids = jnp.array([[40, 50, 60, 1, 0, 0]])
    other = ids.at[0, 4:].set(77)
    mask = ids != 0
    np.testing.assert_array_equal(encode(tiny, ids, mask)[:, :4], encode(tiny, other, mask)[:, :4])
    assert jnp.abs(encode(tiny, ids) - encode(tiny, other))[:, :4].max() > 1e-3


def test_an_id_outside_the_vocabulary_is_not_silently_another_word(tiny):
    assert jnp.isnan(encode(tiny, jnp.array([[3, TINY.vocab_size]]))).any()


def test_buckets_by_hand():
    # 8 buckets: 4 for keys at or before the query (0, 1, 2-6, from 7: 2 log(d/2) / log(10) >= 1) and 4 after
    buckets = relative_position_buckets(12, 8, 20)
    np.testing.assert_array_equal(buckets[:, 0], [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3])
    np.testing.assert_array_equal(buckets[0, 1:], buckets[1:, 0] + 4)


@pytest.mark.torch
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (32, 256)])
def test_buckets_equal_transformers_at_every_distance(num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    position = torch.arange(600)
    theirs = t5.T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_position_buckets(600, num_buckets, max_distance), theirs.numpy())


def test_full_size_parameter_count_equals_the_manifest():
    config = config_from_torch(MANIFEST["config"], {}, "manifest")
    assert config == T5Config()
    assert params.parameter_count(creator("text_encoder", config)) == MANIFEST["total_parameters"]


def test_rules_match_every_manifest_key_once_and_with_its_shape():
    shapes = {key: tuple(shape) for key, (shape, _) in MANIFEST["keys"].items()}
    assert {len(matching_rules(RULES, key)) for key in shapes} == {1}
    leaves = sources(RULES, params.abstract(creator("text_encoder", T5Config()))[1])
    assert not compare(RULES, leaves, shapes)
    del shapes["encoder.embed_tokens.weight"]  # safetensors files do not have the tied copy
    assert not compare(RULES, leaves, shapes)


def test_config_survives_export():
    for config in (TINY, dataclasses.replace(T5Config(), norm_eps=1e-5, relative_attention_max_distance=64)):
        assert config_from_torch(json.loads(json.dumps(config_to_torch(config))), {}, "x") == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj"),
        ({"d_model": "4096"}, "d_model"),
        ({"num_layers": 0}, "num_layers"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
    ],
)
def test_another_architecture_is_refused(change, named):
    with pytest.raises(InputError, match=f"somewhere/config.json: {named}"):
        config_from_torch({**config_to_torch(TINY), **change}, {}, "somewhere/config.json")


def test_t5_1_0_is_refused_though_its_config_names_no_activation():
    config = config_to_torch(TINY)
    del config["feed_forward_proj"]
    with pytest.raises(InputError, match="relu"):
        config_from_torch(config, {}, "config.json")
