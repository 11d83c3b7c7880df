"""Weights directory -> PyTorch safetensors with every config.json that `from_pretrained` needs."""

import json
import os
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from animecolor_jax import safetensors_io
from animecolor_jax.convert import scheduler
from animecolor_jax.convert.plan import TABLES
from animecolor_jax.convert.rules import sources
from animecolor_jax.errors import InputError
from animecolor_jax.networks import abstract
from animecolor_jax.tokenizer import BYTE_LEVEL
from animecolor_jax.weights import Weights

# component: (folder, file). HCE goes into the denoiser's file, where it came from.
FILES = {
    "denoiser": ("transformer", "diffusion_pytorch_model.safetensors"),
    "lcg": ("referencenet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("text_encoder", "model.safetensors"),
    "image_encoder": ("image_encoder", "model.safetensors"),
}
# transformers' name of the byte-level tokenizer; ours has no sentinels
BYTE_LEVEL_CLASS = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}


def export_checkpoint(weights, out):
    """Writes PyTorch safetensors and configs, the inverse of `convert_checkpoint`.

    Args:
        weights: a weights directory. out: the folder to make.

    Returns:
        {"components": [...], "parameters": 0 or more, "missing": [], "unexpected": [], "misshapen": []}.

    Raises:
        InputError: `out` is taken, or the weights directory is damaged.
    """
    weights, out = Weights(weights), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            "exists already and is not an empty folder",
            where=out,
            expected="a folder that does not exist yet",
            fix="choose another name or remove it",
        )
    present = [name for name in TABLES if getattr(weights.config, name) is not None]
    if "hce" in present and "denoiser" not in present:
        raise InputError("holds HCE without a denoiser", where=weights.directory, expected="both or neither")
    weights.require(*present)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        count = sum(_export(weights, name, temporary) for name in present if name in FILES)
        if weights.config.scheduler is not None:
            values = scheduler.config_to_torch(weights.config.scheduler)
            _write_json(temporary / "scheduler" / "scheduler_config.json", values)
        if (weights.directory / "tokenizer").is_dir():
            shutil.copytree(weights.directory / "tokenizer", temporary / "tokenizer")
            if (temporary / "tokenizer" / BYTE_LEVEL).exists():  # else the file says which class it is
                _write_json(temporary / "tokenizer" / "tokenizer_config.json", BYTE_LEVEL_CLASS)
        os.chmod(temporary, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {"components": present, "parameters": count, "missing": [], "unexpected": [], "misshapen": []}


def _export(weights, name, out):
    """Writes one file with its config; returns the number of values written."""
    folder, file = FILES[name]
    parts = [name] + (["hce"] if name == "denoiser" and weights.config.hce is not None else [])
    values, specs, readers = {}, {}, {}
    for part in parts:
        config = getattr(weights.config, part)
        values.update(TABLES[part].config_to_torch(config))
        path = weights.directory / f"{part}.safetensors"
        reader = safetensors_io.Reader(path)
        leaves = sources(TABLES[part].RULES, abstract(part, config))
        readers[part] = reader, leaves
        for leaf_name, source in leaves.items():
            if leaf_name not in reader.specs:
                raise InputError(f"lacks {leaf_name}", where=path, expected="every parameter of its config")
            dtype = jnp.dtype(jnp.int64) if source.integer else reader.specs[leaf_name].dtype
            specs.update({key: safetensors_io.Spec(source.shape, dtype) for key in source.keys})
    total = sum(len(leaves) for _, leaves in readers.values())
    with tqdm(total=total, desc=folder, unit="leaf", disable=not sys.stderr.isatty()) as bar:

        def tensors():
            for reader, leaves in readers.values():
                for leaf_name, source in leaves.items():
                    yield from _split(reader, leaf_name, source)
                    bar.update()

        (out / folder).mkdir()
        safetensors_io.write(out / folder / file, specs, tensors(), {"format": "pt"})
    for reader, _ in readers.values():
        reader.close()
    _write_json(out / folder / "config.json", values)
    return sum(prod(spec.shape) for spec in specs.values())


def _split(reader, name, source):
    """(torch key, tensor) of one leaf, a layer at a time."""
    if not source.stacked:
        yield source.keys[0], source.save(reader.read(name))
        return
    for index, key in enumerate(source.keys):
        yield key, source.save(reader.read_slice(name, (slice(index, index + 1),))[0])


def _write_json(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
