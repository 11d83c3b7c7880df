"""Parameters outside a module: nested dicts of arrays, and everything said about them by name.

Names join the keys of the nested dict with slashes: `blocks/attn/q/kernel`.
"""

import re

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from animecolor_jax.errors import InputError


def flatten(tree):
    """Nested dict -> {name: leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat):
    """{name: leaf} -> nested dict."""
    return traverse_util.unflatten_dict(flat, sep="/")


def first_match(rules, name, where="rules"):
    """The value of the first of `rules`, (regex, value) pairs, that matches all of `name`.

    Raises:
        InputError: no rule does.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise InputError(
        f"no rule matches {name!r}",
        where=where,
        expected="a rule for every name",
        fix="end the rules with one for '.*'",
    )


def abstract(create):
    """A network's structure without its memory.

    Args:
        create: function of nothing that builds the module.

    Returns:
        (graphdef, {name: ShapeDtypeStruct}) of every parameter and buffer.
    """
    graphdef, state = nnx.split(nnx.eval_shape(create))
    return graphdef, flatten(nnx.to_pure_dict(state))


def parameter_count(create):
    """Number of parameters of the module that `create` builds; buffers are not counted."""
    state = nnx.state(nnx.eval_shape(create), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def conform(params, expected, *, what, dtype=None):
    """Checks names and shapes of flat `params` against `expected` and casts floating leaves to `dtype`.

    Raises:
        InputError: one error that lists every missing, unexpected and misshapen name.
    """
    missing, unexpected = sorted(set(expected) - set(params)), sorted(set(params) - set(expected))
    misshapen = [
        f"{name}: {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(params))
        if tuple(params[name].shape) != tuple(expected[name].shape)
    ]
    if missing or unexpected or misshapen:
        raise InputError(
            f"parameters do not fit: missing {missing}, unexpected {unexpected}, misshapen {misshapen}",
            where=what,
            expected="the parameters that its config.json describes",
            fix="convert the checkpoint again (tools/convert_torch.py)",
        )
    if dtype is None:
        return dict(params)
    return {
        name: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for name, leaf in params.items()
    }


def build(create, params, *, what, dtype=None):
    """The module that `create` builds, holding the flat `params`; raises like `conform`."""
    graphdef, expected = abstract(create)
    return nnx.merge(graphdef, unflatten(conform(params, expected, what=what, dtype=dtype)))


def extract(module):
    """{name: array} of every parameter and buffer of a module."""
    return flatten(nnx.to_pure_dict(nnx.state(module)))
