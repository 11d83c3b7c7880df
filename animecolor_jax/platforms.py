"""The kind of device that programs are traced for, on which some choices of code depend."""

import contextlib
import contextvars

import jax

_chosen = contextvars.ContextVar("platform", default=None)


def platform():
    """That of this process's devices, "cpu", "gpu" or "tpu", unless within `traced_for`."""
    return _chosen.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(name):
    """What is traced within is for devices of that kind, which need not be there.

    Programs that were traced before are forgotten at both ends, as they may be for other devices.
    """
    jax.clear_caches()
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
        jax.clear_caches()
