"""BatchNorm with what stands behind it, as each library has it: what `benchmarks.layer` times.

All take batch statistics, move running ones with decay 0.9, and have scale and bias. The libraries
of jax are compiled; torch runs eagerly, features in the channels_last layout. equinox takes
features first, and gets its arrays so.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.plain import BatchNorm
from bnresearch.layers import make_norm
from bnresearch.norm import Scope

Tree = Any
SMALL = 100_000  # elements

# What follows on the norm: (its output, what is added) -> output.
BEHIND: dict[str, Callable[..., Any]] = {
    "BN": lambda y: y,
    "BN+ReLU": lambda y: nn.relu(y),
    "BN+add+ReLU": lambda y, other: nn.relu(y + other),
}


class Layer(NamedTuple):
    """``apply(params, stats, x, *added) -> (y, stats)``, and where the features stand."""

    apply: Callable[..., tuple[jax.Array, Tree]]
    params: Tree
    stats: Tree
    features_first: bool = False


def ours(x: jax.Array, what: str, kernels: str = "auto") -> Layer:
    """The site of a model of bnresearch, with what stands behind as a part of it."""
    activation = nn.relu if "ReLU" in what else None

    def call(norm: Any, x: jax.Array, *added: jax.Array) -> jax.Array:
        return norm(x, activation=activation, add=added[0] if added else None)

    maker = make_norm("batch", scope=Scope(kernels=kernels))
    site = maker(name="norm", activation_follows=activation is not None)
    return _linen(site, x, call)


def linen(x: jax.Array, what: str) -> Layer:
    """flax.linen.BatchNorm."""
    return _linen(BatchNorm(), x, lambda norm, x, *added: BEHIND[what](norm(x), *added))


def _linen(site: nn.Module, x: jax.Array, call: Callable[..., jax.Array]) -> Layer:
    variables = site.init(jax.random.key(0), x)

    def apply(params: Tree, stats: Tree, x: jax.Array, *added: jax.Array) -> tuple[jax.Array, Tree]:
        collections = {"params": params, "batch_stats": stats}
        y, new = site.apply(collections, x, *added, mutable=["batch_stats"], method=call)
        return y, new["batch_stats"]

    return Layer(apply, variables["params"], variables["batch_stats"])


def nnx(x: jax.Array, what: str) -> Layer:
    """flax.nnx.BatchNorm."""
    from flax import nnx

    norm = nnx.BatchNorm(x.shape[-1], momentum=0.9, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def apply(params: Tree, stats: Tree, x: jax.Array, *added: jax.Array) -> tuple[jax.Array, Tree]:
        norm = nnx.merge(graph, params, stats, copy=True)
        y = norm(x, use_running_average=False)
        return BEHIND[what](y, *added), nnx.state(norm, nnx.BatchStat)

    return Layer(apply, params, stats)


def equinox(x: jax.Array, what: str) -> Layer:
    """equinox.nn.BatchNorm, which is written for one example and gets its batch from vmap."""
    import equinox

    make = equinox.nn.make_with_state(equinox.nn.BatchNorm)
    norm, stats = make(x.shape[-1], axis_name="batch", momentum=0.9, mode="batch")
    params, static = equinox.partition(norm, equinox.is_inexact_array)

    def apply(params: Tree, stats: Tree, x: jax.Array, *added: jax.Array) -> tuple[jax.Array, Tree]:
        norm = equinox.combine(params, static)
        whole = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, new = whole(x, stats)
        return BEHIND[what](y, *added), new

    return Layer(apply, params, stats, features_first=True)


def haiku(x: jax.Array, what: str) -> Layer:
    """haiku.BatchNorm."""
    import haiku

    norm = haiku.transform_with_state(
        lambda x: haiku.BatchNorm(True, True, 0.9)(x, is_training=True)
    )
    params, stats = norm.init(jax.random.key(0), x)

    def apply(params: Tree, stats: Tree, x: jax.Array, *added: jax.Array) -> tuple[jax.Array, Tree]:
        y, new = norm.apply(params, stats, None, x)
        return BEHIND[what](y, *added), new

    return Layer(apply, params, stats)


class Torch:
    """torch.nn.BatchNorm1d or 2d, with arrays of its own."""

    def __init__(self, what: str, x: jax.Array, t: jax.Array, added: Sequence[jax.Array]):
        import torch

        # A small array is faster in one thread, above all beside other work.
        torch.set_num_threads(1 if x.size < SMALL else len(os.sched_getaffinity(0)))
        self._torch, self._what = torch, what
        self._place = "cuda" if torch.cuda.is_available() else "cpu"
        kind = torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d
        self._norm = kind(x.shape[-1]).to(self._place)
        self._x, self._t, *self._added = (self._tensor(a) for a in (x, t, *added))
        for tensor in (self._x, *self._added):
            tensor.requires_grad_()

    def _tensor(self, x: jax.Array) -> Any:
        """A transposed view of features-last memory is what torch calls channels_last."""
        tensor = self._torch.tensor(np.asarray(x, np.float32), device=self._place)
        tensor = tensor.permute(0, 3, 1, 2) if x.ndim == 4 else tensor
        return tensor.to(self._torch.bfloat16) if x.dtype == jnp.bfloat16 else tensor

    def __call__(self) -> Any:
        y = self._norm(self._x)
        for other in self._added:
            y = y + other
        return y if self._what == "BN" else self._torch.relu(y)

    def forward(self, calls: int) -> None:
        """With gradients switched on, as in training."""
        for _ in range(calls):
            self()
        self._wait()

    def both(self, calls: int) -> None:
        """Forward and backward."""
        for _ in range(calls):
            for tensor in (self._x, *self._added, *self._norm.parameters()):
                tensor.grad = None
            self().backward(self._t)
        self._wait()

    def _wait(self) -> None:
        if self._place == "cuda":
            self._torch.cuda.synchronize()

    def kept(self) -> int:
        """Bytes of the distinct buffers that autograd saves."""
        saved: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with self._torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self()
        del y
        return sum(saved.values())


OURS, LINEN, TORCH = "bnresearch", "flax.linen", "torch"
BY_XLA = "bnresearch, XLA alone"
JAX: dict[str, Callable[[jax.Array, str], Layer]] = {
    OURS: ours,
    BY_XLA: partial(ours, kernels="xla"),
    LINEN: linen,
    "flax.nnx": nnx,
    "equinox": equinox,
    "haiku": haiku,
}
