"""What the devices of a compiled program send each other."""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from animecolor_jax.compiling.hlo import COLLECTIVES, sizes
from animecolor_jax.platforms import GIB

BETWEEN_SLICES = "between-slices"  # what a TPU's compiler hands to the hosts to exchange


class Collective(NamedTuple):
    """One of a program's.

    Attributes:
        kind: of `hlo.COLLECTIVES`, or BETWEEN_SLICES. size: bytes of the result on a device.
        participants: how many devices share it. times: how often.
        crosses: whether devices of several slices or hosts take part.
    """

    kind: str
    size: int
    participants: int
    times: int
    crosses: bool

    @property
    def received(self):
        """Bytes that each device receives, all times together."""
        share = (self.participants - 1) / self.participants
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.participants - 1}
        factor |= dict.fromkeys(("collective-permute", BETWEEN_SLICES), 1)
        return self.size * factor.get(self.kind, share) * self.times


def read_collectives(found, devices, devices_per_slice):
    """The `Collective`s of a program.

    Args:
        found: of `hlo.instructions`. devices: of the program. devices_per_slice: they are numbered slice by
            slice.
    """
    collectives = {}
    for each in found:
        kind = each.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            # TPUs: kernels that start it, that work meanwhile and that end it may each hold it once
            channel = re.search(r"channel_id=(\d+)", each.line) if each.fused else None
            key = (each.loop, kind, channel[1] if channel else each.name)
            collectives[key] = _collective(each, kind, devices, devices_per_slice)
        elif kind == "recv" and "xla_megascale_runtime" in each.line:
            key = (each.loop, kind, each.name)
            slices = devices // devices_per_slice
            collectives[key] = Collective(
                BETWEEN_SLICES, result_size(each, kind), slices, each.times, True
            )
    return list(collectives.values())


def _collective(instruction, kind, devices, devices_per_slice):
    groups = _groups(instruction.line) or [list(range(devices))]
    size, count = result_size(instruction, kind), len(groups[0])
    if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // count  # as a TPU's compiler writes it
    crosses = any(len({device // devices_per_slice for device in group}) > 1 for group in groups)
    return Collective(kind, size, count, instruction.times, crosses)


def result_size(instruction, kind):
    """Bytes of a collective's results. What only starts one names the operands before them, except for
    all-reduce, and scalars of its own after them."""
    found = sizes(re.sub(r"\b[us]32\[\]", "", instruction.types))
    if instruction.operation.endswith("-start") and kind != "all-reduce":
        found = found[len(found) // 2 :]
    return sum(found)


def summarise(collectives):
    """{kind: {"count", "gib" (received by each device)}} of one call of the program."""
    totals = defaultdict(lambda: [0, 0.0])
    for each in collectives:
        totals[each.kind][0] += each.times
        totals[each.kind][1] += each.received
    return {kind: {"count": count, "gib": size / GIB} for kind, (count, size) in sorted(totals.items())}


def _groups(line):
    """Devices of each group that takes part, numbers; none where all do."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if tiled:
        shape, dims = (_numbers(tiled[i]) for i in (1, 2))
        devices = np.arange(np.prod(dims)).reshape(dims)
        return devices.transpose(_numbers(tiled[3]) if tiled[3] else None).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", line)
    if named:
        return _groups_of_axes(dict(re.findall(r"'(\w+)'=(\d+)", named[1])), named[2])
    return []


def _groups_of_axes(sizes, used):
    """Groups along axes of a mesh, {name: size}; a part of an axis is 'name':(what lies before)size."""
    shape, chosen = [], []
    found = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used)
    parts = {name: (int(before or 1), int(part or 0)) for name, before, part in found}
    for name, size in sizes.items():
        before, part = parts.get(name, (int(size), 1))
        part = part or int(size)
        chosen.append(len(shape) + 1)
        shape += [before, part, int(size) // (before * part)]
    devices = np.arange(np.prod(shape)).reshape(shape)
    order = [axis for axis in range(len(shape)) if axis not in chosen] + chosen
    return devices.transpose(order).reshape(-1, int(np.prod([shape[axis] for axis in chosen]))).tolist()


def _numbers(text):
    return [int(n) for n in text.split(",")]
