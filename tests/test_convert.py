"""PyTorch checkpoints in and out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from animecolor_jax import safetensors_io
from animecolor_jax.config import HCEConfig
from animecolor_jax.convert import hce as hce_table
from animecolor_jax.convert.checkpoint import check_manifests, convert_checkpoint, init_from
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.convert.plan import TABLES, detect_component, make_plans
from animecolor_jax.convert.rules import Alias, Rule, matching_rules, sources
from animecolor_jax.errors import InputError
from animecolor_jax.models.animecolor import AnimeColor, Conditions
from animecolor_jax.weights import Weights

MANIFESTS = sorted((Path(__file__).parent / "fixtures" / "manifests").glob("*.json"))
TOOL = Path(__file__).parents[1] / "tools" / "convert_torch.py"


def read_all(path):
    with safetensors_io.Reader(path) as reader:
        return {name: reader.read(name) for name in reader.specs}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_bitwise_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("torch") / "checkpoint")


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "weights"
    convert_checkpoint(checkpoint, out)
    return out


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_every_manifest_key_has_exactly_one_rule(file):
    manifest = json.loads(file.read_text())
    component = detect_component(manifest["keys"], file)
    for key in manifest["keys"]:
        table = hce_table if component == "denoiser" and hce_table.belongs(key) else TABLES[component]
        assert len(matching_rules(table.RULES, key)) == 1, key


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_every_manifest_fills_every_parameter_once(file):
    manifest = json.loads(file.read_text())
    report = check_manifests([file])
    assert (report["missing"], report["unexpected"], report["misshapen"]) == ([], [], [])
    assert report["parameters"] == manifest["total_parameters"]
    specs = {key: (tuple(shape), jnp.dtype(dtype)) for key, (shape, dtype) in manifest["keys"].items()}
    keys = [
        key
        for plan in make_plans(detect_component(specs, file), manifest["config"], specs, file)
        for source in plan.leaves.values()
        for key in source.keys
    ]
    aliases = {rule.torch for table in TABLES.values() for rule in table.RULES if isinstance(rule, Alias)}
    assert len(keys) == len(set(keys)) and set(keys) == set(specs) - aliases


def test_manifest_problems_are_listed(tmp_path):
    manifest = json.loads(next(file for file in MANIFESTS if "radio" in file.name).read_text())
    keys = manifest["keys"]
    keys["radio_model.extra.weight"] = [[3], "float32"]
    del keys["radio_model.model.blocks.3.norm1.bias"]
    keys["radio_model.model.blocks.4.attn.proj.weight"] = [[7, 1280], "float32"]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(manifest))
    report = check_manifests([file])
    assert report["missing"] == ["radio_model.model.blocks.3.norm1.bias"]
    assert report["unexpected"] == ["radio_model.extra.weight"]
    assert report["misshapen"] == [
        "radio_model.model.blocks.4.attn.proj.weight: (7, 1280), expected (1280, 1280)"
    ]


def test_a_leaf_without_a_rule_or_with_two_is_refused():
    leaf = {"norm/scale": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(ValueError, match="'norm/scale' is matched by 0 rules"):
        sources([Rule("norm.bias", "norm/bias")], leaf)
    with pytest.raises(ValueError, match="matched by 2 rules"):
        sources([Rule("a", "norm/scale"), Rule("b", "norm/scale")], leaf)
    two = {**leaf, "norm/bias": leaf["norm/scale"]}
    with pytest.raises(ValueError, match="'a' feeds both"):
        sources([Rule("a", "norm/scale"), Rule("a", "norm/bias")], two)


def test_export_returns_the_source_bit_for_bit(checkpoint, weights, tmp_path):
    exported = tmp_path / "exported"
    export_checkpoint(weights, exported)
    for folder, file in checkpoints.FOLDERS.values():
        assert_bitwise_equal(read_all(exported / folder / file), read_all(checkpoint / folder / file))
    again = tmp_path / "again"
    convert_checkpoint(exported, again)
    for component in TABLES:
        assert_bitwise_equal(
            read_all(again / f"{component}.safetensors"), read_all(weights / f"{component}.safetensors")
        )
    assert Weights(again).config == Weights(weights).config


def test_bfloat16_and_mixed_dtypes_survive_the_round_trip(tmp_path):
    def change(name, state):
        if name == "text_encoder":  # published T5 files keep some matrices in float32
            return {key: x if ".wo." in key else x.astype(np.float16) for key, x in state.items()}
        return {key: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for key, x in state.items()}

    source = checkpoints.write_checkpoint(tmp_path / "source", change=change)
    convert_checkpoint(source, tmp_path / "weights")
    config = Weights(tmp_path / "weights").config
    assert (config.denoiser.dtype, config.text_encoder.dtype) == ("bfloat16", "float16")
    export_checkpoint(tmp_path / "weights", tmp_path / "out")
    for folder, file in checkpoints.FOLDERS.values():
        assert_bitwise_equal(read_all(tmp_path / "out" / folder / file), read_all(source / folder / file))


def test_dtype_casts_floats_only(checkpoint, tmp_path):
    convert_checkpoint(checkpoint, tmp_path / "weights", dtype="bfloat16")
    leaves = read_all(tmp_path / "weights" / "image_encoder.safetensors")
    assert {name: leaf.dtype for name, leaf in leaves.items() if leaf.dtype != ml_dtypes.bfloat16} == {
        "summary_indices": np.int32
    }
    assert Weights(tmp_path / "weights").config.image_encoder.dtype == "bfloat16"


def test_all_problems_are_in_one_error_and_nothing_is_left(tmp_path):
    def change(name, state):
        if name == "denoiser":
            del state["proj_out.bias"]
            state["transformer_blocks.1.ff.net.2.bias"] = np.zeros(7, np.float32)
            state["ema.decay"] = np.zeros(1, np.float32)
        if name == "vae":
            del state["decoder.conv_out.conv.weight"]
        return state

    source = checkpoints.write_checkpoint(tmp_path / "source", change=change)
    with pytest.raises(InputError) as error:
        convert_checkpoint(source, tmp_path / "weights")
    for text in (
        "denoiser: proj_out.bias",
        "vae: decoder.conv_out.conv.weight",
        "denoiser: ema.decay",
        "denoiser: transformer_blocks.1.ff.net.2.bias: (7,), expected (48,)",
    ):
        assert text in str(error.value)
    assert files_below(tmp_path) == [f"source/{name}" for name in files_below(source)]


@pytest.mark.parametrize("kept", ["both", "alias", "original"])
def test_tied_embeddings_are_found_under_either_name(kept, tmp_path):
    original, alias = "shared.weight", "encoder.embed_tokens.weight"

    def change(name, state):
        state[alias] = state[original]
        if kept != "both":
            del state[original if kept == "alias" else alias]
        return state

    source = checkpoints.write_checkpoint(tmp_path / "source", ["text_encoder"], change)
    convert_checkpoint(f"text_encoder={source / 'text_encoder'}", tmp_path / "weights")
    tensors, _ = checkpoints.fixture()
    written = read_all(tmp_path / "weights" / "text_encoder.safetensors")
    embedding = checkpoints.state_dict(tensors, "text_encoder")[original]
    assert any(leaf.shape == embedding.shape and np.array_equal(leaf, embedding) for leaf in written.values())


def test_tied_embeddings_must_agree(tmp_path):
    def change(name, state):
        return {**state, "encoder.embed_tokens.weight": state["shared.weight"] + 1}

    source = checkpoints.write_checkpoint(tmp_path / "source", ["text_encoder"], change)
    with pytest.raises(InputError, match="encoder.embed_tokens.weight differs from shared.weight"):
        convert_checkpoint(source, tmp_path / "weights")


def test_two_candidates_are_refused_until_one_is_named(checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint / "transformer", other / "transformer")
    with pytest.raises(
        InputError, match=re.escape(f"denoiser has 2 candidates: {checkpoint / 'transformer'}")
    ):
        convert_checkpoint([checkpoint, other], tmp_path / "weights")
    convert_checkpoint([checkpoint, f"denoiser={other / 'transformer'}"], tmp_path / "weights")
    assert Weights(tmp_path / "weights").values["provenance"]["denoiser"]["source"] == "transformer"


def test_a_single_file_takes_the_config_beside_it(checkpoint, tmp_path):
    shutil.copy(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "my_vae.safetensors")
    with pytest.raises(InputError, match="has no config.json"):
        convert_checkpoint(f"vae={tmp_path / 'my_vae.safetensors'}", tmp_path / "weights")
    shutil.copy(checkpoint / "vae" / "config.json", tmp_path / "my_vae.json")
    report = convert_checkpoint(f"vae={tmp_path / 'my_vae.safetensors'}", tmp_path / "weights")
    assert report["components"] == ["vae"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_fn", "gelu", "activation_fn is 'gelu'"),
        ("num_layers", "4", "num_layers is '4'"),
        ("patch_size_t", 2, "patch_size_t is 2"),
        ("cross_attn_interval", 3, "cross_attn_interval is 3 with 4 layers"),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(key, value, message, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "transformer")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(InputError, match=message):
        convert_checkpoint(f"denoiser={folder}", tmp_path / "weights")


def test_networks_of_different_models_are_refused(checkpoint, tmp_path):
    tensors, config = checkpoints.fixture()
    state = {
        key: x
        for key, x in checkpoints.state_dict(tensors, "reference").items()
        if not re.match(r"transformer_blocks\.[23]\.", key)
    }
    checkpoints.write_component(tmp_path / "lcg", state, {**config["reference"], "num_layers": 2})
    with pytest.raises(InputError, match="lcg.num_layers is 2, the denoiser's 4"):
        convert_checkpoint(
            [f"denoiser={checkpoint / 'transformer'}", f"lcg={tmp_path / 'lcg'}"], tmp_path / "weights"
        )


def test_an_existing_directory_is_not_overwritten(checkpoint, weights):
    before = files_below(weights)
    with pytest.raises(InputError, match="exists already"):
        convert_checkpoint(checkpoint, weights)
    assert files_below(weights) == before


def test_weights_directory_errors_name_what_is_missing(weights, tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        Weights(tmp_path)
    copy = shutil.copytree(weights, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        Weights(copy)
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "lcg.safetensors").unlink()
    with pytest.raises(InputError, match="lacks lcg"):
        Weights(copy).require("denoiser", "lcg")
    (copy / "vae.safetensors").write_bytes((weights / "vae.safetensors").read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated or damaged"):
        Weights(copy).load("vae")
    shutil.copy(weights / "hce.safetensors", copy / "vae.safetensors")
    with pytest.raises(InputError, match="missing .*decoder/conv_in.* unexpected .*qformer/latents"):
        Weights(copy).load("vae")


SMALL_HCE = HCEConfig(
    dim=16,
    depth=1,
    num_heads=2,
    head_dim=8,
    num_tokens=4,
    feature_dim=8,
    summary_dim=12,
    output_dim=16,
    cross_num_heads=2,
    cross_head_dim=8,
)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_stage_one_weights_start_as_cogvideox_bit_for_bit(dtype, tmp_path):
    source = checkpoints.write_checkpoint(
        tmp_path / "cogvideox",
        ["reference", "vae", "text_encoder"],
        lambda name, state: state,
    )
    (source / "referencenet").rename(source / "transformer")
    init_from(source, tmp_path / "weights", dtype=dtype, hce=SMALL_HCE)
    ours = Weights(tmp_path / "weights")
    denoiser, hce = ours.load("denoiser"), ours.load("hce")
    convert_checkpoint(f"denoiser={source / 'transformer'}", tmp_path / "plain", dtype=dtype)
    plain = Weights(tmp_path / "plain").load("denoiser")
    assert not denoiser.patch_embed.kernel[:, :, 4:].any() and not hce.cross_attn.out.kernel[...].any()
    assert_bitwise_equal(
        read_all(tmp_path / "weights/lcg.safetensors"), read_all(tmp_path / "plain/denoiser.safetensors")
    )

    keys = jax.random.split(jax.random.key(0), 5)
    latents, sketch = (jax.random.normal(key, (2, 3, 6, 8, 4), dtype) for key in keys[:2])
    text = jax.random.normal(keys[2], (2, 8, 24), dtype)
    timestep = jnp.array([17, 800])
    cogvideox = jax.jit(lambda m, *xs: m(*xs))(plain, latents, text, timestep)
    alone = AnimeColor(denoiser)
    call = jax.jit(lambda m, c: m(latents, sketch, text, timestep, c))
    np.testing.assert_array_equal(call(alone, Conditions(None, None)), cogvideox)
    extended = AnimeColor(denoiser, None, hce)
    summary = jax.random.normal(keys[3], (1, 1, 12), dtype)
    features = jax.random.normal(keys[4], (1, 1, 5, 8), dtype)
    conditions = jax.jit(lambda m: m.conditions(None, summary, features))(extended)
    np.testing.assert_array_equal(call(extended, conditions), cogvideox)


def test_init_from_refuses_a_transformer_with_control_channels(checkpoint, tmp_path):
    with pytest.raises(InputError, match="8 input and 4 output channels"):
        init_from(checkpoint, tmp_path / "weights", hce=SMALL_HCE)


@pytest.mark.torch
def test_diffusers_and_transformers_load_the_export_completely(checkpoint, tmp_path):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5EncoderModel

    sources = [
        f"{part}={checkpoint / folder}"
        for part, folder in [
            ("denoiser", "referencenet"),
            ("vae", "vae"),
            ("text_encoder", "text_encoder"),
            ("scheduler", "scheduler"),
        ]
    ]
    convert_checkpoint(sources, tmp_path / "weights")
    export_checkpoint(tmp_path / "weights", tmp_path / "out")
    for cls, folder in [
        (CogVideoXTransformer3DModel, "transformer"),
        (AutoencoderKLCogVideoX, "vae"),
        (T5EncoderModel, "text_encoder"),
    ]:
        model, info = cls.from_pretrained(tmp_path / "out" / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (
            cls,
            info,
        )
        assert sum(p.numel() for p in model.parameters()) > 0
    assert (
        CogVideoXDDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler").config.snr_shift_scale == 3.0
    )


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_convert_like_safetensors(zipped, weights, tmp_path):
    import torch

    tensors, config = checkpoints.fixture()
    state = {key: torch.from_numpy(x) for key, x in checkpoints.state_dict(tensors, "reference").items()}
    folder = tmp_path / "referencenet"
    folder.mkdir()
    torch.save(state, folder / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "config.json").write_text(json.dumps(config["reference"]))
    convert_checkpoint(f"lcg={folder}", tmp_path / "weights")
    assert_bitwise_equal(
        read_all(tmp_path / "weights/lcg.safetensors"), read_all(weights / "lcg.safetensors")
    )


def run_tool(*arguments):
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_tool_converts_exports_and_refuses(checkpoint, tmp_path):
    code, report, _ = run_tool("--source", checkpoint, "--out", tmp_path / "weights")
    assert code == 0
    assert report["components"] == ["denoiser", "hce", "lcg", "vae", "text_encoder", "image_encoder"]
    code, _, _ = run_tool("--export", tmp_path / "torch", "--weights", tmp_path / "weights")
    assert code == 0 and (tmp_path / "torch" / "referencenet" / "config.json").is_file()

    code, report, stderr = run_tool("--source", tmp_path / "absent", "--out", tmp_path / "other")
    assert code == 2 and "does not exist" in report["error"]["what"] and "does not exist" in stderr
    code, report, _ = run_tool("--source", checkpoint)
    assert code == 2 and report["error"]["where"] == "--out"
    code, report, _ = run_tool("--unknown-flag")
    assert code == 2 and set(report["error"]) == {"what", "where", "expected", "fix"}


def test_tool_checks_manifests(tmp_path):
    code, report, _ = run_tool("--check-manifest", *MANIFESTS)
    assert code == 0 and len(report["components"]) == len(MANIFESTS) + 3  # three hold HCE as well
    manifest = json.loads(MANIFESTS[0].read_text())
    manifest["keys"].popitem()
    (tmp_path / "short.json").write_text(json.dumps(manifest))
    code, report, _ = run_tool("--check-manifest", tmp_path / "short.json")
    assert code == 1 and len(report["missing"]) == 1
