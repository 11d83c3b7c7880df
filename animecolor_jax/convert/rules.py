"""One table of rules per network says how PyTorch names and layouts map to ours, in both directions.

A rule pairs two name templates. A placeholder such as `{i}` stands for one integer: where it occurs in
both templates it is substituted, where it occurs in the torch template alone it is the index on our
leading stacked axis. The table decides everything: which keys a checkpoint must have, their shapes, how a
leaf of ours is made from them, and how they are made from it again.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from animecolor_jax.errors import InputError


@dataclass(frozen=True)
class Rule:
    """`torch` and `ours` are name templates, `transform` a key of `TRANSFORMS`."""

    torch: str
    ours: str
    transform: str = "same"


@dataclass(frozen=True)
class Alias:
    """A torch key that repeats another one (tied weights): optional, and must agree with it."""

    torch: str
    of: str


class Transform(NamedTuple):
    """`load` and `save` are inverse; `shape` gives torch's shape for ours, `dtype` our dtype for torch's."""

    load: Callable
    save: Callable
    shape: Callable
    dtype: Callable = np.dtype


def _conv_load(x):
    return np.moveaxis(x, (0, 1), (-1, -2))


def _conv_save(x):
    return np.moveaxis(x, (-1, -2), (0, 1))


TRANSFORMS = {
    "same": Transform(lambda x: x, lambda x: x, lambda s: s),
    "linear": Transform(np.transpose, np.transpose, lambda s: s[::-1]),
    # [O, I, *k] <-> [*k, I, O]
    "conv": Transform(_conv_load, _conv_save, lambda s: (s[-1], s[-2], *s[:-2])),
    # torch has no int32 buffers here, JAX no int64 by default
    "int": Transform(
        lambda x: x.astype(np.int32), lambda x: x.astype(np.int64), lambda s: s, lambda _: np.dtype(np.int32)
    ),
    # [C, 1, 1] <-> [C]
    "stat": Transform(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1), lambda s: (*s, 1, 1)),
    # [1, ...] <-> [...]
    "batch1": Transform(lambda x: x[0], lambda x: x[None], lambda s: (1, *s)),
}


class Source(NamedTuple):
    """Where one leaf of ours comes from: the torch keys (one per stacked layer) and their shape."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    transform: Transform
    stacked: bool

    def load(self, read, dtype=None):
        """The leaf, from `read(torch key) -> array`, allocated once.

        Args:
            dtype: of a stacked leaf; needed where layers of one leaf differ in dtype. Default: the
            first layer's.
        """
        if not self.stacked:
            return self.transform.load(read(self.keys[0]))
        leaf = None
        for index, key in enumerate(self.keys):
            layer = self.transform.load(read(key))
            if leaf is None:
                leaf = np.empty((len(self.keys), *layer.shape), dtype or layer.dtype)
            leaf[index] = layer
        return leaf

    def save(self, layer):
        """torch's tensor for our leaf, or for one layer of it where it is stacked."""
        return np.ascontiguousarray(self.transform.save(layer))

    @property
    def integer(self):
        """Whether torch stores int64."""
        return self.transform is TRANSFORMS["int"]


def _regex(template):
    parts = re.split(r"\{(\w+)\}", template)
    seen, out = set(), ""
    for index, part in enumerate(parts):
        if index % 2 == 0:
            out += re.escape(part)
        else:
            out += f"(?P={part})" if part in seen else rf"(?P<{part}>0|[1-9]\d*)"
            seen.add(part)
    return re.compile(out)


def _placeholders(template):
    return set(re.findall(r"\{(\w+)\}", template))


def matching_rules(rules, torch_key):
    """The rules and aliases whose torch template matches; a sound table gives exactly one."""
    return [rule for rule in rules if _regex(rule.torch).fullmatch(torch_key)]


def sources(rules, abstract):
    """Where every leaf of ours comes from.

    Args:
        rules: the network's table.
        abstract: {name: ShapeDtypeStruct} of our parameters and buffers.

    Returns:
        {name: Source}.

    Raises:
        ValueError: a leaf is matched by no rule or by several, or a torch key feeds two leaves.
    """
    compiled = [(rule, _regex(rule.ours)) for rule in rules if isinstance(rule, Rule)]
    result, used = {}, {}
    for name, leaf in abstract.items():
        matches = [(rule, match) for rule, regex in compiled if (match := regex.fullmatch(name))]
        if len(matches) != 1:
            raise ValueError(f"{name!r} is matched by {len(matches)} rules: {[r.ours for r, _ in matches]}")
        rule, match = matches[0]
        free = _placeholders(rule.torch) - _placeholders(rule.ours)
        if len(free) > 1:
            raise ValueError(f"{rule} stacks more than one axis: {sorted(free)}")
        values, shape = match.groupdict(), tuple(leaf.shape)
        if free:
            (axis,) = free
            keys = tuple(rule.torch.format(**values, **{axis: index}) for index in range(shape[0]))
            shape = shape[1:]
        else:
            keys = (rule.torch.format(**values),)
        for key in keys:
            if key in used:
                raise ValueError(f"{key!r} feeds both {used[key]!r} and {name!r}")
            used[key] = name
        transform = TRANSFORMS[rule.transform]
        result[name] = Source(keys, tuple(transform.shape(shape)), transform, bool(free))
    return result


class Problems(NamedTuple):
    """What does not fit between a checkpoint and a network; three lists of torch keys."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self):
        return any(map(len, self))


def compare(rules, leaf_sources, shapes):
    """Compares a checkpoint's names and shapes with what the network needs.

    Args:
        shapes: {torch key: shape} of the checkpoint.
    """
    wanted = {key: source.shape for source in leaf_sources.values() for key in source.keys}
    original = {alias.torch: alias.of for alias in aliases(rules)}
    missing = sorted(key for key in wanted if stored_key(rules, key, shapes) is None)
    unexpected = sorted(key for key in shapes if original.get(key, key) not in wanted)
    misshapen = sorted(
        f"{key}: {tuple(shape)}, expected {wanted[original.get(key, key)]}"
        for key, shape in shapes.items()
        if tuple(shape) != wanted.get(original.get(key, key), tuple(shape))
    )
    return Problems(missing, unexpected, misshapen)


def aliases(rules):
    """The table's aliases."""
    return [rule for rule in rules if isinstance(rule, Alias)]


def stored_key(rules, key, present):
    """The name under which a checkpoint has `key`: its own, an alias, or None."""
    names = [key, *(alias.torch for alias in aliases(rules) if alias.of == key)]
    return next((name for name in names if name in present), None)


def require_match(
    problems,
    *,
    where,
    what="the checkpoint does not fit",
    expected="exactly the keys and shapes that its config.json describes",
    fix="check that config.json belongs to these weights and that no shard is missing",
):
    """Raises one InputError that lists every missing, unexpected and misshapen key."""
    if problems:
        lists = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems._asdict().items() if keys
        )
        raise InputError(f"{what}: {lists}", where=where, expected=expected, fix=fix)
