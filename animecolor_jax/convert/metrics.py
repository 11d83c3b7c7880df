"""Rules for the networks of the metrics, and how they are built from the files that were published.

These files hold more than the metrics use (a classifier, say). What may be there unused is in the table by
name; any other key is an error, as everywhere.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from animecolor_jax import params
from animecolor_jax.convert import rules
from animecolor_jax.convert.rules import Alias, Rule
from animecolor_jax.convert.state_dict import StateDict
from animecolor_jax.convert.transformer import pair
from animecolor_jax.errors import InputError


@dataclass(frozen=True)
class Ignored:
    """A torch key that a file may hold and that nothing uses."""

    torch: str


@dataclass(frozen=True)
class Table:
    """A network's rules and aliases, and the keys of its files that it leaves alone."""

    rules: list[Rule | Alias]
    ignored: list[Ignored]


def batch_norm(torch, ours):
    """Rules of a batch norm with its statistics."""
    return [
        Rule(f"{torch}.weight", f"{ours}/scale"),
        Rule(f"{torch}.bias", f"{ours}/bias"),
        Rule(f"{torch}.running_mean", f"{ours}/mean"),
        Rule(f"{torch}.running_var", f"{ours}/var"),
    ]


def _lpips(slices, classifier):
    """Table of LPIPS: torchvision's classifier and the file of heads, or one saved LPIPS.

    Args:
        slices: places in torchvision's `features` of the convolutions of every stage.
        classifier: places in its `classifier` of the linear layers, unused.
    """
    table = [*pair("features.{i}", "conv_{i}", "conv"), Rule("lin{k}.model.1.weight", "head_{k}", "conv")]
    for stage, indices in enumerate(slices):
        # a saved LPIPS has the heads twice, and the trunk under names of its own
        table.append(Alias(f"lins.{stage}.model.1.weight", of=f"lin{stage}.model.1.weight"))
        for index in indices:
            for kind in ("weight", "bias"):
                table.append(Alias(f"net.slice{stage + 1}.{index}.{kind}", of=f"features.{index}.{kind}"))
    ignored = [f"classifier.{index}.{kind}" for index in classifier for kind in ("weight", "bias")]
    ignored += ["scaling_layer.shift", "scaling_layer.scale"]  # constants of version 0.1
    return Table(table, [Ignored(key) for key in ignored])


LPIPS = {
    "alex": _lpips([[0], [3], [6], [8], [10]], classifier=[1, 4, 6]),
    "vgg": _lpips([[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]], classifier=[0, 3, 6]),
}

_BLOCK5 = (
    "branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3",
    "branch_pool",
)  # fmt: skip
_BLOCK6 = (
    "branch1x1", "branch7x7_1", "branch7x7_2", "branch7x7_3", "branch7x7dbl_1", "branch7x7dbl_2",
    "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5", "branch_pool",
)  # fmt: skip
_BLOCK7 = (
    "branch1x1", "branch3x3_1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_1", "branch3x3dbl_2",
    "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool",
)  # fmt: skip
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _BLOCK5),
    "Mixed_6a": ("branch3x3", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _BLOCK6),
    "Mixed_7a": (
        "branch3x3_1", "branch3x3_2", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"
    ),
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _BLOCK7),
}  # fmt: skip
_UNITS = [*_STEM, *(f"{block}.{branch}" for block, branches in _BLOCKS.items() for branch in branches)]

INCEPTION = Table(
    [
        rule
        for unit in _UNITS
        for ours in [unit.replace(".", "/")]
        for rule in (
            Rule(f"{unit}.conv.weight", f"{ours}/kernel", "conv"), *batch_norm(f"{unit}.bn", ours)
        )
    ],
    [Ignored(f"fc.{kind}") for kind in ("weight", "bias")]
    + [Ignored(f"{unit}.bn.num_batches_tracked") for unit in _UNITS],
)  # fmt: skip


def problems(create, table, shapes):
    """What does not fit between a file and a network, by names and shapes alone, as `rules.Problems`.

    Args:
        create: function of nothing that builds the network. shapes: {torch key: shape} of the file.
    """
    leaves = rules.sources(table.rules, params.abstract(create)[1])
    ignored = {key.torch for key in table.ignored}
    used = {key: shape for key, shape in shapes.items() if key not in ignored}
    return rules.compare(table.rules, leaves, used)


def build(create, table, state_dict, *, where):
    """A network with the tensors of a file, in float32.

    Args:
        create: function of nothing that builds the network.
        table: its `Table`.
        state_dict: the file's `StateDict`. where: its name, for errors.

    Raises:
        InputError: keys are missing, unexpected or misshapen, or a tensor saved twice differs from itself.
    """
    shapes = {key: state_dict.spec(key).shape for key in state_dict}
    rules.require_match(problems(create, table, shapes), where=where)
    for alias in rules.aliases(table.rules):
        both = alias.torch in state_dict and alias.of in state_dict
        if both and not np.array_equal(state_dict.read(alias.torch), state_dict.read(alias.of)):
            raise InputError(
                f"{alias.torch} differs from {alias.of}", where=where,
                expected="one tensor, saved under two names", fix="download or copy the file again",
            )  # fmt: skip
    read = lambda key: state_dict.read(rules.stored_key(table.rules, key, state_dict))  # noqa: E731
    leaves = rules.sources(table.rules, params.abstract(create)[1])
    arrays = {name: jnp.asarray(source.load(read)) for name, source in leaves.items()}
    return params.build(create, arrays, what=where, dtype="float32")


def join(*state_dicts):
    """One `StateDict` of all tensors of several, whose names differ.

    Raises:
        InputError: a name is in two of them.
    """
    tensors = {}
    for state_dict in state_dicts:
        for key in state_dict:
            if key in tensors:
                raise InputError(f"{key} is in two files", where=", ".join(map(str, state_dict.sources)))
            tensors[key] = (state_dict.spec(key), lambda key=key, source=state_dict: source.read(key))
    return StateDict(tensors, [path for state_dict in state_dicts for path in state_dict.sources])
