"""Over what statistics are taken: sets of values, masks, devices, and running averages.

Conventions of the whole project:

* features last: ``x`` is ``[batch, ..., features]``; one set of statistics per feature;
* ``decay``: ``running <- decay * running + (1 - decay) * batch`` (torch: ``momentum = 1 - decay``);
* ``correction``: 0 keeps the biased batch variance (divided by n), 1 the unbiased one (by n - 1).
  The batch itself is always normalised with the biased variance;
* statistics are float32, also for half-precision inputs (float64 stays float64).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnresearch.errors import UserError, lookup


class Stats(NamedTuple):
    """Mean and variance per feature: float32, ``[features]``."""

    mean: jax.Array
    var: jax.Array


@dataclass(frozen=True)
class Scope:
    """Over what one set of batch statistics is computed.

    Attributes:
      merge: named axis, or axes, over which the statistics that normalise are merged (None: no
        merging).
      merge_groups: for ``pmap``, whose mesh has one axis only: the devices that merge together.
      pool: named axis, or axes, over which the *running* statistics are pooled besides. The running
        ones always describe the whole batch, whatever normalised it.
      splits: equal contiguous parts of the leading axis that are normalised apart from each other.
      parts: under ``jit``: over how many devices the compiler spreads each of these sets, in equal
        contiguous parts. It changes no number, only how many messages are sent.
      mesh: under ``jit`` on several devices: these, as ``[groups that share sets, parts]``.
      kernels: by what sets that lie on one CPU are computed: a key of `native.MODES`. It changes
        rounding only.

    The default is the whole array: under ``jit`` that is the whole batch on however many devices.
    """

    merge: str | tuple[str, ...] | None = None
    merge_groups: tuple[tuple[int, ...], ...] | None = None
    pool: str | tuple[str, ...] | None = None
    splits: int = 1
    parts: int = 1
    mesh: Mesh | None = None
    kernels: str = "auto"

    def axes(self) -> set[str]:
        """All named axes over which the batch is spread."""
        return {*_names(self.merge), *_names(self.pool)}

    def merged_devices(self) -> int:
        if self.merge is None:
            return 1
        if self.merge_groups is not None:
            return len(self.merge_groups[0])
        return jax.lax.axis_size(self.merge)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 at least, so that sums of half-precision values are exact enough.

    Raises:
      UserError: x is not floating-point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"a norm takes floating-point input, not {x.dtype}; convert it: x.astype(jnp.float32)"
        )
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def align_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """A boolean mask that broadcasts against an input of ``shape``. Integers count as booleans.

    ``mask`` covers the leading axes of the input (``[batch]`` masks examples, ``[batch, time]``
    positions), or has as many axes as the input, each of length 1 or that of the input.

    Raises:
      UserError: any other shape, or a mask of floating-point numbers.
    """
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise UserError(f"a mask is boolean, not {mask.dtype}; write mask > 0")
    if mask.ndim < len(shape):
        given, mask = mask.shape, mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
    else:
        given = mask.shape
    fits = (
        mask.ndim == len(shape)
        and given
        and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
    )
    if not fits or (len(given) < len(shape) and given != shape[: len(given)]):
        raise UserError(
            f"a mask of shape {given} does not fit an input of shape {shape}; give one of shape "
            f"{shape[:1]} (examples), {shape[:-1]} (positions) or {(*shape[:-1], 1)}"
        )
    return mask.astype(bool)


def masked_mean(values: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """The mean over ``axes`` (kept, of length 1) of those values that the mask lets through; 0
    where it lets none through. ``mask`` broadcasts against ``values`` (see `align_mask`)."""
    if mask is None:
        return values.mean(axes, keepdims=True)
    shape = tuple(
        n if axis in axes else m
        for axis, (m, n) in enumerate(zip(mask.shape, values.shape, strict=True))
    )
    count = jnp.broadcast_to(mask, shape).sum(axes, keepdims=True, dtype=values.dtype)
    total = jnp.where(mask, values, 0).sum(axes, keepdims=True)
    return total / jnp.maximum(count, 1)


STAT_DTYPES = ("float32", "input")


class Sets:
    """An input cut into the sets of values that share statistics, and the averages over them.

    This is all that a normaliser with batch statistics needs to be right on many devices, with
    ghost batches and with masks: it takes its averages from `mean` and its running ones from
    `batch_mean`.

    Attributes:
      x: the input in float32 at least (as it is with ``stat_dtype="input"``), ``[..., features]``,
        with a leading axis for the sets if one device holds several (a leading axis of length 1
        makes XLA's reductions on CPU twice as slow).
      whole: the same in the shape of the input.
      mask: which values count: boolean, broadcasting against ``x``; None: all of them.
      count: values per set and feature: a plain number, or with a mask an array like `mean` gives.
      scope: the scope that was given.

    Raises:
      UserError: a mask that does not fit, or sets that do not divide the examples.
    """

    def __init__(
        self,
        x: jax.Array,
        scope: Scope = Scope(),
        mask: Any = None,
        stat_dtype: str = "float32",
    ):
        if scope.splits < 1 or x.shape[0] % scope.splits:
            raise UserError(
                f"{x.shape[0]} examples on this device do not divide into {scope.splits} sets of "
                "statistics; choose a batch size that is a multiple, or another norm.scope"
            )
        self.scope, self._shape, self._dtype = scope, x.shape, x.dtype
        self.mask = None if mask is None else self._cut(align_mask(mask, x.shape))
        lookup(dict.fromkeys(STAT_DTYPES), stat_dtype, "stat_dtype")
        self.whole = wide(x) if stat_dtype == "float32" else x
        self.x = self._cut(self.whole)
        self._axes = tuple(range(0 if scope.splits == 1 else 1, self.x.ndim - 1))
        self.count: Any = (
            math.prod(x.shape[:-1]) // scope.splits * scope.merged_devices()
            if self.mask is None
            else self._sum(self.mask)
        )

    def _cut(self, x: jax.Array) -> jax.Array:
        splits = self.scope.splits
        if splits == 1:
            return x
        if x.shape[0] == 1:  # of a mask
            return x[None]
        return x.reshape(splits, x.shape[0] // splits, *x.shape[1:])

    def _sum(self, values: jax.Array) -> jax.Array:
        """Sum over each set (mask or masked values), merged over its devices."""
        shape = (*self.x.shape[:-1], values.shape[-1])
        total = jnp.broadcast_to(values, shape).sum(self._axes, keepdims=True, dtype=self.x.dtype)
        if self.scope.merge is None:
            return total
        return jax.lax.psum(total, self.scope.merge, axis_index_groups=self.scope.merge_groups)

    def mean(self, values: jax.Array) -> jax.Array:
        """The mean of ``values`` (shaped like `x`) over each set, broadcasting against `x`.

        Without a mask every device holds equally many values and means of means are exact. With
        one, devices are weighted by their counts; a set without any value gives 0.
        """
        if self.mask is not None:
            return self._sum(jnp.where(self.mask, values, 0)) / jnp.maximum(self.count, 1)
        local = values.mean(self._axes, keepdims=True)
        if self.scope.merge is None:
            return local
        return jax.lax.pmean(local, self.scope.merge, axis_index_groups=self.scope.merge_groups)

    def batch_mean(self, values: jax.Array) -> jax.Array:
        """The mean over all sets of the whole batch, weighted by their counts, of one value per
        set and feature (as `mean` gives them): ``[features]``."""
        splits, pool = self.scope.splits, self.scope.pool
        values = values.reshape(splits, -1)
        if self.mask is None:
            mean = values.mean(0) if splits > 1 else values[0]
            return mean if pool is None else jax.lax.pmean(mean, pool)
        count = self.count.reshape(splits, -1)
        total, weight = (values * count).sum(0), count.sum(0)
        if pool is not None:
            total, weight = jax.lax.psum((total, weight), pool)
        return total / jnp.maximum(weight, 1)

    def batch_count(self) -> Any:
        """Values per feature of the whole batch: a plain number, or with a mask an array."""
        if self.mask is None:
            devices = math.prod(jax.lax.axis_size(axis) for axis in self.scope.axes())
            return math.prod(self._shape[:-1]) * devices
        # Every device of a merged group has the count of the group: the mean over them, times how
        # many groups there are.
        count = self.count.reshape(self.scope.splits, -1).sum(0)
        if self.scope.pool is None:
            return count
        devices = math.prod(jax.lax.axis_size(axis) for axis in self.scope.axes())
        groups = devices // self.scope.merged_devices()
        return jax.lax.pmean(count, self.scope.pool) * groups

    @property
    def cells(self) -> int:
        """How many parts of sets there are that each lie on one device: one per set unless the
        compiler spreads a set over devices."""
        splits, parts = self.scope.splits, self.scope.parts
        return splits if self._shape[0] % (splits * parts) else splits * parts

    def in_cells(self) -> tuple[jax.Array, jax.Array | None]:
        """Input and mask as `x` and `mask` are, but with a leading axis for the cells instead of
        one for the sets, and only if there are several."""
        cells, splits = self.cells, self.scope.splits
        if cells == splits:
            return self.x, self.mask
        x = self.whole.reshape(cells, -1, *self._shape[1:])
        if self.mask is None:
            return x, None
        mask = self.mask[None] if splits == 1 else self.mask
        if mask.shape[1] > 1:
            return x, mask.reshape(cells, -1, *mask.shape[2:])
        return x, mask if len(mask) == 1 else jnp.repeat(mask, cells // splits, 0)

    def per_set(self, values: jax.Array) -> jax.Array:
        """``[sets, features]`` so that it broadcasts against `x`."""
        lead = () if self.scope.splits == 1 else (self.scope.splits,)
        return values.reshape(*lead, *(1,) * len(self._axes), values.shape[-1])

    def join(self, y: jax.Array) -> jax.Array:
        """What was computed from `x`, in the shape and dtype of the input."""
        return y.reshape(self._shape).astype(self._dtype)


def gathered(values: jax.Array, scope: Scope, pool: bool = False) -> jax.Array:
    """``[sets, parts, ...]`` of this device to ``[sets, parts of all devices, ...]``, on every one
    of those over which the scope merges (or pools): one message.

    A sum of arrays that are zero but for the device's own place: unlike `jax.lax.all_gather`, it
    gives what every device is known to have, and takes groups in every mode.
    """
    axes, groups = (scope.pool, None) if pool else (scope.merge, scope.merge_groups)
    if scope.mesh is not None:
        spec = PartitionSpec() if pool else PartitionSpec(scope.mesh.axis_names[0])
        values = jax.lax.with_sharding_constraint(values, NamedSharding(scope.mesh, spec))
    if axes is None:
        return values
    devices, place = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    if groups is not None:
        places = np.zeros(devices, np.int32)
        for group in groups:
            places[list(group)] = np.arange(len(group))
        devices, place = len(groups[0]), jnp.asarray(places)[place]
    own = (jnp.arange(devices) == place).reshape(1, devices, *(1,) * (values.ndim - 1))
    laid = jnp.where(own, values[:, None], 0)
    every = jax.lax.psum(laid, axes, axis_index_groups=groups)
    return every.reshape(values.shape[0], -1, *values.shape[2:])


@jax.named_scope("whole_batch")
def whole_batch(sets: Sets, stats: Stats) -> Stats:
    """The moments of the sets pooled to those of the whole batch on all devices, ``[features]``:
    mean of the means; mean of the variances plus variance of the means. One message, if any."""
    splits = sets.scope.splits
    if splits == 1 and sets.scope.pool is None:
        return Stats(*(row.reshape(-1) for row in stats))
    rows = [*stats] if sets.mask is None else [*stats, sets.count.astype(stats.mean.dtype)]
    rows = [jnp.broadcast_to(row, stats.mean.shape).reshape(1, splits, 1, -1) for row in rows]
    every = gathered(jnp.concatenate(rows, 2), sets.scope, pool=True)[0]
    return pool(Stats(every[:, 0], every[:, 1]), 1 if sets.mask is None else every[:, 2])


def pool(stats: Stats, count: Any = 1) -> Stats:
    """Statistics of the union of sets stacked on the first axis, of ``count`` values each
    (``[sets, features]`` or broadcasting to that; equally large if it is left out)."""
    weight = jnp.broadcast_to(jnp.asarray(count, stats.mean.dtype), stats.mean.shape)
    weight = weight / jnp.maximum(weight.sum(0), 1e-30)
    mean = (weight * stats.mean).sum(0)
    return Stats(mean, (weight * (stats.var + jnp.square(stats.mean - mean))).sum(0))
