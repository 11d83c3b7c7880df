"""Devices to compile for: `tpu:v5e:4x4`, two slices of it `tpu:v5e:4x4:2`, `gpu:a100-80gb:1x8`.

Their compilers come with the Python packages libtpu and jax[cuda13]; the devices need not be there.
"""

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from unittest import mock

from jax.experimental import topologies

from animecolor_jax.errors import InputError
from animecolor_jax.platforms import GIB


@dataclass(frozen=True)
class Kind:
    """What is known of a device.

    Attributes:
        memory: bytes of a device. bandwidth: of its memory, bytes/s.
        links: bytes/s that a device receives from others of its slice or host, all links together.
        network: bytes/s that a device receives from another slice or host.
        proto: of GPUs, fields of XLA's description that differ from those in `GPU_PROTO`.
        chips: of TPUs, chips of a device; the compiler shows a v4 as its two cores, two devices for each chip
            of the target.

    Source: the makers' data sheets; of H100 and A100 the description that XLA prints on such a device.
    """

    platform: str
    memory: int
    bandwidth: float
    links: float
    network: float
    proto: dict | None = None
    chips: float = 1.0


def _a100(name, memory, bandwidth):
    proto = {
        "fpus_per_core": 64, "core_count": 108, "shared_memory_per_core": 167936, "clock_rate_ghz": 1.41,
        "l2_cache_size": 41943040, "shared_memory_per_block_optin": 166912, "major": 8,
        "device_description_str": name,
    }  # fmt: skip
    return Kind("gpu", memory * GIB, bandwidth, 300e9, 25e9, proto)


KINDS = {
    "v4": Kind("tpu", 16 * GIB, 614e9, 150e9, 3e9, chips=0.5),
    "v5e": Kind("tpu", 16 * GIB, 819e9, 200e9, 3e9),
    "v5p": Kind("tpu", 95 * GIB, 2765e9, 600e9, 6e9),
    "v6e": Kind("tpu", 32 * GIB, 1640e9, 448e9, 6e9),
    "a100-40gb": _a100("NVIDIA A100-SXM4-40GB", 40, 1555e9),
    "a100-80gb": _a100("NVIDIA A100-SXM4-80GB", 80, 2039e9),
    "h100-80gb": Kind(
        "gpu", 80 * GIB, 3352e9, 450e9, 50e9,
        {
            "fpus_per_core": 128, "core_count": 132, "shared_memory_per_core": 233472, "clock_rate_ghz": 1.98,
            "l2_cache_size": 52428800, "shared_memory_per_block_optin": 232448, "major": 9,
            "device_description_str": "NVIDIA H100 80GB HBM3",
        },
    ),
}  # fmt: skip
# else libtpu asks Google's cloud where it is, misses what a pod would have told it, and wants to be alone
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TPU_LAYOUT = r"[1-9]\d*(x[1-9]\d*){1,2}"
GPU_PROTO = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core} threads_per_core_limit: 2048 core_count: {core_count}
  fpus_per_core: {fpus_per_core} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_memory_per_block_optin} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{device_description_str}"
"""


@dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
        text: as it was asked for. kind: Kind. devices: those of JAX, described and not there.
        slices: of them, each a fast network: TPU slices, or hosts with GPUs.
    """

    text: str
    kind: Kind
    devices: tuple
    slices: int

    @property
    def device_kind(self):
        """As `jax.Device.device_kind`."""
        return self.devices[0].device_kind


def open_target(text):
    """The `Target` of a text such as "tpu:v5e:4x4".

    Raises:
        InputError: no such devices, or their compiler is not installed.
    """
    match = re.fullmatch(rf"(tpu|gpu):([^:]+):({TPU_LAYOUT})(?::([1-9]\d*))?", text)
    kind = KINDS.get(match[2]) if match else None
    if kind is None or kind.platform != match[1] or (kind.platform == "gpu" and match[5]):
        raise InputError(
            f"{text!r}", where="--target",
            expected=f"tpu:KIND:CHIPS[:SLICES] or gpu:KIND:HOSTSxGPUS, KIND one of {', '.join(KINDS)}",
            fix="for example tpu:v5e:4x4, tpu:v5p:2x2x4, tpu:v5e:4x4:2, gpu:a100-80gb:1x8",
        )  # fmt: skip
    slices = int(match[5] or 1)
    if kind.platform == "tpu":
        return Target(text, kind, _tpus(match[2], match[3], slices), slices)
    hosts, *gpus = map(int, match[3].split("x"))
    if len(gpus) != 1:
        raise InputError(f"{text!r}", where="--target", expected="gpu:KIND:HOSTSxGPUS", fix="such as 1x8")
    return Target(text, kind, _gpus(kind, hosts, gpus[0]), hosts)


def _tpus(name, layout, slices):
    require_package("libtpu", "tpu", "pip install libtpu")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{layout}", **more)
    except Exception as error:
        raise InputError(
            f"{name}:{layout}: {str(error)[:300]}", where="--target",
            expected="an arrangement of chips that is built, counted in chips",
            fix="for example v5e:2x2, 2x4, 4x4; v5p and v4 have three sides: 2x2x1, 2x2x4",
        ) from error  # fmt: skip
    return tuple(topology.devices)


def _gpus(kind, hosts, gpus):
    require_package("jax_cuda13_plugin", "gpu", 'pip install "jax[cuda13]", in an environment of its own')
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver
    config = GPU_PROTO.format(memory=kind.memory, bandwidth=int(kind.bandwidth), **kind.proto)
    with cuda_without_gpus():
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=config
        )
    return tuple(topology.devices)


def require_package(module, platform, command):
    """Raises InputError unless the compiler for a platform is installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"the compiler for {platform} is not installed", where="--target",
            expected=f"the Python package {module}", fix=command,
        )  # fmt: skip


@contextlib.contextmanager
def cuda_without_gpus():
    """Lets JAX compile for CUDA where there is no GPU, which it refuses (jax-ml/jax#23971, #28376)."""
    from jax._src import xla_bridge

    original = xla_bridge.canonicalize_platform

    def canonicalize(platform):
        return "cuda" if platform in ("gpu", "cuda") else original(platform)

    with mock.patch.object(xla_bridge, "canonicalize_platform", canonicalize):
        yield
