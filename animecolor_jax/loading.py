"""Host batches -> arrays on the devices of a mesh, some batches ahead of the training step.

The batch axis lies over the mesh's `data` and `fsdp` axes. A host reads the rows that its own devices hold;
where `context` or `tensor` reach over several hosts, these hosts read the same rows.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.errors import InputError
from animecolor_jax.sharding import BATCH_AXES


def batch_sharding(mesh):
    """How arrays [B, ...] of a batch lie on a mesh."""
    return NamedSharding(mesh, P(BATCH_AXES))


def rows_of_host(mesh, batch_size):
    """The rows of a batch that this process reads, for `data_pipeline.dataset.training_batches`: ascending
    numbers.

    They need not follow each other: on TPUs a mesh runs along the network's rings, across the hosts.

    Args:
        batch_size: rows of a batch of all hosts together.

    Raises:
        InputError: the devices cannot share the rows equally.
    """
    groups = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size < 1 or batch_size % groups:
        raise InputError(
            f"{batch_size} rows on {' x '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)}",
            where="batch_size",
            expected=f"a multiple of {groups}",
            fix="change batch_size or --mesh",
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in indices for row in range(batch_size)[index]})


def to_device(batch, sharding, batch_size):
    """A host's rows -> arrays of all rows.

    Args:
        batch: {name: array [b, ...], or anything else, which is left as it is}.
        sharding: `batch_sharding(mesh)`.
        batch_size: rows of all hosts together.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
        if isinstance(value, np.ndarray)
        else value
        for name, value in batch.items()
    }


def to_host(x):
    """An array, of which this process may hold only a part, as a whole NumPy array."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class DeviceBatches:
    """Iterator over batches on the devices, read and sent by a thread while the devices compute.

    An exception of the thread is raised by the `next` that would have had its batch.
    """

    def __init__(self, batches, mesh, *, ahead=2):
        """
        Args:
            batches: `data_pipeline.dataset.Batches`, made with `rows_of_host`, and used by nothing else.
            mesh: where to.
            ahead: batches that wait on the devices, besides the one in use; each takes device memory.
        """
        if ahead < 1:
            raise InputError(f"{ahead}", where="ahead", expected="1 batch or more")
        self._batches, self._sharding, self._ahead = batches, batch_sharding(mesh), ahead
        self._state = batches.get_state()
        self._thread = ThreadPoolExecutor(1, "batches")  # one, so that batches come in order
        self._pending = deque()

    def __iter__(self):
        return self

    def __next__(self):
        while len(self._pending) <= self._ahead:
            self._pending.append(self._thread.submit(self._read))
        try:
            batch, self._state = self._pending.popleft().result()
        except BaseException:
            self._drop()
            raise
        return batch

    def get_state(self):
        """The state after the batch that was returned last; batches that only wait do not count."""
        return self._state

    def set_state(self, state):
        """Goes on where `get_state` was called; InputError as from `Batches.set_state`."""
        self._drop()
        self._batches.set_state(state)
        self._state = state

    def close(self):
        """Ends the workers; iterating starts them again, after the batch that was returned last."""
        self._drop()

    def _read(self):
        batch = to_device(next(self._batches), self._sharding, self._batches.batch_size)
        return batch, self._batches.get_state()

    def _drop(self):
        """Forgets the batches that were read but not returned."""
        running = [future for future in self._pending if not future.cancel()]
        wait(running)
        self._pending.clear()
        self._batches.set_state(self._state)
