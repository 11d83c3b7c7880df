"""Networks that wait in the host's memory for their turn on the devices."""

import contextlib
import copy

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from animecolor_jax.errors import InputError

MODES = ("auto", "yes", "no")
SHARE = 0.5  # of a device's memory: networks that together take more do not all stay


class Offloaded:
    """A network whose parameters lie in the host's memory, and on the devices only while it is used.

    Takes over the network it is given, whose arrays are deleted.

    Attributes:
        structure: the network with descriptions in place of arrays.
    """

    def __init__(self, network):
        self._graph, state = nnx.split(network)
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        self._host, self._loaded = jax.device_get(state), None
        self.structure = nnx.merge(
            self._graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        )
        _delete(state)

    def on(self, device):
        """The same network for another device; what lies in the host's memory is shared."""
        other = copy.copy(self)
        other._shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), self._shardings)
        return other


def copy_to(network, device):
    """A network as it is, on another device."""
    if isinstance(network, Offloaded):
        return network.on(device)
    graph, state = nnx.split(network)
    return nnx.merge(graph, jax.device_put(state, device))


@contextlib.contextmanager
def on_devices(network):
    """The network itself, its parameters on the devices until the end of the context, the outermost where
    several are nested."""
    if not isinstance(network, Offloaded) or network._loaded is not None:
        yield getattr(network, "_loaded", network)
        return
    state = jax.device_put(network._host, network._shardings)
    network._loaded = nnx.merge(network._graph, state)
    try:
        yield network._loaded
    finally:
        network._loaded = None
        _delete(state)  # what still computes with them keeps them until it has finished


def _delete(state):
    jax.tree.map(lambda leaf: leaf.delete(), state)


def structure(network):
    """The network, or of an offloaded one its structure: for its configs."""
    return network.structure if isinstance(network, Offloaded) else network


def is_needed(mode, taken, limit, several_processes=False):
    """Whether networks are to be offloaded.

    Args:
        mode: one of `MODES`. taken: bytes of all networks on one device. limit: bytes that programs may have
            of its memory, or None where that is not known.
        several_processes: whether this process has only a part of the parameters.

    Raises:
        InputError: another mode, or one process of several.
    """
    if mode not in MODES:
        raise InputError(f"{mode!r}", where="--offload", expected=f"one of {', '.join(MODES)}")
    if mode == "yes" and several_processes:
        raise InputError("yes in several processes", where="--offload", expected="no", fix="use more devices")
    if mode == "auto":
        return limit is not None and taken > SHARE * limit and not several_processes
    return mode == "yes"
