"""Compiles programs for devices that are not there, and says what they take."""

import re
import time

import jax

from animecolor_jax import flops, platforms
from animecolor_jax.compiling import hlo, targets
from animecolor_jax.compiling.collectives import read_collectives, summarise
from animecolor_jax.errors import InputError
from animecolor_jax.platforms import GIB, USABLE


def compile_program(program, target, mesh):
    """What one program takes of each device.

    Args:
        program: programs.Program. target: targets.Target. mesh: of the target's devices.

    Returns:
        {"name", "argument_gib", "temp_gib", "output_gib", "resident_gib", "peak_gib", "hbm_gib", "fits",
        "model_tflop_per_step", "collectives", "loops_counted_once" (whose length the program's text does not
        say), "estimated_seconds", "compile_seconds"}. Where the compiler
        finds that the memory does not suffice, it says by how much, and the rest is None.
    """
    began = time.perf_counter()
    memory = {"hbm_gib": target.kind.memory / GIB, "resident_gib": program.resident / GIB}
    facts = {"name": program.name, "model_tflop_per_step": program.flops / 1e12}
    try:
        compiled = lower_and_compile(program, target, mesh)
    except jax.errors.JaxRuntimeError as error:
        if known := explained(str(error)):
            raise known from error
        used = needed_memory(str(error))
        if used is None:
            raise
        peak = used + program.resident
        names = ("argument_gib", "temp_gib", "output_gib", "collectives", "estimated_seconds")
        found = {"peak_gib": peak / GIB, "fits": False, "compile_seconds": time.perf_counter() - began}
        return facts | memory | dict.fromkeys(names) | found
    plan = compiled.memory_analysis()
    own = (
        plan.argument_size_in_bytes + plan.temp_size_in_bytes
        + plan.output_size_in_bytes - plan.alias_size_in_bytes
    )  # fmt: skip
    instructions = hlo.instructions(compiled.as_text())
    found = read_collectives(instructions, mesh.size, mesh.size // target.slices)
    peak = own + program.resident
    return (
        facts
        | memory
        | {
            "argument_gib": plan.argument_size_in_bytes / GIB,
            "temp_gib": plan.temp_size_in_bytes / GIB,
            "output_gib": (plan.output_size_in_bytes - plan.alias_size_in_bytes) / GIB,
            "peak_gib": peak / GIB,
            "fits": peak <= USABLE * target.kind.memory,
            "collectives": summarise(found),
            "loops_counted_once": sum(each.operation == "while" and not each.trips for each in instructions),
            "estimated_seconds": estimate(program, hlo.memory_traffic(instructions), found, target),
            "compile_seconds": time.perf_counter() - began,
        }
    )


def lower_and_compile(program, target, mesh):
    """The `jax.stages.Compiled` of a program."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = program.lower()
    if target.kind.platform != "gpu":
        return lowered.compile()
    with targets.cuda_without_gpus():
        # which of Triton's products is fastest is measured on the device; without one cuBLAS's are taken
        return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def estimate(program, traffic, collectives, target):
    """Seconds by the device's data sheet, of each as if it were all there is; real steps take longer.

    Args:
        traffic: bytes of the device's memory.

    Returns:
        {"compute", "memory", "interconnect" (within a slice or host), "network" (between them)}.
    """
    kind = target.kind
    peak = flops.peak_flops(target.device_kind, program.dtype)
    within, across = (
        sum(each.received for each in collectives if each.crosses == crosses) for crosses in (False, True)
    )
    return {
        "compute": peak and program.flops / (len(target.devices) * peak * kind.chips),
        "memory": traffic / kind.bandwidth,
        "interconnect": within / kind.links,
        "network": across / kind.network,
    }


def needed_memory(message):
    """Bytes that a program needs by the compiler's error message, None where it says nothing of the kind."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    return float(found[1]) * units[found[2]] if found else None


def explained(message):
    """InputError for a failure of the compiler that has a way round; None for any other."""
    if "overlaps with another chunk" not in message:
        return None
    return InputError(
        message[:200], where="libtpu", expected="no mistake of the compiler, which 0.0.52 makes here",
        fix="export LIBTPU_INIT_ARGS=--xla_tpu_enable_async_collective_fusion=false, here and where it runs",
    )  # fmt: skip


def check(programs, target, mesh):
    """`compile_program` of each, traced as for the target."""
    with platforms.traced_for(target.kind.platform, target.device_kind):
        return [compile_program(program, target, mesh) for program in programs]


def describe(facts):
    """The report's lines about a program."""
    fits = "fits" if facts["fits"] else "does NOT fit"
    lines = [
        f"{facts['name']}: peak {facts['peak_gib']:.2f} of {facts['hbm_gib']:.0f} GiB a device, {fits} "
        f"(compiled in {facts['compile_seconds']:.0f} s)"
    ]
    if facts["argument_gib"] is None:
        return lines[0]
    parts = {name: facts[f"{name}_gib"] for name in ("argument", "temp", "output", "resident")}
    lines.append("  GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()))
    lines.append(f"  model TFLOP: {facts['model_tflop_per_step']:.1f}, all devices together")
    sent = [(kind, total["count"], total["gib"]) for kind, total in facts["collectives"].items()]
    text = "; ".join(f"{kind} {count} x, {size:.2f} GiB" for kind, count, size in sent)
    lines.append(f"  received by a device: {text or 'nothing'}")
    if facts["loops_counted_once"]:
        lines.append(f"  {facts['loops_counted_once']} loops of unknown length count once")
    known = {name: value for name, value in facts["estimated_seconds"].items() if value}
    estimates = ", ".join(f"{name} {value:.3g}" for name, value in known.items())
    lines.append(f"  estimate by data sheet, each alone, s: {estimates}")
    return "\n".join(lines)
