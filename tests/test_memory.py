"""Memory that is promised: of attention at full size, and of conversion."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from animecolor_jax import safetensors_io
from animecolor_jax.config import preset
from animecolor_jax.models.transformer import Block

MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"
GIB = 2**30
# a process of its own, whose last line of stderr is its peak memory in KiB
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def run_measured(script, *arguments):
    """Runs a Python file; returns its peak memory in bytes and its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stderr.splitlines()[-1]), done.stdout


def test_a_full_width_block_at_full_length_needs_less_than_4_gib():
    config = dataclasses.replace(preset("animecolor-2b").denoiser, attention="chunked")
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    shapes = [(1, 226, config.dim), (1, 17550, config.dim), (1, config.time_embed_dim)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(lambda block, *xs: block(*xs)).lower(block, *arrays).compile().memory_analysis()
    scores = 4 * config.num_heads * 17776**2
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4 * GIB < scores / 8


@pytest.mark.slow
def test_a_full_width_block_runs_within_4_gib_beyond_the_weights(tmp_path):
    script = tmp_path / "block.py"
    script.write_text(
        "import jax, jax.numpy as jnp\n"
        "from flax import nnx\n"
        "from animecolor_jax.config import preset\n"
        "from animecolor_jax.models.transformer import Block\n"
        "config = preset('animecolor-2b').denoiser\n"
        "block = jax.jit(lambda: Block(config, rngs=nnx.Rngs(0)))()\n"
        "shapes = (1, 226, config.dim), (1, 17550, config.dim), (1, config.time_embed_dim)\n"
        "xs = [jnp.ones(shape) for shape in shapes]\n"
        "out = jax.jit(lambda block, *xs: block(*xs))(block, *xs)\n"
        "print(sum(x.nbytes for x in jax.tree.leaves(block)), bool(jnp.isfinite(out[1]).all()))\n"
    )
    peak, printed = run_measured(script)
    weights, finite = printed.split()
    assert finite == "True" and peak < int(weights) + 4 * GIB


@pytest.mark.slow
def test_converting_a_2b_denoiser_peaks_at_1_3_times_its_size(tmp_path):
    manifest = json.loads((MANIFESTS / "denoiser_2b_animecolor.json").read_text())
    bfloat16 = jnp.dtype(jnp.bfloat16)
    specs = {key: safetensors_io.Spec(tuple(shape), bfloat16) for key, (shape, _) in manifest["keys"].items()}
    source = tmp_path / "transformer"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(manifest["config"]))
    leaves = ((key, np.full(spec.shape, 0.5, bfloat16)) for key, spec in specs.items())
    safetensors_io.write(source / "diffusion_pytorch_model.safetensors", specs, leaves, {"format": "pt"})
    size = sum(spec.nbytes for spec in specs.values())
    tool = Path(__file__).parents[1] / "tools" / "convert_torch.py"
    script = tmp_path / "convert.py"  # the tool leaves through sys.exit
    script.write_text(
        f"import runpy, sys\nsys.argv[0] = {str(tool)!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    peak, _ = run_measured(script, "--source", f"denoiser={source}", "--out", tmp_path / "weights")
    print(f"component {size / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, {peak / size:.2f} times")
    assert peak < 1.3 * size


def test_peak_measurement_sees_what_a_process_allocates(tmp_path):
    script = tmp_path / "allocate.py"
    script.write_text("x = bytearray(300 * 2**20)\nprint(len(x))\n")
    peak, printed = run_measured(script)
    assert re.fullmatch(r"\d+\n", printed) and peak > 300 * 2**20
