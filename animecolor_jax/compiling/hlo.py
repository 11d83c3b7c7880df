"""What a compiled program does, read from its text (XLA's HLO): its instructions, and how often each runs.

A loop's body counts as often as the loop runs; the compiler's own analysis counts it once.
"""

import re
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s4": 0.5, "u4": 0.5} | {
    f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
CALLED = re.compile(
    r"(?:calls|to_apply|body|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
ON_CHIP = re.compile(r"S\([1-9]\)")  # a layout in another memory than the device's large one
# what moves nothing: names, views, and loops, whose bodies count
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


class Instruction(NamedTuple):
    """One that is run.

    Attributes:
        name, types, operation: as written. line: all of it. computation: where it stands.
        loop: name of the innermost loop's body, or of the program. times: how often it runs; a branch counts
            as if it were always taken. fused: whether it is a part of a kernel, whose result alone reaches
            the memory. trips: of a loop, how often its body runs, None where the text does not say.
    """

    name: str
    types: str
    operation: str
    line: str
    computation: str
    loop: str
    times: int
    fused: bool
    trips: int | None = None


def instructions(text):
    """All `Instruction`s of a program, a list.

    Args:
        text: of `jax.stages.Compiled.as_text`.
    """
    computations, entry = _computations(text)
    found = []

    def visit(computation, loop, times, fused):
        for line in computations.get(computation, ()):
            match = INSTRUCTION.match(line)
            if match is None:
                continue
            name, types, operation = match.groups()
            condition = re.search(r"condition=%?([\w.\-]+)", line) if operation == "while" else None
            trips = _trips(line, computations[condition[1]]) if condition else None
            found.append(Instruction(name, types, operation, line, computation, loop, times, fused, trips))
            if operation.removesuffix("-start") in COLLECTIVES:
                continue  # what it calls is how it adds, or itself once more
            inner = fused or operation not in ("while", "conditional", "call")
            for listed, single in CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", listed or single):
                    visit(called, called if condition else loop, times * (trips or 1), inner)

    visit(entry, entry, 1, False)
    return found


def sizes(types, off_chip=False):
    """Bytes of each array of a result, such as "bf16[2,8]{1,0}" or a tuple of such.

    Args:
        off_chip: leave out what lies in a chip's own fast memory.
    """
    return [
        int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64) * BYTES.get(dtype, 1))
        for dtype, dims, layout in ARRAY.findall(types)
        if dtype != "token" and not (off_chip and ON_CHIP.search(layout))
    ]


def memory_traffic(found):
    """Bytes that the `Instruction`s write to the memory and others read back, by estimate: every result once
    each way. What is written into a part of a larger array is left out, and the reading of arguments."""
    moved = 0
    for each in found:
        if each.fused or each.operation in FREE or each.operation.endswith("-start"):
            continue
        # kernels are named after what they fuse, with hyphens for TPUs and underscores for GPUs
        if "dynamic-update-slice" not in f"{each.name} {each.operation}".replace("_", "-"):
            moved += 2 * sum(sizes(each.types, off_chip=True)) * each.times
    return moved


def _computations(text):
    """({name: its lines}, the name of the program's own)."""
    found, entry, name = {}, None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            name = header[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            found[name].append(line)
    return found, entry


def _trips(line, condition):
    """How often a loop runs: what its counter, from 0 on, is compared with; None where that is not plain."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
    if known:
        return int(known[1])
    text = "\n".join(condition)
    constants = dict(re.findall(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", text))
    compared = re.search(r"ROOT .* compare\((.*?)\), direction=LT", text)
    names = re.findall(r"%([\w.\-]+)", compared[1]) if compared else []
    return next((int(constants[name]) for name in names if name in constants), None)
