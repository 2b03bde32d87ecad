"""The devices of a run: one, several, or those of several processes; the results are the same.

Parameters, their optimiser and the data set are replicated; a batch is split over the devices. The
random masks are those of one device (they depend on the key and the global shape alone).
"""

import contextlib
import dataclasses
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
AGREE_EVERY = 16
"""Several processes agree on whether to stop once in this many steps."""


class DeviceError(ValueError):
    """The requested devices are not available."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a run.

    Several processes run the same command, each with its own --process-id, on one file system; the
    first writes the files.
    """

    devices: int | None = None
    """Split each batch over this many devices; by default one, or all of several processes."""
    coordinator: str | None = None
    """HOST:PORT of the first process; by default JAX_COORDINATOR_ADDRESS, if that is set."""
    num_processes: int | None = None
    """Processes in all; by default JAX_NUM_PROCESSES, or what the cluster's scheduler says."""
    process_id: int | None = None
    """Number of this process, from 0; by default JAX_PROCESS_ID, or what the scheduler says."""

    def mesh(self) -> Mesh:
        """Join the other processes, if there are any, and line up the devices.

        Raises:
          DeviceError: there are fewer devices than asked for, or processes without any.
        """
        if self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"):
            handler = signal.getsignal(signal.SIGTERM)
            jax.distributed.initialize(
                self.coordinator,
                _or_environment(self.num_processes, "JAX_NUM_PROCESSES"),
                _or_environment(self.process_id, "JAX_PROCESS_ID"),
            )
            with contextlib.suppress(ValueError):  # only the main thread may
                signal.signal(signal.SIGTERM, handler)  # JAX has put its own in its place
        return data_mesh(self.devices)


def _or_environment(value: int | None, name: str) -> int | None:
    return int(os.environ[name]) if value is None and name in os.environ else value


def data_mesh(devices: int | None = None) -> Mesh:
    """The first `devices` devices in a row; by default one, or all if there are several processes."""
    processes, available = jax.process_count(), jax.devices()
    if devices is None:
        devices = len(available) if processes > 1 else 1
    if not 1 <= devices <= len(available):
        raise DeviceError(f"devices: expected 1 to {len(available)}, got {devices}")
    if processes > 1 and devices != len(available):
        raise DeviceError(f"devices: {processes} processes use all {len(available)}, got {devices}")
    return Mesh(np.array(available[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """This process's first device."""
    return Mesh(np.array(jax.local_devices()[:1]), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays, equal on every process, on every device of a mesh; copied only if needed."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def shard(array: Any, mesh: Mesh, *, axis: int = 0) -> jax.Array:
    """Split an axis of an array, equal on every process, over the devices of a mesh."""
    return _put(array, NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS)))


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if is_key(array):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(tree: Any) -> Any:
    """Copy a tree of replicated arrays to this process's first device."""
    return jax.tree.map(
        lambda leaf: jnp.array(leaf.addressable_data(0)) if isinstance(leaf, jax.Array) else leaf,
        tree,
    )


def is_key(array: Any) -> bool:
    """Whether the elements are random keys."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def anywhere(flag: Any) -> bool:
    """Whether a flag is set on any process."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag)))))


def stop_now(flag: Any, step: int) -> bool:
    """Whether to stop after a step: the same answer on every process, true if any of them sets the flag.

    A single process stops at once. Several processes exchange their flags, which waits for their
    devices, so they do it every `AGREE_EVERY` steps.
    """
    if jax.process_count() > 1 and step % AGREE_EVERY:
        return False
    return anywhere(flag)
