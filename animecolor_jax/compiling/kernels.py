"""What TPU kernels of attention cost by their compiled code: our own beside JAX's splash attention.

    python -m animecolor_jax.compiling.kernels --target tpu:v5e:2x2

One layer of the 2B model, its clip of 49x480x720 with bank and text, forward and backward, on one chip. A
kernel's code for a block of scores is straight; what is counted are the instruction words (bundles) of its
longest straight stretch, one a cycle if nothing has to be waited for. Beside it what the kernels need done
around them: temporary memory, and traffic of it. Compiled, not measured.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled here runs nowhere

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from animecolor_jax import flops  # noqa: E402
from animecolor_jax.compiling import hlo, programs, targets  # noqa: E402
from animecolor_jax.config import preset  # noqa: E402
from animecolor_jax.errors import InputError  # noqa: E402
from animecolor_jax.models import attention, packed_attention  # noqa: E402
from animecolor_jax.platforms import GIB, traced_for  # noqa: E402

# scores that a kernel makes in a block, of all heads in it
BLOCKS = {
    "packed": 2 * packed_attention.QUERY_BLOCK * packed_attention.KEY_BLOCK,
    "splash": attention.SPLASH_BLOCK**2,
}
MILLION = 2**20
# kernels by their names in the compiler's files; a backward pass may consist of several
KERNELS = {
    "packed": {"forward": ["packed_attention_."], "backward": ["packed_attention_backward"]},
    "splash": {"forward": ["splash_mha_fwd"], "backward": ["splash_mha_dq", "splash_mha_dkv"]},
}


def longest_stretch(lines):
    """Bundles of the longest piece of a kernel's code without a branch or a place that one leads to.

    Args:
        lines: of the compiler's file of final bundles.
    """
    start = longest = position = 0
    for line in lines:
        bundle = re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line)
        if bundle is None:
            continue
        position = int(bundle[1], 16)
        labelled = re.match(r"\s*\S+\s+[A-Z]{2}\s*:", line)
        if labelled or "sbr.rel" in line:
            longest, start = max(longest, position - start), position
    return max(longest, position - start)


def compare(target, code):
    """Compiles a layer's attention with each kernel.

    Args:
        target: `targets.Target` of TPUs. code: folder where the compiler leaves its files.

    Returns:
        [{"backend", "temp_gib", "traffic_gib", "forward", "backward" (bundles for 2^20 scores)}].
    """
    model = preset("animecolor-2b")
    config, latents = model.denoiser, programs.Clip(49, 480, 720).latents(model.vae)
    mesh = jax.sharding.Mesh(np.array(target.devices[:1]), ("device",))
    one = NamedSharding(mesh, P())

    def tokens(count):
        shape = (1, count, config.num_heads, config.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)

    q = [tokens(config.text_length), tokens(flops.tokens_of(config, latents))]
    k = [tokens(flops.tokens_of(config, (1, *latents[1:]))), *q]
    found = []
    for backend, scores in BLOCKS.items():

        def layer(q, k, v, cotangent, backend=backend):
            out, pull = jax.vjp(lambda *xs: attention.joint_attention(*xs, backend), q, k, v)
            return out, pull(cotangent)

        with traced_for("tpu", target.device_kind):
            compiled = jax.jit(layer).lower(q, k, k, q).compile()
        bundles = {
            direction: sum(_bundles(code, name) for name in names) * MILLION / scores
            for direction, names in KERNELS[backend].items()
        }
        found.append({
            "backend": backend, "temp_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
            "traffic_gib": hlo.memory_traffic(hlo.instructions(compiled.as_text())) / GIB, **bundles,
        })  # fmt: skip
    return found


def _bundles(code, name):
    """The longest stretch of all kernels of that name."""
    files = [
        path for path in Path(code).iterdir()
        if name in path.name and path.name.endswith("final_bundles.txt") and "schedule" not in path.name
    ]  # fmt: skip
    if not files:
        raise RuntimeError(f"this libtpu writes no file of final bundles for {name}")
    return max(longest_stretch(path.read_text(errors="replace").splitlines()) for path in files)


def main(argv=None):
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="tpu:v5e:2x2", help="tpu:KIND:CHIPS; one chip of them is used")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as code:
        options = f"--xla_jf_dump_to={code} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}"
        try:
            if not args.target.startswith("tpu:"):
                raise InputError(args.target, where="--target", expected="TPUs", fix="tpu:v5e:2x2")
            target = targets.open_target(args.target)
        except InputError as error:
            parser.error(str(error))
        found = compare(target, code)
    for row in found:
        print(
            f"{row['backend']}: {row['forward']:.0f} bundles forward, {row['backward']:.0f} backward, "
            f"for 2^20 scores; around them {row['temp_gib']:.2f} GiB temporary, "
            f"{row['traffic_gib']:.1f} GiB moved"
        )
    if args.json:
        print(json.dumps({"target": args.target, "results": found}))


if __name__ == "__main__":
    main()
