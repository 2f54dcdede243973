"""What an evaluation, a probe or the doctor asks of the norms of a model while it is applied.

    with watching(Watch(use="batch", observe=lambda seen: {"mean": seen.x.mean(0)})):
        y, mutated = model.apply(variables, x, mutable=[SEEN])
    seen_in(mutated)                      # {"block1/norm1": ({"mean": ...},)}, one entry per call

It acts while a function is traced: use it inside what is jitted. A model that nobody watches is the
program that it would be without this file. Norms of ours ask by themselves; `net.py` asks for those
of flax.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

SEEN = "seen"  # the collection of what was observed
PERTURBATIONS = "perturbations"  # added to outputs: the gradient for one is that for the output
NAME = "norm"  # of the variable in these collections


class Seen(NamedTuple):
    """One call of a norm.

    Attributes:
      path: of the site: "stage1/block1/norm1".
      module: the norm, bound; its fields say how it was made.
      x: its input, ``[batch, ..., features]``.
      y: its output, of the shape of x; with the activation and the addition that it was handed.
      mask: which values count, booleans broadcasting against x from the left, or None.
      use: "batch" or "running": the statistics that normalised; "" where it keeps none.
      running: those that it had before, or None.
    """

    path: str
    module: nn.Module
    x: jax.Array
    y: jax.Array
    mask: Any
    use: str
    running: Any


@dataclass(frozen=True)
class Watch:
    """What is asked of every norm of a model.

    Attributes:
      use: "batch" or "running" whatever the model says; None: as the model says. The running
        statistics move as they would in the model: if "batch" normalises and ``batch_stats`` is
        mutable.
      statistics: ``(path, running, x, mask) -> running``: what a site that normalises with its
        running statistics takes in their place; also one set per example, ``[batch, 1, features]``
        against x of as many axes.
      observe: ``(seen) -> {name: array}``, kept under the site's path if SEEN is mutable.
      perturb: add the variable of PERTURBATIONS to the output, if there is one or that collection
        is mutable.
      sites: filled while tracing: the paths of all norms called, in order of execution, each once.
    """

    use: str | None = None
    statistics: Callable[[str, Any, jax.Array, Any], Any] | None = None
    observe: Callable[[Seen], Mapping[str, Any]] | None = None
    perturb: bool = False
    sites: list[str] = field(default_factory=list, compare=False)


NOBODY = Watch()
_current: ContextVar[Watch] = ContextVar("watch", default=NOBODY)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Every norm that is called inside the block does what ``watch`` asks."""
    token = _current.set(watch)
    try:
        yield watch
    finally:
        _current.reset(token)


def current() -> Watch:
    """Who is watching; NOBODY most of the time."""
    return _current.get()


def noted(seen: Seen) -> jax.Array:
    """The output of a norm after it was looked at by the current watch."""
    watch = current()
    if watch is NOBODY:
        return seen.y
    if seen.path not in watch.sites:
        watch.sites.append(seen.path)
    if watch.observe is not None:
        seen.module.sow(SEEN, NAME, dict(watch.observe(seen)))
    module = seen.module
    there = module.is_mutable_collection(PERTURBATIONS) or module.has_variable(PERTURBATIONS, NAME)
    return module.perturb(NAME, seen.y, PERTURBATIONS) if watch.perturb and there else seen.y


def seen_in(mutated: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], ...]]:
    """What was observed, by the path of the site: one entry per call of it."""
    flat = flatten_dict(mutated.get(SEEN, {}))
    return {"/".join(path[:-1]): calls for path, calls in flat.items()}
