"""A pytree as named leaves, "params/conv1/kernel" -> array, and the digest of their bits."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Leaf(NamedTuple):
    """What a leaf looks like without its values."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path name ("params/conv1/kernel"), in the order of the pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two leaves of the state have the same path name")
    return found


def arrays_of(tree: Any) -> dict[str, np.ndarray]:
    """The values of the leaves by path name, on the host."""
    return {name: np.asarray(leaf) for name, leaf in jax.device_get(named(tree)).items()}


def leaves_of(tree: Any) -> dict[str, Leaf]:
    """What the leaves look like, by path name."""
    return {
        name: Leaf(np.dtype(leaf.dtype).name, tuple(leaf.shape))
        for name, leaf in named(tree).items()
    }


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Path names to nested dicts, so that any orbax reader finds params as flax has them."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """See ``checkpoint.digest``."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        # As uint8, because numpy hands out no buffer of bfloat16.
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()
