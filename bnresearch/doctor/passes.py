"""What the doctor measures: three compiled passes over a batch, the same for every model.

``look`` sees the sites as evaluation would, but normalised with the statistics of the batch;
``train`` is a training call, with dropout, and moves the running statistics; ``losses`` is an
evaluation with whatever running statistics it is handed. All moments are float32, in two passes.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.net import Net
from bnresearch.pooled import set_moments
from bnresearch.sets import align_mask
from bnresearch.watch import PERTURBATIONS, SEEN, Seen, Watch

Tree = Any

PARTS = (2, 4, 8)  # equal parts of a batch, as devices would hold them
DROPPED = "dropped"  # the variable in SEEN that a dropout leaves


class Pass(NamedTuple):
    """What a pass over one batch gives.

    Attributes:
      sites: {path: ({quantity: array}, ...)}, one entry per call of the site.
      loss: of each example, ``[batch]``, or None where it is unknown.
      output: of the model: its floating-point leaves, flat, one row per example.
      dropped: {path of a dropout: second moment of what goes in}.
      more: what only this pass gives.
    """

    sites: Mapping[str, tuple[Mapping[str, Any], ...]]
    loss: Any
    output: Any
    more: Mapping[str, Any] = {}
    dropped: Mapping[str, Any] = {}


def input_moments(x: jax.Array, mask: Any) -> dict[str, jax.Array]:
    """Count, mean and biased variance of each feature, ``[features]``."""
    return dict(zip(("mean", "var", "count"), set_moments(x, mask), strict=True))


def _looked_at(seen: Seen, padding: Any) -> dict[str, jax.Array]:
    """Of one site in ``look``: the moments of its input, and what suspicions are tested with."""
    x = seen.x.astype(jnp.float32)
    found = input_moments(x, seen.mask)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    if seen.mask is None:
        own = rows.mean(1)
    else:
        mask = jnp.broadcast_to(align_mask(seen.mask, x.shape), x.shape).reshape(rows.shape)
        own = jnp.where(mask, rows, 0).sum(1) / jnp.maximum(mask.sum(1), 1)
    found["between"] = own.var(0)  # of the means of single examples
    raw = seen.x.reshape(-1, x.shape[-1])  # in its own dtype, as a fast algorithm takes it
    square = jnp.square(raw.astype(jnp.float32)).mean(0)
    found["fast"] = jnp.maximum(square - jnp.square(raw.astype(jnp.float32).mean(0)), 0)
    found["low"] = raw.var(0).astype(jnp.float32)
    for parts in PARTS:
        if (
            seen.mask is None
            and x.shape[0] % parts == 0
            and rows[0, :, 0].size * x.shape[0] > parts
        ):
            cut = x.reshape(parts, -1, x.shape[-1])
            found[f"within{parts}"] = cut.var(1).mean(0)
    if padding is not None and seen.mask is None and x.shape[: padding.ndim] == padding.shape:
        found |= {f"unpadded_{k}": v for k, v in input_moments(x, padding).items()}
    found["constant"] = (seen.y.reshape(-1, x.shape[-1]) == seen.y.reshape(-1, x.shape[-1])[0]).all(
        0
    )
    return found


def _dropped(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Keeps the second moment of what goes into a dropout."""
    module = context.module
    if isinstance(module, nn.Dropout) and context.method_name == "__call__":
        square = jnp.square(args[0].astype(jnp.float32))
        module.sow(SEEN, DROPPED, square.reshape(-1, square.shape[-1]).mean(0))
    return call(*args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def look(net: Net, variables: Tree, batch: Any, padding: Any, nothing: Tree) -> Pass:
    """The sites under batch statistics without dropout, and the gradient of a random direction of
    the output for the output of each site: it is 0 where nothing behind a channel sees it.
    ``nothing`` is the collection PERTURBATIONS, zeros."""
    watch = Watch(use="batch", observe=lambda seen: _looked_at(seen, padding), perturb=True)

    def forward(added: Tree) -> Any:
        with nn.intercept_methods(_dropped):
            applied = net.apply(
                {**variables, PERTURBATIONS: added}, batch, watch=watch, mutable=("batch_stats",)
            )
        flat = _rows(applied.output)
        return jnp.vdot(jax.random.normal(jax.random.key(0), flat.shape), flat), (applied, flat)

    (_, (applied, flat)), gradient = jax.value_and_grad(forward, has_aux=True)(nothing)
    felt = jax.tree.map(lambda g: (g.reshape(-1, g.shape[-1]) != 0).any(0), gradient)
    seen, dropped = dict(applied.seen), {}
    for path in [path for path in seen if isinstance(seen[path][0], jax.Array)]:
        dropped[path] = seen.pop(path)[0]
    return Pass(seen, _loss(net, applied.output, batch), flat, {"felt": felt}, dropped)


@functools.partial(jax.jit, static_argnums=0)
def train(net: Net, variables: Tree, batch: Any, index: Any) -> Pass:
    """A training call: the moments at each site, and the running statistics afterwards. Calls of
    another ``index`` draw other dropout masks."""
    watch = Watch(observe=lambda seen: input_moments(seen.x.astype(jnp.float32), seen.mask))
    applied = net.apply(
        variables,
        batch,
        train=True,
        key=jax.random.key(index),
        watch=watch,
        mutable=("batch_stats",),
    )
    more = {"batch_stats": applied.mutated.get("batch_stats", {})}
    return Pass(applied.seen, _loss(net, applied.output, batch), _rows(applied.output), more)


@functools.partial(jax.jit, static_argnums=0)
def losses(net: Net, variables: Tree, batch: Any) -> Pass:
    """An evaluation with the running statistics among the variables, and the moments at the
    sites."""
    watch = Watch(
        use="running", observe=lambda seen: input_moments(seen.x.astype(jnp.float32), seen.mask)
    )
    applied = net.apply(variables, batch, watch=watch)
    return Pass(applied.seen, _loss(net, applied.output, batch), _rows(applied.output))


def _loss(net: Net, output: Any, batch: Any) -> Any:
    return None if net.losses is None else net.losses(output, batch)


def _rows(output: Any) -> jax.Array:
    """The floating-point leaves of an output as one float32 array, a row per example."""
    leaves = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1).astype("f4")
