"""Low-rank adapters of the denoiser's attention: merged into it, and as a file in diffusers' key format.

Ours: leaves `blocks/attn/{q,k,v,out}/lora_a` [depth, in, rank] and `lora_b` [depth, rank, out] beside the
kernel that they adapt; the layer's kernel acts as W + alpha / rank A B.
The file: `transformer.transformer_blocks.{layer}.attn1.to_q.lora_A.weight` [rank, in], `lora_B` [out, rank].

Alpha is no tensor of that file: diffusers (since June 2025, its pull request 11324) reads it from the header,
as the arguments of PEFT's `LoraConfig`, and where there are none takes alpha = rank. We write A and B as
trained and alpha in the header. With the scale multiplied into B, readers that ignore the header would apply
it too, but what was trained could not be had back bit by bit; they are right whenever alpha = rank, which is
the default.
Source: diffusers loaders/lora_base.py and loaders/peft.py, PEFT tuners/lora/layer.py, arXiv:2106.09685.
"""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from animecolor_jax import config as configs
from animecolor_jax import params as parameters
from animecolor_jax import safetensors_io
from animecolor_jax.convert import rules, transformer
from animecolor_jax.convert.state_dict import sha256
from animecolor_jax.errors import InputError
from animecolor_jax.networks import abstract
from animecolor_jax.safetensors_io import Spec
from animecolor_jax.weights import Weights, WeightsWriter

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"

# every linear layer's adapter by the name of the layer; which layers have one, the model decides
RULES = [
    rules.Rule(
        rule.torch.replace(".weight", f".lora_{half.upper()}.weight"),
        rule.ours.replace("/kernel", f"/lora_{half}"),
        "linear",
    )
    for rule in transformer.RULES
    if rule.ours.endswith("/kernel") and rule.transform == "linear"
    for half in "ab"
]
_ADAPTER = re.compile(r"(.+)/lora_[ab]")
_KEY = re.compile(r"(?:transformer\.)?(?P<layer>.+?)\.(?:(?P<half>lora_[AB])(?:\.[^.]+)?\.weight|alpha)")


def adapters(params):
    """The adapters' leaves among the flat `params` of a denoiser."""
    return {name: leaf for name, leaf in params.items() if _ADAPTER.fullmatch(name)}


def merge(params, rank, alpha):
    """A denoiser without adapters that computes what the one with them does.

    Args:
        params: {name: array} of a denoiser, NumPy or JAX, with the leaves of its adapters.
        rank: of the adapters. alpha: they are scaled by alpha / rank; 0 means alpha = rank.

    Returns:
        {name: array}: kernels W + alpha / rank A B, added in float32, in W's dtype; other leaves themselves.

    Raises:
        ValueError: an adapter lacks its other half or its kernel, or has another rank.
    """
    others = ((name, leaf) for name, leaf in params.items() if not _ADAPTER.fullmatch(name))
    return dict(merge_leaves(others, adapters(params), rank, alpha))


def merge_leaves(leaves, adapters, rank, alpha):
    """As `merge`, a leaf at a time: yields (name, array) for `leaves`, an iterable of (name, array)."""
    scale, left = (alpha or rank) / rank, dict(adapters)
    for name, leaf in leaves:
        layer = name.removesuffix("/kernel")
        if name.endswith("/kernel") and f"{layer}/lora_a" in left and f"{layer}/lora_b" in left:
            a, b = (left.pop(f"{layer}/lora_{half}").astype(np.float32) for half in "ab")
            if a.shape[-1] != rank:
                raise ValueError(f"the adapter of {layer!r} has rank {a.shape[-1]}, not {rank}")
            with jax.default_matmul_precision("float32"):
                merged = (scale * a) @ b
                merged += leaf  # in place where it is NumPy's: a leaf can have gigabytes
            leaf = merged.astype(leaf.dtype, copy=False)
        yield name, leaf
    if left:
        raise ValueError(f"adapters without their other half or their kernel: {sorted(left)}")


