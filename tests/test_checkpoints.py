"""Training checkpoints: exact on any mesh, and never lost to a kill, a full disk or a damaged file."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.errors import InputError
from animecolor_jax.train.checkpoints import Checkpoints, checksum, read_params
from animecolor_jax.train.config import CheckpointConfig

# Orbax leaves its readers unfinished when one of them finds damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

AXES = ("data", "fsdp", "context", "tensor")
DATA_STATE = {"step": 3, "shards": [1, 2], "position": {"epoch": 0}}
RUN_CONFIG = {"seed": 0, "optimizer": {"name": "adamw", "ema": None}}


class State(NamedTuple):
    step: Any
    trainable: Any
    opt_state: Any
    ema: Any
    frozen: Any
    key: Any


def make_mesh(*shape):
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 4, devices=jax.devices()[: int(np.prod(shape))])


MESH = make_mesh(1, 8, 1, 1)


def create(step, rows=512, ema=False):
    """A state that is a function of its step only; Orbax would keep smaller arrays within its index."""
    value = jnp.arange(rows * 8, dtype=jnp.float32).reshape(rows, 8) / 7 + step
    trainable = {f"denoiser/blocks/{name}/kernel": value * i for i, name in enumerate("qkv", 1)}
    frozen = {"lcg/patch/kernel": value.astype(jnp.bfloat16)}
    transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0, 1, 10)))
    average = jax.tree.map(lambda leaf: leaf / 2, trainable) if ema else None
    opt_state = transformation.init(trainable)
    return State(jnp.int32(step), trainable, opt_state, average, frozen, jax.random.key(step))


def abstract(mesh=MESH, **kwargs):
    shapes = jax.eval_shape(lambda step: create(step, **kwargs), 0)
    spec = P("fsdp", ("context", "tensor"))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec if leaf.ndim == 2 else P())
        ),
        shapes,
    )


def state(step, mesh=MESH, **kwargs):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(mesh, **kwargs))
    return jax.jit(lambda step: create(step, **kwargs), out_shardings=shardings)(step)


def values(tree):
    """NumPy copies of all leaves."""
    return [
        np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(values(first), values(second), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def saved(directory, *steps, keep=3, keep_every=0, **kwargs):
    checkpoints = Checkpoints(directory, CheckpointConfig(keep=keep, keep_every=keep_every))
    for step in steps:
        checkpoints.save(step, state(step, **kwargs), {**DATA_STATE, "step": step}, RUN_CONFIG)
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two_steps")
    saved(directory, 1, 2)
    return directory


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of `two_steps` to do harm to."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def test_restored_on_other_meshes_bit_for_bit(tmp_path):
    checkpoints = saved(tmp_path, 3, ema=True)
    for mesh in (MESH, make_mesh(2, 2, 2, 1), make_mesh(1, 1, 1, 1)):
        wanted = abstract(mesh, ema=True)
        restored = checkpoints.restore(wanted)
        assert restored.step == 3 and restored.data_state == DATA_STATE and restored.run_config == RUN_CONFIG
        assert_same(restored.state, state(3, ema=True))
        for leaf, like in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        np.testing.assert_array_equal(
            jax.random.normal(restored.state.key, (3,)), jax.random.normal(jax.random.key(3), (3,))
        )


def test_no_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", CheckpointConfig())
    assert checkpoints.restore(abstract()) is None
    assert checkpoints.latest_step() is None and checkpoints.steps() == []


def test_newest_and_multiples_stay(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, keep=2, keep_every=2)
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.latest_step() == 5


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    wipe = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    for mesh in (MESH, make_mesh(1, 1, 1, 1)):
        checkpoints = Checkpoints(tmp_path / str(mesh.size), CheckpointConfig())
        current, data_state = state(4, mesh, rows=8000), {"position": 4}
        checkpoints.save(4, current, data_state, RUN_CONFIG)
        data_state["position"] = 5
        for _ in range(3):
            current = current._replace(trainable=jax.tree.map(wipe, current.trainable))
        jax.block_until_ready(current)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(mesh, rows=8000))
        assert_same(restored.state, state(4, mesh, rows=8000))
        assert restored.data_state == {"position": 4}


def array_data(path):
    """The file that holds the arrays of the checkpoint at `path`."""
    (file,) = (path / "state" / "ocdbt.process_0" / "d").iterdir()
    return file


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


HARMS = {
    "array data cut": lambda path: truncate(array_data(path), 500),
    "array data deleted": lambda path: array_data(path).unlink(),
    "one bit of array data": lambda path: flip(array_data(path), 20_000),
    "index of arrays deleted": lambda path: (path / "state" / "manifest.ocdbt").unlink(),
    "names cut": lambda path: truncate(path / "state" / "_METADATA", 300),
    "a name changed": lambda path: flip(path / "state" / "_METADATA", 300),
    "Orbax's description deleted": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "data iterator emptied": lambda path: truncate(path / "data_state" / "data.json", 0),
    "one bit of the data iterator": lambda path: flip(path / "data_state" / "data.json", 9),
    "config deleted": lambda path: shutil.rmtree(path / "run_config"),
    "contents cut": lambda path: truncate(path / "contents" / "data.json", 200),
    "everything deleted": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_damaged_newest_falls_back_and_says_so(run, capfd, harm):
    harm(run / "2")
    checkpoints = Checkpoints(run, CheckpointConfig())
    restored = checkpoints.restore(abstract())
    assert restored.step == 1 and restored.data_state == {**DATA_STATE, "step": 1}
    assert_same(restored.state, state(1))
    message = [line for line in capfd.readouterr().err.splitlines() if line.startswith("checkpoint ")]
    assert len(message) == 1 and f"{run / '2'} is damaged (" in message[0]
    assert message[0].endswith("renamed 2.damaged, using step 1 instead")
    assert checkpoints.steps() == [1] and (run / "2.damaged").exists()


def test_the_damaged_step_can_be_saved_again(run):
    HARMS["array data cut"](run / "2")
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.restore(abstract())
    checkpoints.save(2, state(2), {"again": True}, RUN_CONFIG, wait=True)
    assert checkpoints.restore(abstract()).data_state == {"again": True}


def test_all_damaged_is_an_error_that_names_them_and_moves_nothing(run):
    HARMS["array data cut"](run / "1")
    HARMS["contents cut"](run / "2")
    with pytest.raises(InputError, match="(?s)every checkpoint is damaged: 2: contents.*; 1: state.*fix:"):
        Checkpoints(run, CheckpointConfig()).restore(abstract())
    assert sorted(os.listdir(run)) == ["1", "2"]


def test_another_state_is_an_error_and_no_damage(run):
    checkpoints = Checkpoints(run, CheckpointConfig())
    wanted = abstract()
    trainable = dict(wanted.trainable)
    del trainable["denoiser/blocks/q/kernel"]
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(MESH, P()))
    trainable |= {"denoiser/blocks/k/kernel": shape, "denoiser/new": shape}
    with pytest.raises(InputError) as caught:
        checkpoints.restore(wanted._replace(trainable=trainable))
    assert "missing [trainable/denoiser/new]" in str(caught.value)
    assert "unexpected [trainable/denoiser/blocks/q/kernel]" in str(caught.value)
    assert "trainable/denoiser/blocks/k/kernel is float32[512, 8], expected float32[8, 8]" in str(
        caught.value
    )
    assert checkpoints.steps() == [1, 2]


def test_checksum_is_the_same_on_every_mesh_and_shows_every_changed_bit():
    array = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    expected = int(checksum(array))
    for mesh, spec in (
        (MESH, P("fsdp")),
        (MESH, P(None, "fsdp")),
        (make_mesh(2, 2, 2, 1), P("context", "data")),
    ):
        assert int(checksum(jax.device_put(array, NamedSharding(mesh, spec)))) == expected
    seen = {expected, int(checksum(array[::-1])), int(checksum(np.roll(array, 1)))}
    for bit in range(32):
        changed = array.copy()
        changed.view(np.uint32)[3, 5] ^= np.uint32(1 << bit)
        seen.add(int(checksum(changed)))
    assert len(seen) == 35


@pytest.mark.parametrize("ema", [False, True])
def test_parameters_are_read_without_mesh_or_optimizer_state(tmp_path, ema):
    saved(tmp_path, 5, 6, ema=ema)
    step, trained, frozen, run_config = read_params(tmp_path)
    assert step == 6 and run_config == RUN_CONFIG
    expected = create(6, ema=ema)
    for part, wanted in ((trained, expected.ema if ema else expected.trainable), (frozen, expected.frozen)):
        assert sorted(part) == sorted(wanted)
        assert all(isinstance(array, np.ndarray) for array in part.values())
        assert_same(part, {name: np.asarray(array) for name, array in wanted.items()})
    assert read_params(tmp_path, step=5)[0] == 5


def test_parameters_of_a_missing_or_damaged_checkpoint_are_an_error(run):
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        read_params(run, step=7)
    HARMS["array data deleted"](run / "2")
    with pytest.raises(InputError, match=r"(?s)is damaged: state: .*another of the steps \[1, 2\]"):
        read_params(run)


def child(body, *args):
    """Starts Python on `body`, with this file's functions."""
    program = f"from test_checkpoints import *\ndirectory = sys.argv[1]\n{body}"
    root = Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_an_error_and_loses_nothing(run):
    """No file may grow beyond 50 kB: what the system answers then takes the same way as a full disk."""
    body = """
import resource
checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
for finish in (checkpoints.wait, checkpoints.close, lambda: checkpoints.save(5, *later)):
    later = state(3, rows=8000), {}, {}
    checkpoints.save(3, *later)
    try:
        finish()
    except OSError as error:
        print(str(error).replace("\\n", " "))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(checkpoints.steps(), os.listdir(directory))
checkpoints.save(4, state(4), {}, {}, wait=True)
print(checkpoints.steps())
"""
    process = child(body, run)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert len(lines) == 5
    for line in lines[:3]:
        assert "step 3 could not be written" in line and "it goes on from step 2" in line
    assert lines[3].startswith("[1, 2] ") and "tmp" not in lines[3] and lines[4] == "[2, 4]"
    restored = Checkpoints(run, CheckpointConfig()).restore(abstract())
    assert restored.step == 4 and (run / "2").exists()


def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path):
    body = """
checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
restored = checkpoints.restore(abstract(rows=20_000))
step = restored.step if restored else 0
while True:
    step += 1
    checkpoints.save(step, state(step, rows=20_000), {"step": step}, RUN_CONFIG)
    print(step, flush=True)
"""
    chance, before, interrupted = random.Random(0), 0, 0
    for _ in range(3):
        process = child(body, tmp_path)
        for _ in range(chance.randint(2, 3)):
            printed = process.stdout.readline()
            assert printed, process.stderr.read()
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
        interrupted += any(not name.isdigit() for name in os.listdir(tmp_path))
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
        assert all(name.isdigit() for name in os.listdir(tmp_path))
        restored = checkpoints.restore(abstract(rows=20_000))
        # The save before the last one that returned was waited for.
        assert restored.step >= int(printed) - 1 > before
        assert_same(restored.state, state(restored.step, rows=20_000))
        assert restored.data_state == {"step": restored.step}
        before = restored.step
    assert interrupted, "no kill met a half-written checkpoint: the test shows too little"
