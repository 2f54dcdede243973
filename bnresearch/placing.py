"""Which devices a run has, and how arrays get there; of one process or of several."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from bnresearch.errors import UserError


def pick_devices(count: int) -> list[jax.Device]:
    """The first ``count`` devices, or all of them for 0; of several processes equally many of each,
    in the order of the processes, so that each has neighbouring rows of a batch."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    processes = jax.process_count()
    if processes > 1:
        return _pick_of_each(devices, count, processes)
    if count > len(devices):
        platform = devices[0].platform
        hint = f"; JAX_NUM_CPU_DEVICES={count} makes fake ones" if platform == "cpu" else ""
        raise UserError(
            f"parallel.devices={count}, but this machine has {len(devices)} {platform} device(s); "
            f"give 0 to use all{hint}"
        )
    return devices[:count] if count else devices


def _pick_of_each(devices: list[jax.Device], count: int, processes: int) -> list[jax.Device]:
    of_each = [[d for d in devices if d.process_index == index] for index in range(processes)]
    least, wanted = min(map(len, of_each)), count // processes
    if count % processes or wanted > least or (not count and least < max(map(len, of_each))):
        raise UserError(
            f"parallel.devices={count} on {processes} processes, which have "
            f"{', '.join(str(len(own)) for own in of_each)} devices: each has to give equally "
            f"many; choose a multiple of {processes}, up to {processes * least}"
        )
    return [device for own in of_each for device in own[: wanted or None]]


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """``jax.device_put`` of the leaves that do not lie there already: of a whole state it takes as
    long as a few steps of a small net. Of several processes each has the same tree."""
    leaves, structure = jax.tree.flatten(tree)
    away = [
        index
        for index, leaf in enumerate(leaves)
        if not (isinstance(leaf, jax.Array) and leaf.sharding == sharding)
    ]
    moved = _put([leaves[index] for index in away], sharding)
    for index, leaf in zip(away, moved, strict=True):
        leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)


def _put(leaves: list[Any], sharding: NamedSharding) -> list[Any]:
    if jax.process_count() == 1:
        return jax.device_put(leaves, sharding)
    # device_put would compare the values of all processes.
    arrays = [np.asarray(leaf) for leaf in leaves]
    return [
        jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in arrays
    ]


def addressable(leaf: Any) -> Any:
    """The value of what lies on devices of other processes, too."""
    return leaf if getattr(leaf, "is_fully_addressable", True) else np.asarray(leaf)