def export_lora(path, params, rank, alpha):
    """Writes adapters as one safetensors file for diffusers' `load_lora_weights` and `import_lora`.

    `load_lora_adapter` of a diffusers model reads the header, and so alpha, with use_safetensors=True only.

    Args:
        path: the file to write, customarily pytorch_lora_weights.safetensors.
        params: {name: array} of the adapters; other leaves of the denoiser are left out.
        rank: of the adapters. alpha: they are scaled by alpha / rank; 0 means alpha = rank.

    Raises:
        ValueError: `params` has no adapters, or of another rank, or of a layer that diffusers does not have.
    """
    leaves = adapters(params)
    ranks = {leaf.shape[-1 if name.endswith("a") else -2] for name, leaf in leaves.items()}
    if ranks != {rank}:
        raise ValueError(f"expected adapters of rank {rank}, got ranks {sorted(ranks)}")
    sources = rules.sources(RULES, leaves)
    settings = {"r": rank, "lora_alpha": alpha or rank, "target_modules": sorted(_layers(sources))}
    header = json.dumps({f"{PREFIX}{key}": value for key, value in settings.items()}, sort_keys=True)
    specs = {
        f"{PREFIX}{key}": Spec(source.shape, np.dtype(leaves[name].dtype))
        for name, source in sources.items()
        for key in source.keys
    }

    def tensors():
        for name, source in sources.items():
            for key, layer in zip(source.keys, np.asarray(leaves[name]), strict=True):
                yield f"{PREFIX}{key}", source.save(layer)

    safetensors_io.write(path, specs, tensors(), {"format": "pt", METADATA: header})


def import_lora(path, config, alpha=None):
    """Reads adapters of all attention layers from a file such as `export_lora`, diffusers or PEFT writes.

    Names may lack `transformer.` and may hold the adapter's name (`lora_A.default.weight`). Alpha is that of
    the header or of `.alpha` tensors; without either it is the rank, as in diffusers.

    Args:
        path: a safetensors file.
        config: the denoiser's `TransformerConfig`.
        alpha: taken in place of the file's. Files of diffusers' training script for CogVideoX do not say
            with which they were trained.

    Returns:
        ({name: float32 array}, rank, alpha).

    Raises:
        InputError: one error that lists every missing, unexpected and misshapen key, ranks that differ
            included; or an alpha that is no positive number, or differs between layers.
    """
    if alpha is not None:
        alpha = _checked_alpha(alpha, "alpha")
    with safetensors_io.Reader(path) as reader:
        halves, alphas, unexpected = _parse_keys(reader.specs)
        specs = {key: reader.specs[stored] for key, stored in halves.items()}
        ranks = Counter(
            spec.shape[0] for key, spec in specs.items() if key.endswith("A.weight") and len(spec.shape) == 2
        )
        if not ranks or 0 in ranks:
            raise InputError(
                f"holds no LoRA; its first keys: {', '.join(list(reader.specs)[:5])}",
                where=path,
                expected="keys such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
            )
        rank = ranks.most_common(1)[0][0]
        wanted = adapters(abstract("denoiser", replace(config, lora_rank=rank)))
        sources = rules.sources(RULES, wanted)
        problems = rules.compare(RULES, sources, {key: spec.shape for key, spec in specs.items()})
        problems.unexpected.extend(unexpected)
        problems.misshapen.extend(
            f"{key}: {spec.dtype}, expected floating point"
            for key, spec in specs.items()
            if not jax.numpy.issubdtype(spec.dtype, np.floating)
        )
        if alphas:
            _compare_alphas(problems, alphas, _layers(sources), reader.specs)
        _require_match(problems, config, rank, path)
        if alpha is None:
            values = {reader.read(key).item() for key in alphas.values()}
            alpha = _alpha(values, _header_alpha(reader.metadata, rank, path), rank, path)

        def read(key):
            return reader.read(halves[key]).astype(np.float32)

        return {name: source.load(read) for name, source in sources.items()}, rank, alpha


