"""A checkpoint's state dict, whatever files it lies in: names, shapes, and tensors read one by one.

Source: the file names of diffusers (utils/constants.py) and transformers (utils/__init__.py), with
their variants and their index of shards.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from animecolor_jax.convert.torch_pickle import TorchCheckpoint, TorchTensor
from animecolor_jax.convert.torchscript import TorchScriptArchive, is_torchscript
from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import Reader, Spec, parse_json_object

# keys under which trainers put the state dict; "ema" is not among them: other weights are a choice
WRAPPERS = ("state_dict", "module", "model", "model_state_dict")

_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_VARIANT = r"(?P<variant>\.[^.-]+)?"  # such as .fp16
_SINGLE = re.compile(rf"{_STEM}{_VARIANT}\.(?P<format>safetensors|bin)")
_INDEX = re.compile(rf"{_STEM}\.(?P<format>safetensors|bin)\.index{_VARIANT}\.json")


class _Tensor(NamedTuple):
    spec: Spec
    read: Callable[[], np.ndarray]


class StateDict:
    """Tensors by name, read when asked for; a context manager.

    Attributes:
        sources: the files that hold the tensors (for their provenance), in order.
    """

    def __init__(self, tensors, sources=(), close=lambda: None):
        """`tensors` is {name: (Spec, function that reads it)}."""
        self._tensors = {name: _Tensor(*tensor) for name, tensor in tensors.items()}
        self.sources = list(sources)
        self.close = close

    def keys(self):
        """Names, in the order of the file."""
        return self._tensors.keys()

    def spec(self, key):
        """Shape and NumPy dtype of a tensor, as a `Spec`."""
        return self._tensors[key].spec

    def read(self, key):
        """A tensor as an array (bfloat16 is that of ml_dtypes)."""
        return self._tensors[key].read()

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)

    def __contains__(self, key):
        return key in self._tensors

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def open_mapping(arrays):
    """A `StateDict` of arrays in memory, {name: array}."""
    return StateDict(
        {
            name: (Spec(array.shape, array.dtype), lambda array=array: array)
            for name, array in arrays.items()
        }
    )


def open_state_dict(path):
    """Opens a checkpoint.

    Args:
        path: a .safetensors, .bin, .pt or .pth file (also a TorchScript archive), or a directory of
            diffusers or transformers with one such file or an index and its shards.
    Raises:
        InputError: there is nothing to read or a choice between files, a file is truncated or
            damaged or holds more than tensors, or the shards do not fit their index.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_weights(path)
    if _INDEX.fullmatch(path.name):
        return _open_shards(path)
    return _open_file(path)


def read_config(directory):
    """`config.json` of a directory as a dict, None where there is none.

    Raises:
        InputError: it is not one strict JSON object.
    """
    path = Path(directory) / "config.json"
    return parse_json_object(path.read_bytes(), path) if path.is_file() else None


def sha256(path):
    """Hash of a file as 64 hexadecimal digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_file(path):
    if path.suffix == ".safetensors":
        reader = Reader(path)
        tensors = {
            name: (spec, lambda name=name: reader.read(name)) for name, spec in reader.specs.items()
        }
        return StateDict(tensors, [path], reader.close)
    if path.suffix in _TORCH_SUFFIXES:
        if is_torchscript(path):
            checkpoint = TorchScriptArchive(path)
            tensors = checkpoint.tensors
        else:
            checkpoint = TorchCheckpoint(path)
            try:
                tensors = _find_tensors(checkpoint.root, path)
            except InputError:
                checkpoint.close()
                raise
        tensors = {key: (Spec(value.shape, value.dtype), value.read) for key, value in tensors.items()}
        return StateDict(tensors, [path], checkpoint.close)
    raise InputError(
        f"cannot hold weights: its name ends in {path.suffix!r}"
        if path.exists()
        else "no such file or directory",
        where=path,
        expected=f"a directory, or a file .safetensors, {', '.join(_TORCH_SUFFIXES)}",
    )


def _find_tensors(root, where):
    """The one dict of `TorchTensor`s in what was saved: `root` itself, or under a wrapper's key."""

    def has_tensors(value):
        return type(value) is dict and any(type(item) is TorchTensor for item in value.values())

    def listing(keys):
        keys = [key[:200] if type(key) is str else type(key) for key in keys]
        return ", ".join(map(repr, keys[:50])) + (", ..." if len(keys) > 50 else "")

    def refuse(what):
        return InputError(
            what,
            where=where,
            expected=f"names and tensors, at the top or under exactly one of {list(WRAPPERS)}",
            fix="save the dict of tensors that is meant, and nothing else, as safetensors",
        )

    if type(root) is not dict:
        raise refuse(f"it holds a {type(root).__name__}, not a dict")
    wrappers = [key for key in WRAPPERS if has_tensors(root.get(key))]
    if len(wrappers) > 1:
        raise refuse(f"there are tensors under each of {wrappers}; its keys: {listing(root)}")
    tensors = root[wrappers[0]] if wrappers else root
    if not has_tensors(tensors):
        raise refuse(f"no tensors where a state dict has them; its keys: {listing(root)}")
    others = [key for key, value in tensors.items() if type(value) is not TorchTensor]
    others += [key for key in tensors if type(key) is not str]
    if others:
        raise refuse(f"not a name with a tensor: {listing(others)}")
    return tensors


