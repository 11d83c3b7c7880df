"""open_state_dict: every layout of files that diffusers and transformers publish, and every broken one."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from animecolor_jax.convert.state_dict import open_mapping, open_state_dict, read_config, sha256
from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import Spec, write


def make_arrays(*names):
    rng = np.random.default_rng(len(names))
    return {name: rng.normal(size=(3, i + 1)).astype(ml_dtypes.bfloat16) for i, name in enumerate(names)}


def save(path, arrays):
    write(path, {name: Spec(a.shape, a.dtype) for name, a in arrays.items()}, arrays.items())


def save_shards(directory, shards, index="diffusion_pytorch_model.safetensors.index.json", weight_map=None):
    for file, arrays in shards.items():
        save(directory / file, arrays)
    listed = {name: file for file, arrays in shards.items() for name in arrays}
    text = {"metadata": {"total_size": 1}, "weight_map": listed if weight_map is None else weight_map}
    (directory / index).write_text(json.dumps(text))


def assert_holds(path, arrays, sources):
    with open_state_dict(path) as state:
        assert set(state.keys()) == set(state) == set(arrays)
        assert len(state) == len(arrays)
        for name, array in arrays.items():
            assert name in state
            assert state.spec(name) == (array.shape, array.dtype)
            np.testing.assert_array_equal(state.read(name), array)
        assert state.sources == sources


def refuse(path, match, where=None):
    with pytest.raises(InputError, match=match) as error:
        open_state_dict(path)
    assert error.value.where == str(where or path)
    return str(error.value)


def test_mapping_is_a_state_dict_without_files():
    arrays = make_arrays("a", "b")
    with open_mapping(arrays) as state:
        assert list(state.keys()) == ["a", "b"]
        assert state.spec("b") == ((3, 2), ml_dtypes.bfloat16)
        assert state.read("a") is arrays["a"] and state.read("b") is arrays["b"]
        assert state.sources == []


def test_single_file_given_by_name(tmp_path):
    save(tmp_path / "any name.safetensors", make_arrays("a", "b"))
    path = tmp_path / "any name.safetensors"
    assert_holds(path, make_arrays("a", "b"), [path])
    assert_holds(str(path), make_arrays("a", "b"), [path])


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors",
        "model.bf16.safetensors",
    ],
)
def test_directory_with_one_file_of_a_known_name(tmp_path, name):
    save(tmp_path / name, make_arrays("a"))
    save(tmp_path / "unrelated.safetensors", make_arrays("x"))
    (tmp_path / "training_args.bin").write_bytes(b"not weights")
    assert_holds(tmp_path, make_arrays("a"), [tmp_path / name])


@pytest.mark.parametrize(
    "index, shards",
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00002"),
        ("model.safetensors.index.json", "model-0000{}-of-00002"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002"),
        ("model.safetensors.index.fp16.json", "model-0000{}-of-00002.fp16"),
    ],
)
def test_directory_with_shards(tmp_path, index, shards):
    arrays = make_arrays("a", "b", "c")
    first, second = (f"{shards.format(number)}.safetensors" for number in (1, 2))
    save_shards(tmp_path, {first: {"a": arrays["a"], "c": arrays["c"]}, second: {"b": arrays["b"]}}, index)
    assert_holds(tmp_path, arrays, [tmp_path / first, tmp_path / second])
    assert_holds(tmp_path / index, arrays, [tmp_path / first, tmp_path / second])


@pytest.mark.parametrize(
    "chosen, other",
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.fp16.safetensors", "pytorch_model.fp16.bin"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ],
)
def test_safetensors_are_preferred_to_the_same_weights_in_a_pickle(tmp_path, chosen, other):
    save(tmp_path / chosen, make_arrays("a"))
    (tmp_path / other).write_bytes(b"not even opened")
    assert_holds(tmp_path, make_arrays("a"), [tmp_path / chosen])


@pytest.mark.parametrize(
    "files",
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("diffusion_pytorch_model.safetensors", "model.safetensors"),
        ("diffusion_pytorch_model.bin", "model.safetensors"),
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_choice_between_files_is_refused_by_name(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    message = refuse(tmp_path, "several candidates")
    assert all(name in message for name in files)


def test_what_holds_no_weights_is_refused(tmp_path):
    refuse(tmp_path, "no weights in this directory")
    refuse(tmp_path / "absent", "no such file or directory")
    refuse(tmp_path / "absent.safetensors", "cannot be read")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", "ends in '.txt'")
    save(tmp_path / "model-00001-of-00002.safetensors", make_arrays("a"))
    refuse(tmp_path, "only model-00001-of-00002.safetensors, which no index names")


def test_everything_wrong_with_an_index_is_said_at_once(tmp_path):
    arrays = make_arrays("a", "b", "c")
    index = "model.safetensors.index.json"
    save_shards(
        tmp_path,
        {"1.safetensors": {"a": arrays["a"], "b": arrays["b"]}, "2.safetensors": arrays},
        index,
        {"a": "1.safetensors", "b": "2.safetensors", "gone": "1.safetensors", "far": "3.safetensors"},
    )
    message = refuse(tmp_path, "the index does not fit", tmp_path / index)
    assert "missing file 3.safetensors" in message
    assert "'gone' is not in 1.safetensors" in message
    assert "'c' of 2.safetensors is not in the index" in message
    assert "'a' is in 1.safetensors and 2.safetensors" in message
    assert "'b' is in 1.safetensors and 2.safetensors" in message
    assert "'far'" not in message  # its file is missing, and that is said


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged index"),
        ('{"weight_map": {}}', "damaged index"),
        ('{"weight_map": {"a": 3}}', "damaged index"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "damaged index"),
        ('{"weight_map": {"a": "/secret.safetensors"}}', "damaged index"),
        ('{"weight_map": {"a": ".."}}', "cannot|missing file"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_damaged_index_is_refused(tmp_path, text, match):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refuse(tmp_path, match, path)


def test_damaged_shard_is_named(tmp_path):
    save_shards(tmp_path, {"1.safetensors": make_arrays("a"), "2.safetensors": make_arrays("a", "b")})
    (tmp_path / "2.safetensors").write_bytes((tmp_path / "2.safetensors").read_bytes()[:-1])
    refuse(tmp_path, "truncated", tmp_path / "2.safetensors")


def test_read_config(tmp_path):
    assert read_config(tmp_path) is None
    path = tmp_path / "config.json"
    path.write_text('{"num_layers": 2, "nested": {"x": [1.5, null]}}')
    assert read_config(tmp_path) == {"num_layers": 2, "nested": {"x": [1.5, None]}}
    for text in ("", "[1]", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1'):
        path.write_text(text)
        with pytest.raises(InputError, match="damaged") as error:
            read_config(tmp_path)
        assert error.value.where == str(path)


def test_sha256_is_that_of_the_whole_file(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "w").write_bytes(data)
    assert sha256(tmp_path / "w") == hashlib.sha256(data).hexdigest()


# Pickles, written by PyTorch itself.

TORCH = pytest.mark.torch


def make_tensors(*names):
    import torch

    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in names}


def assert_holds_tensors(path, tensors, sources):
    assert_holds(path, {name: tensor.numpy() for name, tensor in tensors.items()}, sources)


@TORCH
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth"])
def test_pickled_file_given_by_name(tmp_path, name, zipped):
    import torch

    tensors = make_tensors("a", "b")
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_holds_tensors(tmp_path / name, tensors, [tmp_path / name])


@TORCH
@pytest.mark.parametrize("name", ["pytorch_model", "diffusion_pytorch_model", "pytorch_model.fp16"])
def test_directory_with_a_pickle(tmp_path, name):
    import torch

    torch.save(make_tensors("a"), tmp_path / f"{name}.bin")
    assert_holds_tensors(tmp_path, make_tensors("a"), [tmp_path / f"{name}.bin"])


@TORCH
def test_directory_with_pickled_shards(tmp_path):
    import torch

    tensors = make_tensors("a", "b")
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for file, (name, tensor) in zip(files, tensors.items(), strict=True):
        torch.save({name: tensor}, tmp_path / file)
    weight_map = dict(zip(tensors, files, strict=True))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds_tensors(tmp_path, tensors, [tmp_path / file for file in files])


@TORCH
@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model", "model_state_dict"])
def test_wrapped_state_dict_is_found_beside_other_values(tmp_path, wrapper):
    import torch

    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
    saved = {"epoch": 3, wrapper: make_tensors("a"), "optimizer": optimizer, "ema": make_tensors("a")}
    torch.save(saved, tmp_path / "w.pt")
    assert_holds_tensors(tmp_path / "w.pt", make_tensors("a"), [tmp_path / "w.pt"])


@TORCH
def test_checkpoint_without_one_clear_state_dict_is_refused_with_its_keys(tmp_path):
    import torch

    tensors = make_tensors("a")
    cases = [
        ({"ema": tensors, "epoch": 3}, "no tensors where.*'ema', 'epoch'"),
        ({"encoder": tensors, "decoder": tensors}, "'encoder', 'decoder'"),
        ({"model": tensors, "state_dict": tensors, "x": 3}, "each of.*'model', 'state_dict', 'x'"),
        ({"state_dict": {}, "epoch": 3}, "'state_dict', 'epoch'"),
        ({"state_dict": {"model": tensors}}, "no tensors where"),
        ({**tensors, "epoch": 3}, "not a name with a tensor: 'epoch'"),
        ({"state_dict": {**tensors, "step": 3}}, "not a name with a tensor: 'step'"),
        ({**tensors, "nested": tensors}, "not a name with a tensor: 'nested'"),
        ({**tensors, 0: tensors["a"]}, "not a name with a tensor: <class 'int'>"),
        ([tensors], "it holds a list"),
        (tensors["a"], "it holds a TorchTensor"),
        (3, "it holds a int"),
    ]
    for saved, match in cases:
        torch.save(saved, tmp_path / "w.pt")
        refuse(tmp_path / "w.pt", match)


@TORCH
def test_shared_and_strided_tensors_survive_the_way_to_safetensors(tmp_path):
    import torch
    from safetensors.torch import load_file

    base = torch.randn(6, 8).bfloat16()
    tensors = {"plain": base, "transposed": base.T, "row": base[2], "expanded": base[:, :1].expand(6, 3)}
    torch.save(tensors, tmp_path / "w.pt")
    with open_state_dict(tmp_path / "w.pt") as state:
        specs = {name: state.spec(name) for name in state}
        write(tmp_path / "w.safetensors", specs, ((name, state.read(name)) for name in state))
    loaded = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
