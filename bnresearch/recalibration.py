"""Precise batch normalization of anybody's flax model: see precise.py."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bnresearch.errors import UserError, lookup
from bnresearch.fit import check_fit
from bnresearch.net import Call, Net, of_model
from bnresearch.pooled import agree
from bnresearch.precise import WAYS, Precise, Site, prepare, require_sites

Tree = Any


def recalibrate(
    model: nn.Module,
    variables: Tree,
    batches: Iterable[Any],
    *,
    count: int | None = None,
    how: str = "one_pass",
    call: Call | None = None,
    allow_fewer: bool = False,
    only: str | None = None,
) -> Tree:
    """The variables with running statistics taken anew over ``batches``, at the weights they have:
    precise batch normalization (Wu & Johnson, 2021). Norms may be those of flax.linen,
    `bnresearch.BatchNorm`, or of this project's own models.

        mean, var of every site's input over all batches, each value counting alike

    Args:
      model: a flax.linen module.
      variables: its ``{"params": ..., "batch_stats": ...}`` and what else it has.
      batches: of training data; arrays, dicts or tuples, as `net.of_model` takes them. A list, or
        anything that can be gone through again; of an iterator ``layer_after_layer`` keeps all.
      count: so many of them; None: all.
      how: "one_pass": as fast as a forward pass, earlier layers normalise with the statistics of
        each batch, as in training; use batches of the size of training. "layer_after_layer": a pass
        per site, exact for the data as a whole, however they are cut into batches.
      call: how to apply the model, see `net.of_model`.
      allow_fewer: take what is there if there are fewer batches than ``count``.
      only: a regular expression: the sites whose whole path it matches, and no others. In one pass
        the others normalise with the batch all the same.

    On several devices, batches sharded over a mesh give the statistics of the whole batch. With
    several processes, every one of them calls this with its share of the batches, and all get the
    same statistics, weighted by counts; what cannot be pooled is that of the first process.

    Returns:
      New variables, statistics float32 arrays of numpy; see TREATMENTS for kinds that keep more
      than mean and variance.

    Raises:
      UserError: no site with running statistics; variables or batches that do not fit the model;
        too few batches; ``only`` matches no site; inputs of a site that are not finite.
    """
    try:
        way = lookup(WAYS, how, "how to recalibrate")
        net = of_model(model, call)
        precise = _recalibrated(net, variables, batches, count, way, only, allow_fewer)
        if count is not None and precise.batches < count and not allow_fewer:
            raise _too_few(precise.batches, count)
    except Exception as error:
        with contextlib.suppress(UserError):
            agree(error if isinstance(error, UserError) else UserError(repr(error)))
        raise
    agree()
    return type(variables)({**variables, "batch_stats": precise.batch_stats})


def _recalibrated(
    net: Net,
    variables: Tree,
    batches: Iterable[Any],
    count: int | None,
    way: Callable[..., Precise],
    only: str | None,
    allow_fewer: bool,
) -> Precise:
    _check_batches(batches, count)
    once = iter(batches) is batches
    if once and way is not WAYS["one_pass"]:
        batches, once = list(islice(batches, count)), False
    first = next(iter(batches), None)
    if first is None:
        raise UserError("no batch was given to take statistics from; give at least one")
    given = len(batches) if isinstance(batches, Sized) else math.inf
    if count is not None and given < count and not allow_fewer:
        raise _too_few(int(given), count)
    check_fit(net, variables, first)
    prepared = prepare(net, variables, first)
    prepared = prepared._replace(compiled=_compiled(net, _outline(variables, first)))
    require_sites(prepared.sites)
    chosen = _chosen(prepared.sites, only)
    again = chain([first], batches) if once else batches
    return way(prepared, variables, Several(again, count), chosen)


def _too_few(given: int, count: int) -> UserError:
    return UserError(
        f"{given} batches were given and count={count} asked for; give more, or take what is there "
        "with allow_fewer=True"
    )


@lru_cache(maxsize=16)
def _compiled(net: Net, outline: str) -> dict[Any, Any]:
    """What is compiled for a net with variables and batches of these shapes."""
    return {}


def _outline(*trees: Tree) -> str:
    return str(jax.tree.map(lambda leaf: (np.shape(leaf), jax.numpy.result_type(leaf)), trees))


def _check_batches(batches: Any, count: Any) -> None:
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UserError(f"count={count!r}; give a whole number of at least 1, or None for all")
    single = isinstance(batches, Mapping) or hasattr(batches, "shape")
    if single or not isinstance(batches, Iterable):
        raise UserError(
            f"batches are one {type(batches).__name__}; give a list or an iterator of batches: [x]"
        )


class Several:
    """The first ``count`` of some batches (None: all), as often as one goes through them."""

    def __init__(self, batches: Iterable[Any], count: int | None):
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._count)


def _chosen(sites: Mapping[str, Site], only: str | None) -> list[str]:
    """The paths of the sites that ``only`` matches."""
    if only is None:
        return list(sites)
    try:
        chosen = [path for path in sites if re.fullmatch(only, path)]
    except re.error as error:
        raise UserError(f"only={only!r} is no regular expression ({error})") from None
    if not chosen:
        raise UserError(
            f"only={only!r} matches no site with running statistics; the sites are: "
            f"{', '.join(sites)}"
        )
    return chosen
