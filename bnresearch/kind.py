"""What a normaliser is: one pure function, and a row that says what it owns."""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from bnresearch.sets import Stats

# What the layer hands to a function that names it among its keywords.
CONTEXT = (
    "use",
    "scope",
    "mask",
    "rng",
    "domain",
    "condition",
    "time",
    "linear",
    "activates",
    "activation",
    "add",
)


def no_params(features: int, options: Mapping[str, Any]) -> dict[str, Any]:
    return {}


class Kind(NamedTuple):
    """A row of NORMS: a pure function, its options with their defaults, and what it owns.

    Attributes:
      function: ``function(x, [parameters,] [running,] *, context, options) -> y``, or
        ``(y, new running)`` for a kind with state, or ``(y, new running, penalty)`` for one that
        adds a scalar to the loss. Parameters are given by name, an absent one as None. Context (the
        names of CONTEXT) is given where the signature names it. One that names ``activation`` (a
        function, or None) and ``add`` (an array like x, or None) gives ``activation(y + add)`` for
        y; behind others the layer does that.
      options: its options and their defaults. Floats may be traced arrays, so that a sweep over
        them compiles once; integers, strings, booleans and tuples are static.
      params: ``params(features, options) -> {name: start}``, float32 arrays.
      state: ``state(features, options) -> NamedTuple`` of float32 arrays, the running statistics
        before the first update; None for kinds that keep nothing. Entries that start with
        ``backward_`` move in the backward pass: their cotangent is the step they take.
      update: for kinds whose state follows from mean and variance of the whole batch alone:
        ``update(running, Stats, count, **options) -> running``, so that gradient accumulation can
        move it once per step. The state of others moves once per microbatch.
      activates: it brings its activation; the model leaves its own out at this site.
      linear_bias: a constant added to a feature of its input reaches its output, so that the linear
        map before it keeps its bias where the kind has none of its own (the layer adds it).
      weights: the reparametrisation of the linear map before it, a key of reparam.REPARAMS.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = {}
    params: Callable[[int, Mapping[str, Any]], dict[str, Any]] = no_params
    state: Callable[[int, Mapping[str, Any]], Any] | None = None
    update: Callable[..., Any] | None = None
    activates: bool = False
    linear_bias: bool = False
    weights: str = "none"

    @property
    def context(self) -> tuple[str, ...]:
        """What of CONTEXT the function asks for."""
        return tuple(name for name in CONTEXT if name in keywords(self.function))

    @property
    def batch_dependent(self) -> bool:
        """Whether in training an example's output depends on the others of its batch."""
        return "scope" in self.context


@functools.cache
def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """The keyword-only parameters of a function: context and options."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


@functools.cache
def positional(function: Callable[..., Any]) -> tuple[str, ...]:
    """The other parameters of a kind's function, behind x: its parameters, and ``running``."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)[1:]


class Result(NamedTuple):
    """What a kind gives back; ``running`` None for kinds without state."""

    y: jax.Array
    running: Any = None
    penalty: jax.Array | None = None


def apply(
    kind: Kind,
    x: jax.Array,
    params: Mapping[str, Any],
    running: Any,
    context: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Result:
    """Call a kind's function with what it asks for, out of all there is."""
    arrays = dict(params) | {"running": running}
    given = [arrays.get(name) for name in positional(kind.function)]
    wanted = keywords(kind.function)
    settings = {name: v for name, v in {**context, **options}.items() if name in wanted}
    result = kind.function(x, *given, **settings)
    return Result(*result) if isinstance(result, tuple) else Result(result)


def update(kind: Kind, running: Any, batch: Stats, count: Any, options: Mapping[str, Any]) -> Any:
    """The state of a kind after a batch with these moments; only for kinds with an `update`."""
    assert kind.update is not None
    wanted = keywords(kind.update)
    return kind.update(
        running, batch, count, **{name: v for name, v in options.items() if name in wanted}
    )


class Page(NamedTuple):
    """What a kind's docstring says, in parts."""

    title: str
    authors: str
    year: int
    formula: str
    text: str


def page(kind: Kind) -> Page:
    """The docstring of a kind's function, taken apart: ``Title (Authors, year).``, a formula in an
    indented block, and the rest."""
    doc = inspect.getdoc(kind.function) or ""
    match = re.match(
        r"([^\n]+?) \(([^()\n]+?), (\d{4})[^()\n]*\)\.\n\n((?: {4}[^\n]*\n|\n)+)([\s\S]*)", doc
    )
    if match is None:
        raise ValueError(
            f"the docstring of {kind.function.__name__} does not begin with 'Title (Authors, "
            "year).' and an indented formula"
        )
    title, authors, year, formula, text = match.groups()
    return Page(title, authors, int(year), textwrap.dedent(formula).strip(), text)
