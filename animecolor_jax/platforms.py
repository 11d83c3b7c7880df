"""The kind of device that programs are traced for, on which some choices of code depend; its memory."""

import contextlib
import contextvars
import os

import jax

GIB = 2**30  # bytes
USABLE = 0.92  # of a device's memory that a program may take
_chosen = contextvars.ContextVar("platform and device kind", default=(None, None))


def platform():
    """That of this process's devices, "cpu", "gpu" or "tpu", unless within `traced_for`."""
    return _chosen.get()[0] or jax.default_backend()


def device_kind():
    """As `jax.Device.device_kind`, such as "TPU v5 lite", of the devices that `platform` is of."""
    return _chosen.get()[1] or jax.devices()[0].device_kind


def has_fused_attention():
    """Whether this process's GPUs are NVIDIA's from Ampere (A100, RTX 30) on, which cuDNN's attention needs;
    True within `traced_for`: no others are described."""
    if _chosen.get()[0]:
        return True
    capability = jax.devices()[0].compute_capability  # such as "8.0", on AMD's "gfx942"
    return capability[0].isdigit() and float(capability) >= 8


@contextlib.contextmanager
def traced_for(platform, device_kind=None):
    """What is traced within is for devices of that kind, which need not be there.

    Programs that were traced before are forgotten at both ends, as they may be for other devices.
    """
    jax.clear_caches()
    token = _chosen.set((platform, device_kind))
    try:
        yield
    finally:
        _chosen.reset(token)
        jax.clear_caches()


def device_memory(device):
    """Bytes that programs may have of a device, None if unknown; of a CPU its share of the machine's."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count("cpu")
    return (device.memory_stats() or {}).get("bytes_limit")
