"""What the doctor measures: three compiled passes over a batch, the same for every model.

``look`` sees the sites as evaluation would, but normalised with the statistics of the batch;
``train`` is a training call, with dropout, and moves the running statistics; ``losses`` is an
evaluation with whatever running statistics it is handed. All moments are float32, in two passes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.doctor.structure import changing, how_made
from bnresearch.errors import UserError
from bnresearch.experiment import CPU_INIT
from bnresearch.moments import moments
from bnresearch.net import Net, first_of
from bnresearch.pooled import set_moments
from bnresearch.sets import Scope, Sets, align_mask, masked_mean
from bnresearch.watch import PERTURBATIONS, SEEN, Seen, Watch

Tree = Any

DROPPED = "dropped"  # the variable in SEEN that a dropout leaves


class Pass(NamedTuple):
    """What a pass over one batch gives.

    Attributes:
      sites: {path: ({quantity: array}, ...)}, one entry per call of the site.
      loss: of each example, ``[batch]``, or None where it is unknown.
      output: of the model, where the loss is unknown: see `_rows`.
      dropped: {path of a dropout: second moment of what goes in}.
      more: what only this pass gives.
    """

    sites: Mapping[str, tuple[Mapping[str, Any], ...]]
    loss: Any
    output: Any
    more: Mapping[str, Any] = {}
    dropped: Mapping[str, Any] = {}


def _compiled(*static: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """jit with these static arguments. A pass runs a few dozen times: on a CPU, compiling it as
    if it ran for days would take most of the doctor's time."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def made() -> Callable[..., Any]:
            options = CPU_INIT if jax.default_backend() == "cpu" else None
            return jax.jit(function, static_argnums=static, compiler_options=options)

        return functools.wraps(function)(lambda *args: made()(*args))

    return wrap


def input_moments(x: jax.Array, mask: Any) -> dict[str, jax.Array]:
    """Count, mean and biased variance of each feature, ``[features]``."""
    return dict(zip(("mean", "var", "count"), set_moments(x, mask), strict=True))


def _looked_at(seen: Seen, padding: Any, first: bool) -> dict[str, jax.Array]:
    """Of one site in ``look``: the moments of its input, and what suspicions of this site are
    tested with; of the ``first`` one also the variance between the means of single examples."""
    x, made = seen.x.astype(jnp.float32), how_made(seen)
    axes = tuple(range(x.ndim - 1))
    found = input_moments(x, seen.mask)
    if made.fast:
        mask = None if seen.mask is None else align_mask(seen.mask, x.shape)
        mean, square = (masked_mean(value, axes, mask) for value in (x, jnp.square(x)))
        found["fast"] = jnp.maximum(square - jnp.square(mean), 0).reshape(-1)
    if made.low:
        raw = seen.x
        low = (raw * raw).mean(axes) - jnp.square(raw.mean(axes))  # every step in its dtype
        found["low"] = jnp.maximum(low, 0).astype(jnp.float32)
    if padding is not None and seen.mask is None and x.shape[: padding.ndim] == padding.shape:
        found |= {f"unpadded_{k}": v for k, v in input_moments(x, padding).items()}
    rows = seen.y.reshape(-1, x.shape[-1])
    found["constant"] = (rows == rows[0]).all(0)
    if first:
        each = moments(Sets(x, Scope(splits=len(x)), seen.mask)).mean
        found["between"] = each.reshape(len(x), -1).var(0)
    return found


def _dropped(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Keeps the second moment of what goes into a dropout."""
    module = context.module
    if isinstance(module, nn.Dropout) and context.method_name == "__call__":
        square = jnp.square(first_of(args, kwargs).astype(jnp.float32))
        module.sow(SEEN, DROPPED, square.reshape(-1, square.shape[-1]).mean(0))
    return call(*args, **kwargs)


@_compiled(0)
def look(net: Net, variables: Tree, batch: Any, padding: Any, nothing: Tree) -> Pass:
    """The sites under batch statistics without dropout, and the gradient of a random direction of
    the output for the output of each site: it is 0 where nothing behind a channel sees it.
    ``nothing`` is the collection PERTURBATIONS, zeros."""

    def observe(seen: Seen) -> Mapping[str, Any]:
        return _looked_at(seen, padding, seen.path == watch.sites[0])

    watch = Watch(use="batch", observe=observe, perturb=True)

    def forward(added: Tree) -> Any:
        with nn.intercept_methods(_dropped):
            applied = net.apply(
                {**variables, PERTURBATIONS: added}, batch, watch=watch, mutable=changing(variables)
            )
        flat = _rows(applied.output)
        return jnp.vdot(jax.random.normal(jax.random.key(0), flat.shape), flat), applied

    (_, applied), gradient = jax.value_and_grad(forward, has_aux=True)(nothing)
    felt = jax.tree.map(lambda g: (g.reshape(-1, g.shape[-1]) != 0).any(0), gradient)
    seen, dropped = dict(applied.seen), {}
    for path in [path for path in seen if isinstance(seen[path][0], jax.Array)]:
        dropped[path] = seen.pop(path)[0]
    return Pass(seen, _loss(net, applied.output, batch), None, {"felt": felt}, dropped)


@_compiled(0, 4)
def train(net: Net, variables: Tree, batch: Any, index: Any, dropout: bool) -> Pass:
    """A training call: the running statistics afterwards, and, where there is dropout, the moments
    at each site. Calls of another ``index`` draw other masks."""
    watch = Watch(observe=_moments if dropout else None)
    key = jax.random.key(index)
    applied = net.apply(
        variables, batch, train=True, key=key, watch=watch, mutable=changing(variables)
    )
    more = {"batch_stats": applied.mutated.get("batch_stats", {})}
    return Pass(applied.seen, None, None, more)


@_compiled(0)
def losses(net: Net, variables: Tree, batch: Any) -> Pass:
    """An evaluation with the running statistics among the variables, and the moments at the first
    site."""

    def observe(seen: Seen) -> Mapping[str, Any]:
        return _moments(seen) if seen.path == watch.sites[0] else {}

    watch = Watch(use="running", observe=observe)
    applied = net.apply(variables, batch, watch=watch, mutable=changing(variables))
    # An output can be large, and is looked at only where there is no loss.
    output = _rows(applied.output) if net.losses is None else None
    return Pass(applied.seen, _loss(net, applied.output, batch), output)


@_compiled(0, 3)
def within(net: Net, variables: Tree, batch: Any, parts: int) -> dict[str, jax.Array]:
    """The variance at each site with the batch in so many equal parts that never meet, as devices
    hold them: mean over the parts."""

    def one(part: Any) -> dict[str, jax.Array]:
        applied = net.apply(variables, part, watch=Watch(use="batch", observe=_moments))
        return {
            path: sum(c["var"] for c in calls) / len(calls) for path, calls in applied.seen.items()
        }

    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return {path: var.mean(0) for path, var in jax.vmap(one)(cut).items()}


def _moments(seen: Seen) -> dict[str, jax.Array]:
    return input_moments(seen.x.astype(jnp.float32), seen.mask)


def _loss(net: Net, output: Any, batch: Any) -> Any:
    return None if net.losses is None else net.losses(output, batch)


def _rows(output: Any) -> jax.Array:
    """The floating-point leaves of an output that have a row per example, as one float32 array."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(output)]
    floating = [x for x in leaves if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)]
    size = max((len(x) for x in floating), default=0)
    leaves = [x for x in floating if len(x) == size]
    if not leaves:
        raise UserError(
            "the model's output has no floating-point array with a row per example, by which the "
            "effect of its norms could be seen; make call= return such a one"
        )
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1).astype("f4")
