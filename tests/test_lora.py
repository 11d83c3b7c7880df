"""Low-rank adapters: merged, exported, imported, and as diffusers applies them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from animecolor_jax import params, safetensors_io
from animecolor_jax.config import preset
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.convert.lora import (
    METADATA,
    adapters,
    export_lora,
    import_lora,
    merge,
    merge_into_weights,
)
from animecolor_jax.errors import InputError
from animecolor_jax.networks import abstract, creator, initial_leaves
from animecolor_jax.weights import Weights, WeightsWriter, write_initial

RANK, ALPHA = 3, 4.0
SIZE = (3, 4, 6)  # latent frames, height, width: those of the position table, which diffusers does not resize
CONFIG = dataclasses.replace(
    preset("tiny").denoiser,
    num_layers=2,
    num_heads=2,
    in_channels=4,
    text_length=8,
    sample_frames=9,
    sample_height=4,
    sample_width=6,
)
FIRST = "transformer.transformer_blocks.0.attn1.to_q"


def lora_config(config=CONFIG):
    return dataclasses.replace(config, lora_rank=RANK, lora_alpha=ALPHA)


def random_params(config, seed=0):
    """A denoiser's parameters in which nothing is zero, adapters included."""
    rng = np.random.default_rng(seed)
    leaves = initial_leaves("denoiser", config, seed)
    return {name: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in leaves}


@pytest.fixture(scope="module")
def trained():
    return random_params(lora_config())


def inputs(config=CONFIG):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, *SIZE, config.in_channels), np.float32)
    text = rng.standard_normal((2, config.text_length, config.text_dim), np.float32)
    return jnp.asarray(latents), jnp.asarray(text), jnp.asarray([321, 7])


def predict(config, leaves):
    model = params.build(creator("denoiser", config), jax.tree.map(jnp.asarray, leaves), what="test")
    return np.asarray(jax.jit(lambda model, *xs: model(*xs))(model, *inputs(config)))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def assert_bitwise_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (leaf.dtype, leaf.shape), name
        assert np.asarray(ours[name]).tobytes() == np.asarray(leaf).tobytes(), name


def read_file(path):
    with safetensors_io.Reader(path) as reader:
        return {name: reader.read(name) for name in reader.specs}, reader.metadata


def write_file(path, tensors, metadata=None):
    safetensors_io.write(path, tensors, tensors.items(), metadata)
    return path


@pytest.fixture
def exported(trained, tmp_path):
    """(path, tensors) of an exported file without its header."""
    export_lora(tmp_path / "lora.safetensors", trained, RANK, ALPHA)
    return tmp_path / "changed.safetensors", read_file(tmp_path / "lora.safetensors")[0]


def test_the_merged_model_computes_what_the_one_with_adapters_does(trained):
    merged = merge(trained, RANK, ALPHA)
    assert merged.keys() == abstract("denoiser", CONFIG).keys()
    assert_close(predict(CONFIG, merged), with_adapters := predict(lora_config(), trained))
    plain = {name: leaf for name, leaf in trained.items() if name not in adapters(trained)}
    assert np.abs(predict(CONFIG, plain) - with_adapters).max() > 0.01  # the adapters matter


def test_merging_adds_the_product_to_each_layers_kernel_and_shares_the_rest(trained):
    merged = merge(trained, RANK, ALPHA)
    for layer in ("q", "k", "v", "out"):
        name = f"blocks/attn/{layer}"
        kernel, a, b = (
            trained[f"{name}/{leaf}"].astype(np.float64) for leaf in ("kernel", "lora_a", "lora_b")
        )
        expected = [w + ALPHA / RANK * x @ y for w, x, y in zip(kernel, a, b, strict=True)]
        np.testing.assert_allclose(merged.pop(f"{name}/kernel"), expected, atol=1e-6)
    assert all(merged[name] is trained[name] for name in merged)


