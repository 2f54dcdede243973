"""The linen module that owns a normaliser's parameters and running statistics."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch import norm as norms
from bnresearch.errors import UserError, lookup
from bnresearch.kinds.batch import activated
from bnresearch.norm import Kind, Scope, Sets, kind_of
from bnresearch.reparam import REPARAMS
from bnresearch.sets import align_mask
from bnresearch.sites import Choice, Rule, choose, make_choice, standard
from bnresearch.watch import Seen, current, noted

Initializer = Callable[..., Any]

INPUTS = ("mask", "domain", "condition", "time")
_given: ContextVar[Mapping[str, Any]] = ContextVar("site_inputs")


@contextlib.contextmanager
def site_inputs(**inputs: Any) -> Iterator[None]:
    """Give every site of the models applied inside this block the same side inputs.

    For models that hand nothing on to their norms:
    ``with site_inputs(mask=mask): model.apply(...)``. What is given at a call of a norm wins. It
    acts while a function is traced: use it inside what is jitted.

    Args:
      inputs: of INPUTS: ``mask`` (booleans, the leading axes of every site's input), ``domain``
        (int, or ``[batch]``), ``condition`` (``[batch, features of the condition]``), ``time``
        (int: the time step). None counts as not given.
    """
    for name in inputs:
        lookup(dict.fromkeys(INPUTS), name, "side input of a norm")
    token = _given.set({**_given.get({}), **{k: v for k, v in inputs.items() if v is not None}})
    try:
        yield
    finally:
        _given.reset(token)


class LinearMap(NamedTuple):
    """The linear map that made the input of a site: ``apply(kernel)`` is that input."""

    apply: Callable[[jax.Array], jax.Array]
    kernel: jax.Array


class Norm(nn.Module):
    """One site: a normaliser of the table NORMS, with its variables.

    Parameters and running statistics are named by the kind: those of "batch" are named as
    flax.linen.BatchNorm names them, ``scale`` and ``bias`` in ``params``, ``mean`` and ``var`` in
    ``batch_stats``; all are float32. Statistics move only if the collection ``batch_stats`` is
    mutable and ``use`` is "batch": which statistics normalise and whether the running ones move are
    two switches. Initialisation moves nothing, and takes inputs of any batch size.

    If the collection ``moments`` is mutable, mean, variance and count of the site's *input* (with
    the bias of the linear map before it) over the whole batch are written there, for every kind. A
    kind that adds to the loss writes its share to the collection ``penalties``.

    Attributes:
      choice: the kind and all its options; numbers among them may be traced arrays.
      rules: what stands at sites whose path they match instead; first match wins.
      use: "batch" or "running".
      stats_scope: over what one set of batch statistics is computed.
      after_linear: the site directly follows a linear map that left out its bias for the norm's
        sake; kinds that need one (`Kind.linear_bias`) then add it.
      scale_init: initialiser of the scale in place of the kind's own (zeros for zero-gamma: Goyal
        et al., 2017); kinds without a scale ignore it.
      activation_follows: an activation belongs behind this site; a kind that brings its own
        (`activates`) applies it, and the model leaves its own out.
      linear_map: the linear map that made an array, if it is known.
    """

    choice: Choice
    rules: tuple[Rule, ...] = ()
    use: str = "batch"
    stats_scope: Scope = Scope()  # linen keeps the name `scope` for itself
    after_linear: bool = True
    scale_init: Initializer | None = None
    activation_follows: bool = False
    linear_map: Callable[[jax.Array], LinearMap | None] = lambda x: None

    @property
    def chosen(self) -> Choice:
        """What stands at this site."""
        return choose("/".join(self.path), self.choice, self.rules)

    @property
    def activates(self) -> bool:
        """Whether the kind at this site brings its activation."""
        return kind_of(self.chosen.kind).activates

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        add: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array:
        """``activation(norm(x) + add)``, for kinds with batch statistics as one function that keeps
        nothing but its arguments and the statistics for the backward pass.

        Args:
          x: ``[batch, ..., features]``.
          activation: applied to the output; None: none.
          add: of the shape of x, added to the output first; None: nothing.
          **inputs: as of `site_inputs`.

        Returns:
          An array of the shape and dtype of x.
        """
        inputs = {**_given.get({}), **{k: v for k, v in inputs.items() if v is not None}}
        for name in inputs:
            lookup(dict.fromkeys(INPUTS), name, "side input of a norm")
        kind = kind_of(self.chosen.kind)
        options = self.chosen.options
        self._check(x, inputs.get("mask"))
        linear_map = self.linear_map(x)
        params = self._params(kind, options, x.shape[-1])
        if kind.linear_bias and self.after_linear and "bias" not in params:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            x = x + bias.astype(x.dtype)
        self._observe(x, inputs.get("mask"))
        use = "running" if self.is_initializing() else current().use or self.use
        context = {name: inputs.get(name) for name in INPUTS} | {
            "use": use,
            "scope": self.stats_scope,
            "activates": self.activation_follows,
            "rng": self._rng(kind) if use == "batch" else None,
        }
        if "linear" in kind.context:
            # The state of such a kind has the shape of the kernel.
            context["linear"] = linear_map
            options = {**options, "linear": linear_map}
        fused = "activation" in kind.context
        if fused:
            context |= {"activation": activation, "add": add}
        if kind.state is None:
            running, y = None, norms.apply(kind, x, params, None, context, options).y
        else:
            running, y = self._with_running(kind, x, params, context, options)
        y = y if fused else activated(y, activation, add)
        if self.is_initializing():
            return y
        seen_use = "" if kind.state is None else use
        return noted(Seen("/".join(self.path), self, x, y, inputs.get("mask"), seen_use, running))

    def _params(
        self, kind: Kind, options: Mapping[str, Any], features: int
    ) -> dict[str, jax.Array]:
        def initializer(name: str, start: jax.Array) -> Callable[..., jax.Array]:
            if name == "scale" and self.scale_init is not None:
                return lambda key: self.scale_init(key, start.shape, jnp.float32)  # type: ignore[misc]
            return lambda key: jnp.asarray(start, jnp.float32)

        starts = kind.params(features, options)
        return {name: self.param(name, initializer(name, start)) for name, start in starts.items()}

    def _with_running(
        self,
        kind: Kind,
        x: jax.Array,
        params: Mapping[str, jax.Array],
        context: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> tuple[Any, jax.Array]:
        """The running statistics before, and the output."""
        assert kind.state is not None
        start = kind.state(x.shape[-1], options)
        variables = {
            name: self.variable("batch_stats", name, jnp.asarray, value, jnp.float32)
            for name, value in start._asdict().items()
            if value is not None
        }
        running = start._replace(**{name: v.value for name, v in variables.items()})
        given, change = running, current().statistics
        if context["use"] == "running" and change is not None and not self.is_initializing():
            given = change("/".join(self.path), running, x, context["mask"])
        result = norms.apply(kind, x, params, given, context, options)
        if context["use"] == "batch" and self.is_mutable_collection("batch_stats"):
            for name, variable in variables.items():
                # float32 also for float64 input: what is kept must not change its type.
                variable.value = getattr(result.running, name).astype(variable.value.dtype)
        if result.penalty is not None and self.is_mutable_collection("penalties"):
            self.put_variable("penalties", "norm", result.penalty)
        return running, result.y

    def _rng(self, kind: Kind) -> jax.Array | None:
        if "rng" not in kind.context:
            return None
        if not self.has_rng("norm"):
            raise UserError(
                f"norm kind {self.chosen.kind!r} draws random numbers; give "
                "model.apply(..., rngs={'norm': key})"
            )
        return self.make_rng("norm")

    def _check(self, x: jax.Array, mask: Any) -> None:
        """Refuse what no kind can do anything right with."""
        if not hasattr(x, "ndim") or x.ndim < 2 or not x.size:
            raise UserError(
                f"a norm takes an array [batch, ..., features] with something in it, not one of "
                f"shape {jnp.shape(x)}; check the batch"
            )
        if mask is not None:
            align_mask(mask, x.shape)

    def _observe(self, x: jax.Array, mask: Any) -> None:
        if self.is_mutable_collection("moments") and not self.is_initializing():
            sets = Sets(x, self.stats_scope, mask)
            moments = norms.whole_batch(sets, norms.moments(sets))
            self.put_variable("moments", "mean", moments.mean)
            self.put_variable("moments", "var", moments.var)
            count = jnp.asarray(sets.batch_count(), jnp.float32)
            self.put_variable("moments", "count", count)


@dataclass(frozen=True)
class NormMaker:
    """The constructor of norms that a model receives; it never sees what is in here."""

    choice: Choice
    rules: tuple[Rule, ...] = ()
    use: str = "batch"
    scope: Scope = Scope()
    weights: str = "auto"
    _last: list[tuple[jax.Array, LinearMap]] = field(default_factory=list, compare=False)

    def __call__(
        self,
        *,
        name: str,
        after_linear: bool = True,
        scale_init: Initializer | None = None,
        activation_follows: bool = False,
    ) -> Norm:
        """The module of one site; see `Norm` for what the arguments mean."""
        return Norm(
            choice=self.choice,
            rules=self.rules,
            use=self.use,
            stats_scope=self.scope,
            after_linear=after_linear,
            scale_init=scale_init,
            activation_follows=activation_follows,
            linear_map=self._linear_map,
            name=name,
        )

    @property
    def kernels(self) -> str:
        """By what convolutions and norms are computed on CPUs: a key of `native.MODES`."""
        return self.scope.kernels

    def linear(self, path: tuple[str, ...], function: Callable[..., jax.Array]) -> Callable:
        """``function(x, kernel, ...)``, the linear map that belongs to the site at ``path``, as
        the kind there wants it: with its kernel reparametrised."""
        chosen = choose("/".join(path), self.choice, self.rules)
        kind = kind_of(chosen.kind)
        name = kind.weights if self.weights == "auto" else self.weights
        transform = REPARAMS[name] if name != "none" else None

        def linear(x: jax.Array, kernel: jax.Array, *args: Any, **settings: Any) -> jax.Array:
            def apply(kernel: jax.Array) -> jax.Array:
                return function(x, transform(kernel) if transform else kernel, *args, **settings)

            y = apply(kernel)
            if "linear" in kind.context:
                self._last[:] = [(y, LinearMap(apply, kernel))]
            return y

        return linear

    def _linear_map(self, x: jax.Array) -> LinearMap | None:
        """The last linear map, if it is the one that made ``x``. It is remembered once only: under
        a transformation of jax, arrays must not outlive it."""
        made, self._last[:] = list(self._last), []
        return next((linear for y, linear in made if y is x), None)


def make_norm(
    kind: str,
    options: Mapping[str, Any] | None = None,
    *,
    use: str = "batch",
    scope: Scope = Scope(),
    rules: tuple[Rule, ...] = (),
    weights: str = "auto",
) -> NormMaker:
    """The constructor ``norm(name=, after_linear=, scale_init=, activation_follows=)``.

    Args:
      kind: a key of NORMS.
      options: those that differ from the kind's defaults; ``preset`` and ``momentum``, too.
      use: "batch" or "running".
      scope: over what one set of batch statistics is computed.
      rules: what stands at some sites instead (`bnresearch.sites.make_rules`).
      weights: the reparametrisation of linear maps: a key of REPARAMS, "none", or "auto", which is
        what the kind asks for.

    Raises:
      UserError: an unknown kind, or an option it does not have.
    """
    lookup({**REPARAMS, "none": 0, "auto": 0}, weights, "norm.weights")
    lookup({"batch": 0, "running": 0}, use, "use of statistics")
    return NormMaker(make_choice(kind, standard(kind, options or {})), rules, use, scope, weights)