def _find_weights(directory):
    """The file or index in a directory that holds its weights."""
    candidates = {}  # (stem, variant) -> format -> paths
    names = sorted(path.name for path in directory.iterdir())
    for name in names:
        match = _SINGLE.fullmatch(name) or _INDEX.fullmatch(name)
        if match:
            # transformers calls the same weights model.safetensors and pytorch_model.bin
            stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
            formats = candidates.setdefault((stem, match["variant"]), {})
            formats.setdefault(match["format"], []).append(name)
    chosen = [
        name
        for formats in candidates.values()
        for name in formats.get("safetensors") or formats["bin"]
    ]
    if len(chosen) == 1:
        return directory / chosen[0]
    if chosen:
        raise InputError(
            f"several candidates: {', '.join(chosen)}",
            where=directory,
            expected="one file of weights, or one index of shards",
            fix="give the file (or the .index.json) that is meant, not the directory",
        )
    found = [name for name in names if name.endswith((".safetensors", *_TORCH_SUFFIXES))]
    raise InputError(
        "no weights in this directory"
        + (f", only {', '.join(found)}, which no index names" if found else ""),
        where=directory,
        expected="diffusion_pytorch_model.safetensors, model.safetensors, pytorch_model.bin, or an "
        "index of shards (.index.json)",
        fix="give the file itself, or copy the index from where the shards came from"
        if found
        else "check the path",
    )


def _open_shards(index):
    """All shards that an index names as one `StateDict`, checked against the index both ways."""
    weight_map = parse_json_object(index.read_bytes(), index).get("weight_map")
    if (
        type(weight_map) is not dict
        or not weight_map
        # the shards lie beside their index: a name is never a path
        or any(type(name) is not str or Path(name).name != name for name in weight_map.values())
    ):
        raise InputError(
            "damaged index", where=index, expected='{"weight_map": {tensor name: file name}}'
        )
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    with ExitStack() as stack:
        shards = {}
        for name in names:
            if name not in absent:
                shards[name] = _open_file(index.parent / name)
                stack.callback(shards[name].close)
        problems = [f"missing file {name}" for name in absent]
        problems += [
            f"{key!r} is not in {name}"
            for key, name in weight_map.items()
            if name in shards and key not in shards[name]
        ]
        owners = {}
        for name, shard in shards.items():
            for key in shard:
                owners.setdefault(key, []).append(name)
        problems += [
            f"{key!r} of {files[0]} is not in the index"
            for key, files in owners.items()
            if key not in weight_map
        ]
        problems += [
            f"{key!r} is in {' and '.join(files)}"
            for key, files in owners.items()
            if len(files) > 1
        ]
        if problems:
            raise InputError(
                f"the index does not fit its shards: {'; '.join(problems)}",
                where=index,
                expected="every tensor in exactly the shard that the index names",
                fix="download or copy the index and all shards again, from one place",
            )
        tensors = {
            key: (shards[name].spec(key), lambda key=key, name=name: shards[name].read(key))
            for key, name in weight_map.items()
        }
        sources = [index.parent / name for name in names]
        return StateDict(tensors, sources, stack.pop_all().close)