@pytest.mark.parametrize("convert", [jnp.asarray, lambda leaf: leaf], ids=["jax", "numpy"])
def test_merging_into_bfloat16_rounds_once(trained, convert):
    low = {
        name: convert(leaf if "lora" in name else leaf.astype(ml_dtypes.bfloat16))
        for name, leaf in trained.items()
    }
    name = "blocks/attn/v"
    merged = merge(low, RANK, ALPHA)[f"{name}/kernel"]
    product = trained[f"{name}/lora_a"].astype(np.float64) @ trained[f"{name}/lora_b"]
    exact = np.asarray(low[f"{name}/kernel"], np.float64) + ALPHA / RANK * product
    assert merged.dtype == jnp.bfloat16
    # half a unit in the last of 8 bits, and what float32 leaves
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8 * 1.001, atol=1e-6)


def test_alpha_0_means_the_rank(trained, tmp_path):
    assert_bitwise_equal(merge(trained, RANK, 0.0), merge(trained, RANK, RANK))
    export_lora(tmp_path / "lora.safetensors", trained, RANK, 0.0)
    assert import_lora(tmp_path / "lora.safetensors", CONFIG)[2] == RANK


def test_merging_refuses_adapters_that_do_not_belong_together(trained):
    half = {name: leaf for name, leaf in trained.items() if name != "blocks/attn/q/lora_b"}
    with pytest.raises(ValueError, match="blocks/attn/q/lora_a"):
        merge(half, RANK, ALPHA)
    with pytest.raises(ValueError, match="rank 3, not 4"):
        merge(trained, 4, ALPHA)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_export_and_import_give_every_bit_back(trained, dtype, tmp_path):
    path = tmp_path / "lora.safetensors"
    leaves = {name: leaf.astype(dtype) for name, leaf in adapters(trained).items()}
    export_lora(path, {name: jnp.asarray(leaf) for name, leaf in leaves.items()}, RANK, ALPHA)
    imported, rank, alpha = import_lora(path, CONFIG)
    assert (rank, alpha) == (RANK, ALPHA)
    assert_bitwise_equal(imported, {name: leaf.astype(np.float32) for name, leaf in leaves.items()})
    export_lora(tmp_path / "again.safetensors", imported, rank, alpha)
    if dtype == np.float32:
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_file_has_diffusers_names_and_settings(trained, tmp_path):
    export_lora(tmp_path / "lora.safetensors", trained, RANK, ALPHA)
    tensors, metadata = read_file(tmp_path / "lora.safetensors")
    linears = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [f"transformer_blocks.{i}.attn1.{linear}" for i in range(2) for linear in linears]
    names = [f"transformer.{layer}.lora_{half}.weight" for layer in layers for half in "AB"]
    assert sorted(tensors) == sorted(names)
    last = tensors["transformer.transformer_blocks.1.attn1.to_out.0.lora_A.weight"]
    np.testing.assert_array_equal(last, trained["blocks/attn/out/lora_a"][1].T)
    settings = json.loads(metadata[METADATA])
    assert settings["transformer.r"] == RANK and settings["transformer.lora_alpha"] == ALPHA
    assert settings["transformer.target_modules"] == sorted(layers)


@pytest.mark.parametrize("rename", [
    lambda key: key.removeprefix("transformer."),
    lambda key: key.replace(".weight", ".default.weight"),
])  # fmt: skip
def test_other_spellings_of_the_names_are_read(exported, trained, rename):
    path, tensors = exported
    write_file(path, {rename(key): value for key, value in tensors.items()})
    leaves, rank, alpha = import_lora(path, CONFIG)
    assert (rank, alpha) == (RANK, RANK)  # no header: as diffusers
    assert_bitwise_equal(leaves, adapters(trained))


def with_alphas(tensors, value=2.0):
    layers = {key.split(".lora_")[0] for key in tensors}
    return {**tensors, **{f"{layer}.alpha": np.float32(value) for layer in layers}}


