import itertools
import json
import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small_datasets import IMAGE, LONG, WIDE, write_clips, write_encoded

from animecolor_jax.errors import InputError
from animecolor_jax.loading import DeviceBatches, batch_sharding, rows_of_host
from animecolor_jax.sharding import make_mesh
from data_pipeline.dataset import DataConfig, evaluation_batches, training_batches
from data_pipeline.views import ViewConfig

CONFIG = DataConfig(batch_size=8, seed=1, view=ViewConfig(flip=0.5))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize(
    "axes", [{"data": 4, "fsdp": 2}, {"fsdp": 2, "context": 4}, {"data": 2, "tensor": 4}, {}]
)
def test_batches_on_a_mesh_are_those_of_the_host(clips, axes):
    mesh = make_mesh(**axes)
    expected = training_batches(clips, CONFIG)
    batches = DeviceBatches(training_batches(clips, CONFIG, rows=rows_of_host(mesh, 8)), mesh)
    for batch, plain in itertools.islice(zip(batches, expected, strict=False), 3):
        assert batch.keys() == plain.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, plain[name])
            if isinstance(plain[name], np.ndarray):
                assert array.dtype == plain[name].dtype and array.sharding == batch_sharding(mesh)
                rows = 8 // (axes.get("data", 1) * axes.get("fsdp", 1))
                assert all(shard.data.shape[0] == rows for shard in array.addressable_shards)
    batches.close()
    expected.close()


def test_bfloat16_latents_arrive_as_they_are(tmp_path):
    counts = {WIDE: {"train": 8, "test": 0}}
    clips, encoded = write_clips(tmp_path, counts), write_encoded(tmp_path, clips=counts)
    plain = next(training_batches(clips, DataConfig(batch_size=8), encoded=encoded))
    host = training_batches(clips, DataConfig(batch_size=8), encoded=encoded)
    batches = DeviceBatches(host, make_mesh(fsdp=8))
    batch = next(batches)
    assert batch["video_mean"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(batch["video_mean"], plain["video_mean"])
    batches.close()


def test_the_state_counts_what_was_returned_not_what_was_read_ahead(clips):
    mesh = make_mesh(data=2)
    batches = DeviceBatches(training_batches(clips, CONFIG), mesh, ahead=3)
    assert batches.get_state()["step"] == 0
    taken = [next(batches)["id"] for _ in range(4)]
    state = batches.get_state()
    assert state["step"] == 4
    following = next(batches)
    batches.set_state(state)
    again = next(batches)
    assert again["id"] == following["id"] and again["id"] != taken[-1]
    np.testing.assert_array_equal(again["video"], following["video"])
    batches.close()
    assert next(batches)["id"] == next(training_batches(clips, CONFIG, start_step=5))["id"]
    batches.close()


def test_batches_end_and_errors_arrive_where_the_batch_would(clips, tmp_path):
    batches = DeviceBatches(evaluation_batches(clips, 2), make_mesh(data=2))
    assert len(list(batches)) == 3 and next(batches, None) is None

    damaged = write_clips(tmp_path, {IMAGE: {"train": 1, "test": 0}, LONG: {"train": 1, "test": 0}})
    for shard in tmp_path.glob("animecolor/17x*/*/*train*"):
        data = bytearray(shard.read_bytes())
        data[data.find(b"ftyp")] ^= 255
        shard.write_bytes(data)
    batches = DeviceBatches(training_batches(damaged, DataConfig(batch_size=1)), make_mesh())
    with pytest.raises(InputError, match="is damaged"):
        list(itertools.islice(batches, 4))
    with pytest.raises(InputError, match="is damaged"):
        list(itertools.islice(batches, 2))


@pytest.mark.parametrize("batch_size", [0, 6])
def test_rows_that_devices_cannot_share_are_refused(batch_size):
    with pytest.raises(InputError, match="data=2 x fsdp=2"):
        rows_of_host(make_mesh(data=2, fsdp=2), batch_size)


def test_ahead_is_at_least_one(clips):
    with pytest.raises(InputError, match="ahead"):
        DeviceBatches(training_batches(clips, CONFIG), make_mesh(), ahead=0)


TWO_HOSTS = """
import json, sys
import jax
import numpy as np
port, process, path, tests = sys.argv[1:]
sys.path.insert(0, tests)
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from animecolor_jax.loading import DeviceBatches, rows_of_host
from animecolor_jax.sharding import make_mesh
from data_pipeline.dataset import training_batches
from data_pipeline.records import open_clips
from test_loading import CONFIG

said = {}
devices = jax.devices()
across = [devices[0], devices[2], devices[1], devices[3]]
for name, axes, order in (
    ("rows", {"data": 2, "fsdp": 2}, devices),
    ("rings", {"fsdp": 4}, across),
    ("tokens", {"context": 4}, devices),
):
    mesh = make_mesh(**axes, devices=order)
    rows = rows_of_host(mesh, 8)
    batches = DeviceBatches(training_batches(open_clips(path), CONFIG, rows=rows), mesh)
    batch = next(batches)
    weights = np.arange(1, 9)[:, None]
    total = jax.jit(lambda numbers: (numbers * weights).sum())(batch["frame_numbers"])
    said[name] = [rows, list(batch["frame_numbers"].shape), int(total)]
    batches.close()
print(json.dumps(said))
"""


def test_two_hosts_load_the_global_batch_together(clips):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_HOSTS, str(port)]
    hosts = [
        subprocess.Popen(
            [*command, str(process), str(clips.storage), os.path.dirname(__file__)],
            stdout=subprocess.PIPE,
            text=True,
            env=flags,
        )
        for process in range(2)
    ]
    said = [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
    numbers = next(training_batches(clips, CONFIG))["frame_numbers"]
    total = int((numbers * np.arange(1, 9)[:, None]).sum())
    for process in range(2):
        half, alternating = range(4 * process, 4 * process + 4), ([0, 1, 4, 5], [2, 3, 6, 7])[process]
        assert said[process]["rows"] == [list(half), list(numbers.shape), total]
        assert said[process]["rings"] == [alternating, list(numbers.shape), total]
        assert said[process]["tokens"] == [list(range(8)), list(numbers.shape), total], "both read all rows"
