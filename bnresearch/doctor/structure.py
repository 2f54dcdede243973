"""How the norms of a model stand in it: what made their input, how they were made and are called.

All of it is seen while the model is traced; nothing is computed. What made an array is known where
it is the very array that a module returned: a sum, a reshape or a cast in between hides it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.errors import FlaxError
from flax.traverse_util import unflatten_dict

from bnresearch import batchnorm
from bnresearch.errors import UserError
from bnresearch.fit import does_not_go_through
from bnresearch.layers import Norm
from bnresearch.net import Net, first_of
from bnresearch.norm import kind_of
from bnresearch.watch import NAME, Seen, Watch

Tree = Any


class Maker(NamedTuple):
    """The module that made an array: its path, ``what`` it is ("linear", "dropout", "norm"),
    whether it adds a bias, the rate of a dropout, and what made its own input."""

    path: str
    what: str
    bias: bool = False
    rate: float = 0.0
    before: "Maker | None" = None


class Made(NamedTuple):
    """How a norm was made.

    Attributes:
      name: "flax.linen.BatchNorm", "bnresearch.BatchNorm", "norm kind ghost", ...
      keeps: it has running mean and variance, one per feature, for inference.
      decay, epsilon: as far as it has them, and they are plain numbers.
      fast: the variance is E[x^2] - E[x]^2.
      axis_name: over which it merges statistics.
      low: statistics are computed in the dtype of the input.
      frozen: it is made to keep its statistics.
    """

    name: str
    keeps: bool
    decay: float | None = None
    epsilon: float = 1e-5
    fast: bool = False
    axis_name: Any = None
    low: bool = False
    frozen: bool = False


class Called(NamedTuple):
    """One call of a norm: what normalised, whether a mask came with it, and what made its input."""

    use: str
    masked: bool
    maker: Maker | None


@dataclass(frozen=True)
class Structure:
    """The norms of a model in order of execution: how each was made, and its calls in training and
    in evaluation; the dropouts that are active in training, by path; and the shapes of the outputs
    of the norms, as the collection PERTURBATIONS has them."""

    made: Mapping[str, Made]
    training: Mapping[str, list[Called]]
    evaluation: Mapping[str, list[Called]]
    dropouts: Mapping[str, float]
    outputs: Tree

    @property
    def sites(self) -> list[str]:
        return list(self.made)

    @property
    def keepers(self) -> list[str]:
        """The sites with running statistics."""
        return [path for path, made in self.made.items() if made.keeps]


def structure(net: Net, variables: Tree, batch: Any) -> Structure:
    """Traces the model in training and in evaluation."""
    trackers = [_Tracker(train) for train in (True, False)]
    for tracker in trackers:
        tracker.trace(net, variables, batch)
    training, evaluation = (
        {path: tracker.calls.get(path, []) for path in trackers[0].made} for tracker in trackers
    )
    # One array is added to all calls of a site: none where these differ in shape.
    alike = {k: v for k, v in trackers[1].outputs.items() if k not in trackers[1].unlike}
    outputs = unflatten_dict(alike)
    return Structure(trackers[0].made, training, evaluation, trackers[0].dropouts, outputs)


@dataclass
class _Tracker:
    """Follows arrays from module to module during one trace."""

    train: bool
    made: dict[str, Made] = field(default_factory=dict)
    calls: dict[str, list[Called]] = field(default_factory=dict)
    dropouts: dict[str, float] = field(default_factory=dict)
    outputs: dict[tuple[str, ...], Any] = field(default_factory=dict)
    unlike: set[tuple[str, ...]] = field(default_factory=set)
    makers: dict[int, Maker] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # or an id could come again

    def trace(self, net: Net, variables: Tree, batch: Any) -> None:
        watch = Watch(observe=self._norm)

        def forward(variables: Tree, batch: Any) -> Any:
            with nn.intercept_methods(self._module):
                applied = net.apply(
                    variables, batch, train=self.train, watch=watch, mutable=changing(variables)
                )
            return applied.output

        try:
            jax.eval_shape(forward, variables, batch)
        except (AttributeError, FlaxError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise does_not_go_through(batch, 0, error) from error

    def _norm(self, seen: Seen) -> Mapping[str, Any]:
        maker = self.makers.get(id(seen.x))
        self.made.setdefault(seen.path, how_made(seen))
        masked = seen.mask is not None
        self.calls.setdefault(seen.path, []).append(Called(seen.use, masked, maker))
        self._remember(seen.y, Maker(seen.path, "norm", before=maker))
        where, shape = (
            (*seen.path.split("/"), NAME),
            jax.ShapeDtypeStruct(seen.y.shape, seen.y.dtype),
        )
        if self.outputs.setdefault(where, shape) != shape:
            self.unlike.add(where)
        return {}

    def _module(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        module = context.module
        x = first_of(args, kwargs)
        if context.method_name != "__call__" or id(y) in self.makers:
            return y
        before, path = self.makers.get(id(x)), "/".join(module.path)
        if isinstance(module, nn.Dropout):
            rate = float(module.rate) if self.train and y is not x else 0.0
            if rate:
                self.dropouts[path] = rate
                self._remember(y, Maker(path, "dropout", rate=rate, before=before))
        elif isinstance(module, LINEAR):
            self._remember(y, Maker(path, "linear", bias=module.use_bias, before=before))
        return y

    def _remember(self, y: Any, maker: Maker) -> None:
        self.makers[id(y)] = maker
        self.kept.append(y)


LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose)  # with one bias per feature


def changing(variables: Tree) -> tuple[str, ...]:
    """The collections that a call may change: all but the parameters."""
    return tuple({"batch_stats", *variables} - {"params"})


def how_made(seen: Seen) -> Made:
    """What a norm's fields say."""
    module = seen.module
    if isinstance(module, nn.BatchNorm):
        ours = isinstance(module, batchnorm.BatchNorm)
        return Made(
            "bnresearch.BatchNorm" if ours else "flax.linen.BatchNorm",
            keeps=True,
            decay=_number(module.momentum),
            epsilon=module.epsilon,
            fast=module.use_fast_variance and not ours,
            axis_name=module.axis_name,
            low=not module.force_float32_reductions,
        )
    if not isinstance(module, Norm):
        return Made(f"flax.linen.{type(module).__name__}", keeps=False)
    name, options = module.chosen
    kind, features = kind_of(name), seen.x.shape[-1]
    plain = all(
        getattr(getattr(seen.running, n, None), "shape", None) == (features,) for n in STATS
    )
    return Made(
        f"norm kind {name}",
        keeps=kind.state is not None and plain,
        decay=_number(options.get("decay")),
        epsilon=_number(options.get("epsilon")) or 1e-5,
        fast=options.get("variance") == "fast",
        axis_name=module.stats_scope.merge,
        low=options.get("stat_dtype") == "input",
        frozen=name == "frozen",
    )


STATS = ("mean", "var")


def _number(value: Any) -> float | None:
    """A setting that is a plain number; traced ones are not known."""
    return None if value is None or isinstance(value, jax.core.Tracer) else float(value)


def matching(rules: Any, sites: list[str]) -> dict[str, bool]:
    """Which sites one of the regular expressions matches, whole."""
    return {site: any(re.fullmatch(rule, site) for rule in rules) for site in sites}
