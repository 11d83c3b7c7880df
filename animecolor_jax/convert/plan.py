"""What converting one network means, decided from names and shapes before any tensor is read."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import jax.numpy as jnp
import numpy as np

from animecolor_jax import params
from animecolor_jax.convert import hce, radio, rules, t5, transformer, vae
from animecolor_jax.errors import InputError
from animecolor_jax.networks import abstract, creator
from animecolor_jax.safetensors_io import Spec

TABLES = {
    "denoiser": transformer,
    "lcg": transformer,
    "hce": hce,
    "vae": vae,
    "text_encoder": t5,
    "image_encoder": radio,
}
_MARKS = {
    "denoiser": "transformer_blocks.",
    "vae": "decoder.conv_in.conv.",
    "text_encoder": "encoder.block.",
    "image_encoder": "radio_model.",
}


@dataclass(frozen=True)
class Plan:
    """How one network is made from a state dict.

    Attributes:
        component: one of `config.COMPONENTS`. config: its config, `dtype` that of most of its weights.
        leaves: {our name: rules.Source}. specs: {our name: Spec} as stored, dtypes those of the state dict.
        problems: what does not fit; the plan can be carried out only if there is none.
        parameters: their number, buffers not counted.
    """

    component: str
    config: object
    leaves: dict[str, rules.Source]
    specs: dict[str, Spec]
    problems: rules.Problems
    parameters: int

    @property
    def rules(self):
        """The network's rule table."""
        return TABLES[self.component].RULES


def make_plans(component, config, torch_specs, where):
    """Plans the networks that a state dict holds: one, or two where HCE lies inside the denoiser.

    Args:
        component: one of `TABLES`. config: the values of config.json.
        torch_specs: {torch key: (shape, dtype)}. where: the config's file, for errors.
    """
    if component == "denoiser" and any(map(hce.belongs, torch_specs)):
        inside = {key: spec for key, spec in torch_specs.items() if hce.belongs(key)}
        outside = {key: spec for key, spec in torch_specs.items() if not hce.belongs(key)}
        return [_plan("denoiser", config, outside, where), _plan("hce", config, inside, where)]
    return [_plan(component, config, torch_specs, where)]


def _plan(component, config, torch_specs, where):
    table = TABLES[component]
    shapes = {key: tuple(shape) for key, (shape, _) in torch_specs.items()}
    network = table.config_from_torch(config, shapes, where)
    expected = abstract(component, network)
    leaves = rules.sources(table.RULES, expected)
    problems = rules.compare(table.RULES, leaves, shapes)
    specs = {}
    if not problems.missing:
        specs = {
            name: Spec(tuple(leaf.shape), _stored_dtype(table.RULES, leaves[name], torch_specs))
            for name, leaf in expected.items()
        }
        sizes = Counter()
        for spec in specs.values():
            if jnp.issubdtype(spec.dtype, jnp.floating):
                sizes[spec.dtype.name] += prod(spec.shape)
        network = replace(network, dtype=sizes.most_common(1)[0][0])
        if network.dtype == "float64":
            raise InputError("holds float64 weights", where=where, expected="float32, bfloat16 or float16")
    count = params.parameter_count(creator(component, network))
    return Plan(component, network, leaves, specs, problems, count)


def _stored_dtype(table, source, torch_specs):
    """The dtype that holds all layers of a leaf without loss."""
    dtypes = {np.dtype(torch_specs[rules.stored_key(table, key, torch_specs)][1]) for key in source.keys}
    return source.transform.dtype(np.result_type(*dtypes))


def detect_component(keys, where):
    """The component that a state dict's keys belong to.

    Raises:
        InputError: none of ours.
    """
    for component, mark in _MARKS.items():
        if any(key.startswith(mark) for key in keys):
            return component
    raise InputError(
        "the keys belong to no network of ours", where=where,
        expected=f"keys that start with one of {', '.join(_MARKS.values())}", fix="check the file",
    )