def merge_into_weights(weights, lora, out, alpha=None):
    """A weights directory whose denoiser has adapters merged into it, everything else as it was.

    Args:
        weights: a weights directory. out: the weights directory to make.
        lora, alpha: `path` and `alpha` of `import_lora`.

    Raises:
        InputError: `out` is taken, the weights directory is damaged, or the adapters do not fit its denoiser.
    """
    writer, weights = WeightsWriter(out), Weights(weights)
    present = [name for name in configs.COMPONENTS if getattr(weights.config, name) is not None]
    weights.require("denoiser", *present)
    leaves, rank, alpha = import_lora(lora, weights.config.denoiser, alpha)
    note = {"file": Path(lora).name, "sha256": sha256(lora), "rank": rank, "alpha": alpha}
    with writer:
        for name in present:
            config, provenance = getattr(weights.config, name), weights.values["provenance"][name]
            path = weights.directory / f"{name}.safetensors"
            with safetensors_io.Reader(path) as reader:
                parameters.conform(reader.specs, abstract(name, config), what=path)
                stored = ((key, reader.read(key)) for key in reader.specs)
                if name == "denoiser":
                    provenance = {**provenance, "lora": [*provenance.get("lora", []), note]}
                    stored = merge_leaves(stored, leaves, rank, alpha)
                writer.component(name, config, reader.specs, stored, provenance)
        if weights.config.scheduler is not None:
            writer.scheduler(weights.config.scheduler, weights.values["provenance"]["scheduler"])
        if (weights.directory / "tokenizer").is_dir():
            shutil.copytree(
                weights.directory / "tokenizer", writer.tokenizer_directory, dirs_exist_ok=True
            )


def _parse_keys(keys):
    """({our torch key: key}, {layer: key of its alpha}, keys that are neither or repeat one)."""
    halves, alphas, others = {}, {}, []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        layer, half = match["layer"], match["half"]
        found, name = (halves, f"{layer}.{half}.weight") if half else (alphas, layer)
        if name in found:
            others.append(key)
        else:
            found[name] = key
    return halves, alphas, others


def _layers(sources):
    """Our torch names of the layers that have adapters."""
    return {key.split(".lora_")[0] for source in sources.values() for key in source.keys}


def _compare_alphas(problems, alphas, layers, specs):
    """Adds to `problems` those of the `.alpha` tensors, {layer: key}; each layer has to have one."""
    problems.missing.extend(f"{layer}.alpha" for layer in sorted(layers - set(alphas)))
    problems.unexpected.extend(key for layer, key in alphas.items() if layer not in layers)
    problems.misshapen.extend(
        f"{key}: {specs[key].shape}, expected one number"
        for key in alphas.values()
        if math.prod(specs[key].shape) != 1
    )


def _require_match(problems, config, rank, where):
    rules.require_match(
        problems,
        where=where,
        what="the adapters do not fit",
        expected=f"adapters of rank {rank}, the file's most frequent one, of q, k, v and out in the "
        f"attention of {config.num_layers} blocks of width {config.dim}, and nothing else",
        fix="train adapters of exactly these layers, on a denoiser of this size",
    )


def _alpha(values, header, rank, where):
    """The one alpha among `values`, those of `.alpha` tensors, and that of the header, a number or None."""
    found = sorted(values if header is None else {*values, header})
    if len(found) > 1:
        raise InputError(
            f"several alphas: {', '.join(f'{value:g}' for value in found)}",
            where=where,
            expected="the same in all .alpha tensors and the header",
            fix="give alpha, to be taken for all layers",
        )
    return _checked_alpha(found[0], where) if found else float(rank)


def _header_alpha(metadata, rank, where):
    """Alpha by the header's arguments of `LoraConfig`; None where there are none."""
    if METADATA not in metadata:
        return None
    values = safetensors_io.parse_json_object(metadata[METADATA].encode(), f"{where}: {METADATA}")
    values = {key.removeprefix(PREFIX): value for key, value in values.items()}
    if values.get("alpha_pattern"):
        raise InputError(
            f"alpha_pattern is {values['alpha_pattern']!r}", where=f"{where}: {METADATA}",
            expected="one alpha for all layers", fix="give alpha, to be taken for all layers",
        )  # fmt: skip
    alpha = _checked_alpha(values.get("lora_alpha"), f"{where}: {METADATA}")
    return alpha * math.sqrt(rank) if values.get("use_rslora") else alpha  # scaled by alpha / sqrt(rank)


def _checked_alpha(alpha, where):
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise InputError(
            f"alpha is {alpha!r}", where=where, expected="a number above 0",
            fix="give alpha, to be taken in place of the file's",
        )  # fmt: skip
    return float(alpha)
