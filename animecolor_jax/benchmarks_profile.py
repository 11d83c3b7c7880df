"""Where a CPU's time goes in the bundled model's denoising and training: arithmetic, or moving numbers about.

    python -m animecolor_jax.benchmarks_profile

Shares of the operations' time, all threads together, from JAX's profiler.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from animecolor_jax.benchmarks_train import Shape, Step
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.train import stages
from animecolor_jax.weights import BUNDLED, Weights

KINDS = ("products", "elementwise and sums", "copies")
# an operation's name lists what it fuses, such as "broadcast_multiply_fusion.3"
PRODUCTS = re.compile(r"ynn|dot|conv_general|convolution|custom-call|matmul")
COPIES = re.compile(
    r"(wrapped_|fused_|_?(copy|bitcast|concatenate|dynamic-slice|dynamic-update-slice|slice|pad|transpose|"
    r"broadcast|reshape|gather|reverse|convert|fusion|clone))+"
)


def kind_of(operation):
    """One of KINDS for an operation's name; None for loops and calls, whose operations count."""
    name = operation.partition(".")[0].removeprefix("end: ")
    if operation.startswith("end: ") or name in ("while", "conditional", "cond", "call", "tuple"):
        return None
    if PRODUCTS.search(name):
        return KINDS[0]
    return KINDS[2] if COPIES.fullmatch(name) else KINDS[1]


def profile(run):
    """{kind: share of time} of a function of nothing, after a first call."""
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        seconds = collections.Counter()
        for line in (line for plane in planes for line in plane.lines):
            for event in line.events:
                # programs' operations say which program they are of; the rest is the runtime's and Python's
                if any(name == "hlo_op" for name, _ in event.stats) and (kind := kind_of(event.name)):
                    seconds[kind] += event.duration_ns
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in KINDS}


def main():
    """Prints a line for each."""
    pipeline = Pipeline.load(BUNDLED, dtype="float32")
    rng = np.random.default_rng(0)

    def colour():  # another clip and reference each time: the pipeline keeps what it last encoded
        sketch, reference = (
            rng.integers(256, size=size, dtype=np.uint8) for size in ((9, 64, 96, 3), (64, 96, 3))
        )
        pipeline(sketch, reference, num_steps=20, progress=False)

    shape = Shape("bundled", Weights(BUNDLED).config, (3, 16, 24), "float32", "none")
    measured = {
        "colouring a clip, 20 steps": colour,
        "training step, stage 4, batch 4": Step(stages.JOINT, shape, 4),
    }
    for name, run in measured.items():
        print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in profile(run).items()))


if __name__ == "__main__":
    main()
