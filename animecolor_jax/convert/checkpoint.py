"""PyTorch checkpoint -> weights directory, leaf by leaf."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from animecolor_jax import config as configs
from animecolor_jax import params
from animecolor_jax.convert import rules
from animecolor_jax.convert.plan import detect_component, make_plans
from animecolor_jax.convert.scheduler import config_from_torch as scheduler_from_torch
from animecolor_jax.convert.sources import resolve
from animecolor_jax.convert.state_dict import open_state_dict, sha256
from animecolor_jax.errors import InputError
from animecolor_jax.models import animecolor
from animecolor_jax.networks import abstract, creator, initial_leaves
from animecolor_jax.safetensors_io import Spec, parse_json_object
from animecolor_jax.weights import WeightsWriter

TOKENIZER_FILES = re.compile(r"spiece\.model|byte_level\.json|tokenizer(_config)?\.json|.*tokens.*\.json")


class Checkpoint:
    """The sources of a conversion, opened and checked: everything that can be wrong is found here.

    Attributes:
        plans: {component: Plan}.

    Raises:
        InputError: a source is damaged or does not fit; all missing, unexpected and misshapen keys at once.
    """

    def __init__(self, sources):
        self.tokenizer = _tokenizer_files(sources.pop("tokenizer", None))
        self.scheduler = sources.pop("scheduler", None)
        if not sources:
            raise InputError(
                "no network among the sources", where="--source", expected="a checkpoint with weights"
            )
        self.schedule = None
        if self.scheduler is not None:
            self.schedule = scheduler_from_torch(self.scheduler.config, self.scheduler.config_file)
        self.plans, self._states, self._provenance = {}, {}, {}
        for part, source in sources.items():
            state = open_state_dict(source.path)
            specs = {key: state.spec(key) for key in state}
            for plan in make_plans(part, source.config, specs, source.config_file):
                self.plans[plan.component] = plan
                self._states[plan.component] = state
                self._provenance[plan.component] = source
        self._check_names()
        self._check_aliases()

    def _check_names(self):
        joined = rules.Problems([], [], [])
        for component, plan in self.plans.items():
            for all_keys, keys in zip(joined, plan.problems, strict=True):
                all_keys.extend(f"{component}: {key}" for key in keys)
        rules.require_match(joined, where=", ".join(sorted({str(s.path) for s in self._provenance.values()})))

    def _check_aliases(self):
        for component, plan in self.plans.items():
            state, keys = self._states[component], set(self._states[component].keys())
            for alias in rules.aliases(plan.rules):
                if {alias.torch, alias.of} <= keys and not _same(
                    state.read(alias.torch), state.read(alias.of)
                ):
                    raise InputError(
                        f"{alias.torch} differs from {alias.of}",
                        where=self._provenance[component].path,
                        expected="tied weights to be equal",
                        fix="these are not the weights of a T5 v1.1 encoder, or the file is damaged",
                    )

    def leaves(self, plan):
        """Yields (our name, array) of a plan, dtypes as stored."""
        state = self._states[plan.component]
        keys = set(state.keys())
        bar = tqdm(plan.specs, desc=plan.component, unit="leaf", disable=not sys.stderr.isatty())
        for name in bar:
            read = lambda key: state.read(rules.stored_key(plan.rules, key, keys))  # noqa: E731
            yield name, plan.leaves[name].load(read, plan.specs[name].dtype)

    def write(self, writer, plan, leaves, dtype, component=None, **notes):
        """Writes `leaves`, made by `plan`, as a component (default: the plan's own), with notes of
        provenance."""
        source, state = self._provenance[plan.component], self._states[plan.component]
        provenance = {
            "files": {Path(file).name: sha256(file) for file in state.sources},
            "source": source.path.name,
            **notes,
        }
        write_component(
            writer, component or plan.component, plan.config, plan.specs, leaves, dtype, provenance
        )

    def write_rest(self, writer):
        """Writes schedule and tokenizer, where there are sources for them."""
        if self.schedule is not None:
            writer.scheduler(self.schedule, {"source": Path(self.scheduler.config_file).name})
        for file in self.tokenizer:
            shutil.copyfile(file, writer.tokenizer_directory / file.name)


def write_component(writer, component, config, specs, leaves, dtype, provenance):
    """Writes one component, its floating leaves cast to `dtype` unless that is None."""

    def cast(stored):
        return jnp.dtype(dtype) if dtype and jnp.issubdtype(stored, jnp.floating) else stored

    specs = {name: Spec(spec.shape, cast(spec.dtype)) for name, spec in specs.items()}
    leaves = ((name, leaf.astype(specs[name].dtype, copy=False)) for name, leaf in leaves)
    writer.component(component, replace(config, dtype=dtype or config.dtype), specs, leaves, provenance)


def convert_checkpoint(source, out, *, dtype=None):
    """Converts a PyTorch checkpoint to a weights directory.

    Args:
        source: a path, `part=PATH`, or a list of them; see `sources.resolve`.
        out: the weights directory to make.
        dtype: of the floating parameters; default: as stored in the checkpoint.

    Returns:
        {"components": [...], "parameters": int, "missing": [], "unexpected": [], "misshapen": []}.

    Raises:
        InputError: before anything is written, if a source does not fit; nothing is left at `out`.
    """
    writer = WeightsWriter(out)  # refuses a taken name before any work
    checkpoint = Checkpoint(resolve(source if isinstance(source, list | tuple) else [source]))
    plans = checkpoint.plans
    check_fit({name: plan.config for name, plan in plans.items()})
    with writer:
        for plan in plans.values():
            checkpoint.write(writer, plan, checkpoint.leaves(plan), dtype)
        checkpoint.write_rest(writer)
    return _report(list(plans), sum(plan.parameters for plan in plans.values()))


def init_from(directory, out, *, source=(), dtype=None, seed=0, hce=None):
    """Stage-1 weights from a plain CogVideoX directory.

    The patch embedding gets sketch channels whose weights are zero, the LCG is a copy of the transformer, HCE
    is fresh and the outputs of its cross-attentions are zero: step 0 equals CogVideoX.

    Args:
        directory: CogVideoX directory of diffusers (transformer, vae, text_encoder, tokenizer, scheduler).
        out, dtype: as in `convert_checkpoint`.
        source: further sources, such as `image_encoder=RADIO`.
        seed: of the fresh HCE. hce: its `HCEConfig`, default the published one; widths that other networks
            decide are filled in.

    Returns:
        as `convert_checkpoint`.

    Raises:
        InputError: as `convert_checkpoint`, or the transformer has control channels or HCE already.
    """
    writer = WeightsWriter(out)
    checkpoint = Checkpoint(resolve([str(directory), *source]))
    base = checkpoint.plans.get("denoiser")
    if base is None or base.config.in_channels != base.config.out_channels or "hce" in checkpoint.plans:
        found = "no transformer"
        if base is not None:
            channels = f"{base.config.in_channels} input and {base.config.out_channels} output channels"
            found = f"a transformer with {channels}"
        raise InputError(
            f"holds {found}",
            where=directory,
            expected="a plain CogVideoX, without control channels or HCE",
            fix="convert a checkpoint that has them already with --source",
        )
    if "lcg" in checkpoint.plans:
        raise InputError("holds an LCG already", where=directory, fix="convert it with --source")
    denoiser = replace(base.config, in_channels=2 * base.config.in_channels)
    extractor = replace(hce or configs.HCEConfig(), model_dim=denoiser.dim, dtype=denoiser.dtype)
    extractor = replace(extractor, num_cross=denoiser.num_layers // extractor.interval)
    if "image_encoder" in checkpoint.plans:
        encoder = checkpoint.plans["image_encoder"].config
        extractor = replace(
            extractor,
            feature_dim=encoder.embed_dim,
            summary_dim=encoder.num_summary_tokens * encoder.embed_dim,
        )
    check_fit({"denoiser": denoiser, "lcg": base.config, "hce": extractor})
    kernel = base.specs["patch_embed/kernel"]  # [p, p, C, D]: latents first, then the sketch
    patch, _, channels, dim = kernel.shape
    wide = replace(
        base,
        config=denoiser,
        specs={**base.specs, "patch_embed/kernel": Spec((patch, patch, 2 * channels, dim), kernel.dtype)},
    )

    def widened():
        for name, leaf in checkpoint.leaves(base):
            yield (
                name,
                np.concatenate([leaf, np.zeros_like(leaf)], axis=2) if name == "patch_embed/kernel" else leaf,
            )

    with writer:
        checkpoint.write(writer, wide, widened(), dtype, untrained="sketch channels are zero")
        copy = {"component": "lcg", "untrained": "copy of the plain denoiser"}
        checkpoint.write(writer, base, checkpoint.leaves(base), dtype, **copy)
        specs = {
            name: Spec(leaf.shape, jnp.dtype(denoiser.dtype))
            for name, leaf in abstract("hce", extractor).items()
        }
        note = {"initialised": f"randomly, seed {seed}; outputs of the cross-attentions zero"}
        write_component(writer, "hce", extractor, specs, initial_leaves("hce", extractor, seed), dtype, note)
        others = {name: plan for name, plan in checkpoint.plans.items() if name != "denoiser"}
        for plan in others.values():
            checkpoint.write(writer, plan, checkpoint.leaves(plan), dtype)
        checkpoint.write_rest(writer)
    new = {"denoiser": denoiser, "lcg": base.config, "hce": extractor}
    total = sum(params.parameter_count(creator(name, config)) for name, config in new.items())
    return _report([*new, *others], total + sum(plan.parameters for plan in others.values()))


def check_manifests(files):
    """Names and shapes of state dicts, given as JSON manifests, against our rules; no tensors are needed.

    Args:
        files: JSON files `{"config": {...}, "keys": {torch key: [shape, dtype]}}`.

    Returns:
        as `convert_checkpoint`, the lists naming what does not fit.

    Raises:
        InputError: a file that is no manifest, or one of a network that we do not have.
    """
    components, parameters, problems = [], 0, rules.Problems([], [], [])
    for file in files:
        if not Path(file).is_file():
            raise InputError("does not exist", where=file, expected="a manifest (JSON)", fix="check the path")
        values = parse_json_object(Path(file).read_bytes(), file)
        try:
            specs = {key: (tuple(shape), jnp.dtype(dtype)) for key, (shape, dtype) in values["keys"].items()}
            config = values["config"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"is no manifest: {error!r}",
                where=file,
                expected='{"config": {...}, "keys": {name: [shape, dtype]}}',
            ) from error
        for plan in make_plans(detect_component(specs, file), config, specs, file):
            components.append(plan.component)
            parameters += plan.parameters
            for all_keys, keys in zip(problems, plan.problems, strict=True):
                all_keys.extend(keys)
    return _report(components, parameters, problems)


def check_fit(components):
    """Raises InputError where networks of one model contradict each other; components: {name: config}."""
    if "denoiser" in components:
        animecolor.check(components["denoiser"], components.get("lcg"), components.get("hce"))


def _report(components, parameters, problems=None):
    lists = (problems or rules.Problems([], [], []))._asdict()
    return {"components": components, "parameters": parameters, **lists}


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _tokenizer_files(source):
    if source is None:
        return []
    path = source.path
    files = (
        [path] if path.is_file() else sorted(f for f in path.iterdir() if TOKENIZER_FILES.fullmatch(f.name))
    )
    if not any(file.name in ("spiece.model", "tokenizer.json", "byte_level.json") for file in files):
        raise InputError(
            "holds no tokenizer",
            where=path,
            expected="spiece.model or tokenizer.json",
            fix="download the tokenizer folder of the checkpoint",
        )
    return files