def header(**settings):
    return {METADATA: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def test_alpha_comes_from_the_argument_else_the_file_else_the_rank(exported):
    path, tensors = exported
    for alphas, metadata, given, expected in [
        (tensors, None, None, RANK),
        (with_alphas(tensors), None, None, 2),
        (with_alphas(tensors), header(lora_alpha=2), None, 2),
        (tensors, header(lora_alpha=1.5, use_rslora=True), None, 1.5 * math.sqrt(RANK)),
        (tensors, {METADATA: '{"lora_alpha": 6}'}, None, 6),  # of a transformer saved alone
        (with_alphas(tensors), header(lora_alpha=3), 9.0, 9),
    ]:
        write_file(path, alphas, metadata)
        assert import_lora(path, CONFIG, given)[2] == pytest.approx(expected, rel=1e-6)


def change(tensors, changes):
    """`tensors` with those of `changes` replaced, or left out where the value is None."""
    return {key: value for key, value in {**tensors, **changes}.items() if value is not None}


def test_every_key_that_does_not_fit_is_named_in_one_error(exported):
    path, tensors = exported
    dim = CONFIG.dim
    second = FIRST.replace("0", "1")
    write_file(path, change(tensors, {
        f"{FIRST}.lora_B.weight": None,
        f"{FIRST}.lora_A.other.weight": np.zeros((RANK, dim), np.float32),
        f"{second}.lora_A.weight": np.zeros((RANK + 1, dim), np.float32),
        f"{second}.lora_B.weight": np.zeros((dim, RANK), np.int32),
        f"{second}.lora_magnitude_vector": np.zeros(dim, np.float32),
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": np.zeros((RANK, 4 * dim), np.float32),
        "transformer.transformer_blocks.2.attn1.to_q.lora_A.weight": np.zeros((RANK, dim), np.float32),
        "text_encoder.layer.lora_A.weight": np.zeros((RANK, dim), np.float32),
        f"{second}.alpha": np.zeros(2, np.float32),
    }))  # fmt: skip
    with pytest.raises(InputError) as caught:
        import_lora(path, CONFIG)
    message = str(caught.value)
    missing, unexpected, misshapen = message.split("; ")
    assert "transformer_blocks.0.attn1.to_q.lora_B.weight" in missing and "attn1.to_k.alpha" in missing
    for name in ("lora_A.other", "magnitude_vector", "ff.net.2", "blocks.2.attn1", "text_encoder"):
        assert name in unexpected, name
    assert f"to_q.lora_A.weight: ({RANK + 1}, {dim}), expected ({RANK}, {dim})" in misshapen
    assert "int32" in misshapen and "alpha: (2,)" in misshapen


@pytest.mark.parametrize("change_config, named", [
    ({"num_layers": 1}, "unexpected: transformer_blocks.1.attn1"),
    ({"num_layers": 3}, "missing: transformer_blocks.2.attn1"),
    ({"num_heads": 3}, "misshapen: transformer_blocks.0.attn1"),
])  # fmt: skip
def test_adapters_of_a_denoiser_of_another_size_are_refused(exported, change_config, named):
    path, tensors = exported
    write_file(path, tensors)
    with pytest.raises(InputError, match=named):
        import_lora(path, dataclasses.replace(CONFIG, **change_config))


@pytest.mark.parametrize("metadata, alphas, expected", [
    (header(lora_alpha=3), [2.0], "several alphas: 2, 3"),
    (header(lora_alpha=0), [], "alpha is 0"),
    (header(lora_alpha="4"), [], "alpha is '4'"),
    (header(r=3), [], "alpha is None"),
    (header(lora_alpha=3, alpha_pattern={"to_q": 1}), [], "alpha_pattern"),
    ({METADATA: "{"}, [], "one JSON object"),
    (None, [float("inf")], "alpha is inf"),
])  # fmt: skip
def test_an_alpha_that_cannot_be_taken_is_refused(exported, metadata, alphas, expected):
    path, tensors = exported
    write_file(path, with_alphas(tensors, *alphas) if alphas else tensors, metadata)
    with pytest.raises(InputError, match=expected):
        import_lora(path, CONFIG)


def test_files_without_adapters_are_refused(tmp_path):
    path = write_file(tmp_path / "model.safetensors", {"proj_out.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match="no LoRA; its first keys: proj_out.weight"):
        import_lora(path, CONFIG)
    with pytest.raises(ValueError, match="ranks"):
        export_lora(path, {"blocks/attn/q/kernel": np.zeros((1, 2, 2))}, RANK, ALPHA)


def test_full_size_adapters_have_one_key_per_layer_and_half():
    config = lora_config(preset("animecolor-2b").denoiser)
    leaves = adapters(abstract("denoiser", config))
    assert {name: leaf.shape[-2:] for name, leaf in leaves.items()} == {
        f"blocks/attn/{layer}/{half}": shape
        for layer in ("q", "k", "v", "out")
        for half, shape in (("lora_a", (1920, RANK)), ("lora_b", (RANK, 1920)))
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights directory: the denoiser with an LCG and a VAE beside it."""
    absent = dict.fromkeys(("hce", "text_encoder", "image_encoder"))
    config = dataclasses.replace(preset("tiny"), denoiser=CONFIG, lcg=CONFIG, **absent)
    directory = tmp_path_factory.mktemp("weights") / "weights"
    write_initial(directory, config)
    return directory


def test_merging_into_a_weights_directory_changes_the_denoiser_only(weights, trained, tmp_path):
    export_lora(tmp_path / "lora.safetensors", trained, RANK, ALPHA)
    merge_into_weights(weights, tmp_path / "lora.safetensors", tmp_path / "out")
    merged = params.extract(Weights(tmp_path / "out").load("denoiser"))
    expected = merge({**read_file(weights / "denoiser.safetensors")[0], **adapters(trained)}, RANK, ALPHA)
    assert_bitwise_equal(merged, expected)
    for path in sorted(path.relative_to(weights) for path in weights.rglob("*") if path.is_file()):
        if path.name not in ("denoiser.safetensors", "config.json"):
            assert (tmp_path / "out" / path).read_bytes() == (weights / path).read_bytes(), path
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (weights, tmp_path / "out"))
    (note,) = new["provenance"]["denoiser"].pop("lora")
    assert note["file"] == "lora.safetensors" and (note["rank"], note["alpha"]) == (RANK, ALPHA)
    assert new == old


def test_merging_adapters_that_do_not_fit_leaves_nothing(weights, trained, tmp_path):
    export_lora(tmp_path / "lora.safetensors", trained, RANK, ALPHA)
    tensors, _ = read_file(tmp_path / "lora.safetensors")
    path = write_file(tmp_path / "cut.safetensors", change(tensors, {f"{FIRST}.lora_A.weight": None}))
    with pytest.raises(InputError, match=r"1 missing: transformer_blocks\.0\.attn1\.to_q\.lora_A\.weight"):
        merge_into_weights(weights, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_diffusers_computes_what_our_model_with_adapters_does(trained, tmp_path):
    """The file's A and B, applied to diffusers' layers as PEFT defines them."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    plain = {name: leaf for name, leaf in trained.items() if name not in adapters(trained)}
    with WeightsWriter(tmp_path / "weights") as writer:
        writer.component("denoiser", CONFIG, plain, plain.items(), {})
    export_checkpoint(tmp_path / "weights", tmp_path / "torch")
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "torch" / "transformer")
    export_lora(tmp_path / "lora.safetensors", trained, RANK, ALPHA)
    tensors, metadata = read_file(tmp_path / "lora.safetensors")
    settings = json.loads(metadata[METADATA])
    for layer in settings["transformer.target_modules"]:
        a, b = (torch.from_numpy(tensors[f"transformer.{layer}.lora_{half}.weight"]) for half in "AB")
        scale = settings["transformer.lora_alpha"] / settings["transformer.r"]
        with torch.no_grad():
            model.get_submodule(layer).weight += scale * b @ a
    latents, text, timestep = (torch.from_numpy(np.array(x)) for x in inputs())
    with torch.no_grad():
        expected = model(latents.permute(0, 1, 4, 2, 3), text, timestep, return_dict=False)[0]
    assert_close(predict(lora_config(), trained), expected.permute(0, 1, 3, 4, 2).numpy())
