"""Mean and variance of sets, merged over devices at once, and the affine map that follows them.

Both have their derivative written down, so that the backward pass is the closed form

    dx = a * dy - mean(a * dy) - xhat * mean(a * dy * xhat),  a = scale / sqrt(v + epsilon)

in two passes over the data and one message between devices. The rules are forward ones
(`jax.custom_jvp`) and linear in the tangent: the backward pass is their transpose, and any order of
forward and reverse differentiation works.

**Messages.** Each device (under jit, each part of a set that lies on a device of its own: `parts`
of a Scope) takes mean and variance of its values in two passes. These are laid side by side, sent
once, and merged by every device: mean of the means, mean of the variances plus variance of the
means. No digits are lost but those that a mean in float32 does not have: at a mean of 1e4
deviations the variance is off by some 1e-4. A sum of squares about a shift known to all would be a
smaller message (2 numbers per feature, not 2 per feature and device), but is worthless where the
shift, such as the running mean, is thousands of deviations away, as in the first steps on inputs
with an offset. Such small messages cost latency, hardly bytes. With a mask, the counts are one
message more, which does not wait for the input.

**Passes.** Where ``x - mean`` is wanted by a sum and by another pass, XLA on CPU writes it to
memory first. An optimization barrier around the mean, a vector, makes it look like two of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from bnresearch.errors import lookup
from bnresearch.sets import Scope, Sets, Stats, gathered

# What the backward pass keeps besides the input: see `kinds.batch.normalised`.
KEPT = "statistics"


class How(NamedTuple):
    """What is known of the sets before the program runs; arrays in it would be leaks.

    ``values`` is their number per set and feature; 0 if a mask decides.
    """

    scope: Scope
    variance: str
    cells: int
    values: int


def moments(sets: Sets, variance: str = "two_pass") -> Stats:
    """Mean and biased variance of each set, both broadcasting against `Sets.x`.

    Args:
      sets: the input in its sets. A set without any value gives 0 and 0.
      variance: the algorithm on each device: "two_pass" is exact at any offset; "fast" is
        E[x^2] - m^2, worthless in float32 at ``|m| >> std``; "shifted" is one pass over x minus one
        of its values, exact wherever that lies within a few standard deviations of the mean.

    Raises:
      UserError: an unknown algorithm.
    """
    lookup(VARIANCES, variance, "variance algorithm")
    known = sets.count if sets.mask is None else 0
    how = How(sets.scope, variance, sets.cells, known)
    x, mask = sets.in_cells()
    count = None if sets.mask is None else sets.count.reshape(sets.scope.splits, -1)
    stats = _moments(how, x, mask, count)
    return Stats(*(sets.per_set(value) for value in stats))


def scaled(sets: Sets, mean: jax.Array, multiplier: jax.Array, bias: jax.Array) -> jax.Array:
    """``(x - mean) * multiplier + bias`` in the shape of the input, for vectors that are
    ``[features]`` or one per set, as `moments` gives them."""
    scope, features = sets.scope, sets.x.shape[-1]
    x = sets.in_cells()[0]
    if sets.cells == scope.splits and scope.merge is None:
        vectors = [v if v.ndim == x.ndim else v.reshape(-1) for v in (mean, multiplier, bias)]
    else:
        vectors = _sent(mean, multiplier, bias, scope.splits, sets.cells, x)
    m, a, b = (varying(jnp.broadcast_to(v, (*v.shape[:-1], features)), x) for v in vectors)
    return _scaled(x, m, a, b).reshape(sets.whole.shape)


def _sent(
    mean: jax.Array, multiplier: jax.Array, bias: jax.Array, splits: int, cells: int, x: jax.Array
) -> list[jax.Array]:
    """The vectors of sets that several devices share: one array until they reach a device, so that
    the backward pass sums its gradient over devices in one message."""
    features = x.shape[-1]

    def row(v: jax.Array) -> jax.Array:
        per_set = splits if v.ndim > 1 and len(v) == splits else 1
        return jnp.broadcast_to(v.reshape(per_set, 1, -1), (splits, 1, features))

    rows = varying(jnp.concatenate([row(v) for v in (mean, multiplier, bias)], 1), x)
    spread = jnp.broadcast_to(rows[:, None], (splits, cells // splits, 3, features))
    return [_column(spread[:, :, i], x, cells) for i in range(3)]


def varying(v: jax.Array, x: jax.Array) -> jax.Array:
    """``v``, the same on all devices, as one per device where ``x`` is that; inside shard_map only.
    The transpose is the sum over devices."""
    missing = tuple(sorted(_varies(x) - _varies(v)))
    return jax.lax.pcast(v, missing, to="varying") if missing else v


def _varies(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


# Both functions below take x in cells: [examples, ..., features], with a leading axis if a device
# holds several sets (or the compiler spreads a set over devices), and vectors of sets [sets, ...].


def _axes(x: jax.Array, cells: int) -> tuple[int, ...]:
    return tuple(range(0 if cells == 1 else 1, x.ndim - 1))


def _column(v: jax.Array, x: jax.Array, cells: int) -> jax.Array:
    """One vector per cell so that it broadcasts against x."""
    return v.reshape(*(() if cells == 1 else (cells,)), *(1,) * len(_axes(x, cells)), v.shape[-1])


def apart(mean: jax.Array, *others: jax.Array) -> jax.Array:
    """The mean, looking like another one than the one given (see the top of this file); it counts
    as different for other ``others``."""
    return jax.lax.optimization_barrier((mean, *others))[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moments(
    how: How, x: jax.Array, mask: jax.Array | None, count: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each set, ``[sets, features]``."""
    axes, splits = _axes(x, how.cells), how.scope.splits
    local: Any = None
    if mask is not None:
        counted = jnp.broadcast_to(mask, (*x.shape[:-1], mask.shape[-1]))
        local = counted.sum(axes, keepdims=True, dtype=x.dtype)

    def mean(values: jax.Array) -> jax.Array:
        if mask is None:
            return values.mean(axes, keepdims=True)
        return jnp.where(mask, values, 0).sum(axes, keepdims=True) / jnp.maximum(local, 1)

    found = VARIANCES[how.variance](x, mask, mean)
    rows = [*found] if local is None else [*found, jnp.broadcast_to(local, found[0].shape)]
    if how.cells == splits and how.scope.merge is None:
        m, v = (row.reshape(splits, -1) for row in found)
        return m, v
    cut = [row.reshape(splits, how.cells // splits, 1, x.shape[-1]) for row in rows]
    every = gathered(jnp.concatenate(cut, 2), how.scope)
    means, variances = every[:, :, 0], every[:, :, 1]
    if count is None:
        m = means.mean(1)
        return m, (variances + jnp.square(means - m[:, None])).mean(1)
    weights = every[:, :, 2] / jnp.maximum(count, 1)[:, None]
    m = (weights * means).sum(1)
    return m, (weights * (variances + jnp.square(means - m[:, None]))).sum(1)


@functools.partial(_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(how: How, primals: Any, tangents: Any) -> Any:
    """``dm = mean(dx),  dv = 2 mean((x - m) dx)``, summed over devices together."""
    x, mask, count = primals
    m, v = (checkpoint_name(value, KEPT) for value in _moments(how, x, mask, count))
    tx = tangents[0]
    if isinstance(tx, SymbolicZero):
        return (m, v), (jnp.zeros_like(m), jnp.zeros_like(v))
    axes, splits, parts = _axes(x, how.cells), how.scope.splits, how.cells // how.scope.splits
    tx = tx if mask is None else jnp.where(mask, tx, 0)
    there = varying(apart(m, v), x)
    there = jnp.broadcast_to(there[:, None], (splits, parts, there.shape[-1]))
    centred = x - _column(there, x, how.cells)
    size: Any = how.values if count is None else jnp.maximum(count, 1)
    sums = [tx.sum(axes), (centred * tx).sum(axes)]
    if parts == 1 and how.scope.merge is None:
        tm, tv = (s.reshape(splits, -1) for s in sums)
        return (m, v), (tm / size, tv * (2 / size))
    total = jnp.concatenate([s.reshape(splits, parts, 1, -1) for s in sums], 2).sum(1)
    if how.scope.merge is not None:
        groups = how.scope.merge_groups
        total = jax.lax.psum(total, how.scope.merge, axis_index_groups=groups)
    return (m, v), (total[:, 0] / size, total[:, 1] * (2 / size))


@jax.custom_jvp
def _scaled(x: jax.Array, m: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (x - m) * a + b


@functools.partial(_scaled.defjvp, symbolic_zeros=True)
def _scaled_jvp(primals: Any, tangents: Any) -> Any:
    """``a dx + (x - m) da + (db - a dm)``: its transpose sums over the values twice, not thrice."""
    x, m, a, b = primals
    tx, tm, ta, tb = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    terms = [] if tx is None else [tx * a]
    terms += [] if ta is None else [(x - apart(m)) * ta]
    shift = [t for t in (tb, None if tm is None else -a * tm) if t is not None]
    terms += [sum(shift[1:], shift[0])] if shift else []
    y = _scaled(x, m, a, b)
    return y, jnp.broadcast_to(sum(terms[1:], terms[0]) if terms else jnp.zeros(()), y.shape)


Mean = Callable[[jax.Array], jax.Array]


def _two_pass(x: jax.Array, mask: Any, mean: Mean) -> tuple[jax.Array, jax.Array]:
    m = mean(x)
    return m, mean(jnp.square(x - apart(m)))


def _fast(x: jax.Array, mask: Any, mean: Mean) -> tuple[jax.Array, jax.Array]:
    m = mean(x)
    return m, jnp.maximum(mean(jnp.square(x)) - jnp.square(m), 0)


def _shifted(x: jax.Array, mask: Any, mean: Mean) -> tuple[jax.Array, jax.Array]:
    shift = _first(x, mask, mean(x).shape)
    shifted = x - shift
    rest = mean(shifted)
    return shift + rest, jnp.maximum(mean(jnp.square(shifted)) - jnp.square(rest), 0)


def _first(x: jax.Array, mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The first value of each cell and feature that counts, in the shape of its mean."""
    flat = (-1, math.prod(x.shape[:-1]) // (math.prod(shape) // shape[-1]), x.shape[-1])
    if mask is None:
        return x.reshape(flat)[:, 0].reshape(shape)
    index = jnp.argmax(jnp.broadcast_to(mask, x.shape).reshape(flat), axis=1, keepdims=True)
    return jnp.take_along_axis(x.reshape(flat), index, axis=1).reshape(shape)


VARIANCES = {"two_pass": _two_pass, "fast": _fast, "shifted": _shifted}
