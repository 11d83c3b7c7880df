"""The table of what was measured: bounds, targets, and what was not run."""

import re

from animecolor_jax import doctor
from animecolor_jax.benchmarks import compare
from animecolor_jax.benchmarks_train import STAGES
from animecolor_jax.measuring.parts import FIRST_CALL

# Parts of a clip and how often each is done; None: once a denoising step
PARTS = {
    "text encoder": 1, "image encoder": 1, "VAE encode": 1, "LCG and HCE": 1, "denoising step": None,
    "VAE decode": 1,
}  # fmt: skip
BOUND = 0.9  # of it is to be reached
TARGETS_FOR = "H200"
# (regex of "NAME (SHAPE)", the target, whether a line meets it); the first full match
TARGETS = (
    (r"clip, exact \(.*", "30 s", lambda line: line["ours"] <= 30),
    (r"clip, blocks in \d+ of \d+ steps \(.*", "12 s, and 35 dB, not measured here", lambda line: None),
    (rf"({'|'.join(PARTS)}) \(.*", "90 % of the bound", lambda line: near_bound(line)),
    (r"step of plain CogVideoX against diffusers, eager .*", "1.25", lambda line: line["ratio"] >= 1.25),
    (r"step of plain CogVideoX against diffusers, torch.compile .*", "1", lambda line: line["ratio"] >= 1),
    (r"step of AnimeColor against plain CogVideoX .*", "1 / 1.1", lambda line: line["ratio"] >= 1 / 1.1),
    (
        r"train step, .*480x720.*", "MFU 38 %, or 90 % of the bound",
        lambda line: line["mfu"] >= 0.38 or near_bound(line),
    ),
    (
        r"train step, .*320x512.*", "MFU 45 %, or 90 % of the bound",
        lambda line: line["mfu"] >= 0.45 or near_bound(line),
    ),
)  # fmt: skip
COLUMNS = ("what", "ours", "theirs", "ratio", "of the bound", "peak GiB", "target", "met", "where and when")
EXPLAINED = """\
Ratios are theirs / ours, both sides alternating in one run: above 1 ours is faster. The bound is what the \
operations take at the rates of products, attention and convolutions measured there, or the weights at the \
memory's. Weights are random, so that nothing here shows quality. Peak memory is JAX's in the row's process.
"""


def near_bound(line):
    """Whether a line reaches its bound; None where that is unknown."""
    return None if line["share"] is None else line["share"] >= BOUND


def bound(line, rates, size):
    """Seconds that no program with these rates beats, or None for what has no such bound.

    Args:
        rates: {rate: value} of the row "roofline", empty where that was not run on this kind of device.
    """
    if not rates:
        return None
    if "train" in line:
        stage = next(stage for stage in STAGES if stage.name == line["stage"])
        shape = size.train[line["train"]]
        return doctor.step_seconds(stage, shape.model, shape.latents, rates, 1)
    if "read_gb" not in line:
        return None
    names = {
        "attention": "attention_tflops",
        "products": "matmul_tflops",
        "convolutions": "convolution_tflops",
    }
    computing = sum(work / rates[names[kind]] for kind, work in line["tflop"].items())
    return max(computing, line["read_gb"] / rates["memory_gb"])


def lines(held, size):
    """Every line that was measured, with "bound" (seconds), "share" of it, "target", "met" (None: not known
    or another device), "peak_gib" and "where".

    Args:
        held: {name: result} of `slices.Results`. size: Size.
    """
    found = [
        line | {"where": row["where"]} | _of_process(row, line)
        for row in held.values()
        for line in row.get("lines", ())
    ]
    by_device = {}
    for line in found:
        if "rate" in line:
            by_device.setdefault(line["where"]["device"], {})[line["rate"]] = line["ours"]
    for line in found:
        line["bound"] = bound(line, by_device.get(line["where"]["device"]), size)
    found += _sum(found, size)
    for line in found:
        line["share"] = line["bound"] and line["bound"] / line["ours"]
        title = f"{line['name']} ({line['shape']})"
        text, check = next((rest for pattern, *rest in TARGETS if re.fullmatch(pattern, title)), (None, None))
        line["target"] = text
        line["met"] = check(line) if check and TARGETS_FOR in line["where"]["device"] else None
    return found


def _of_process(row, line):
    """What is known of a row's process and not of each line: memory, where the first line is; programs, where
    the first call is."""
    facts = {"peak_gib": row["peak_gib"] if line is row["lines"][0] else None}
    if line["name"].endswith(FIRST_CALL):
        facts |= {"compiled": row["compiled"], "from_cache": row["from_cache"]}
    return facts


def _sum(found, size):
    """A clip as the sum of its parts, where all were measured on one kind of device."""
    parts = {line["name"]: line for line in found if line["name"] in PARTS}
    if len(parts) < len(PARTS) or len({line["where"]["device"] for line in parts.values()}) > 1:
        return []
    times = {name: count or size.steps for name, count in PARTS.items()}
    seconds, bounds = ([parts[name][key] for name in times] for key in ("ours", "bound"))

    def total(values):
        return sum(count * value for count, value in zip(times.values(), values, strict=True))

    shape = f"{size.text}, {size.steps} steps"
    line = compare("clip, sum of its parts", shape, [total(seconds)], dtype=size.dtype)
    bound_of_all = None if None in bounds else total(bounds)
    return [line | {"bound": bound_of_all, "peak_gib": None, "where": parts["denoising step"]["where"]}]


def not_run(held, rows):
    """{text of a row: why there is nothing of it}."""
    reasons = {}
    for name, row in rows.items():
        result = held.get(name, {"state": "left", "reason": "no slice has come to it yet"})
        if result["state"] != "done":
            reasons[row.text] = result["reason"]
    return reasons


def markdown(found, reasons):
    """The table as text."""
    rows = [_cells(line) for line in found]
    for text, reason in reasons.items():
        rows.append([text, f"not run: {reason}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 2)])
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([EXPLAINED, *head, *("| " + " | ".join(row) + " |" for row in rows), ""])


def _cells(line):
    where = line["where"]
    versions = ", ".join(f"{name} {where[name] or 'none'}" for name in ("jax", "torch", "diffusers"))

    def number(value, pattern):
        return "" if value is None else pattern.format(value)

    more = ""
    if line.get("mfu") is not None:
        more = f" (MFU {line['mfu']:.1%})"
    elif isinstance(line.get("tflop"), float):
        more = f" ({line['tflop'] / line['ours']:.3g} TFLOP/s)"
    elif "compiled" in line:
        more = f" ({line['compiled']} programs compiled, {line['from_cache']} read back)"
    return [
        f"{line['name']} ({line['shape']})",
        f"{line['ours']:.4g} {line['unit']}{more}",
        number(line["theirs"], f"{{:.4g}} {line['unit']}"),
        number(line["ratio"], "{:.2f}"),
        number(line["share"], "{:.0%}"),
        number(line["peak_gib"], "{:.1f}"),
        line["target"] or "",
        {True: "yes", False: "no", None: ""}[line["met"]],
        f"{where['device']}, {where['date']} UTC, {versions}",
    ]
