"""The linen module that owns a normaliser's parameters and running statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import lookup
from bnresearch.norm import NORMS, Scope, Stats, batch_stats, values_per_batch, whole_batch

Initializer = Callable[..., Any]


class Norm(nn.Module):
    """One site: a normaliser of the table NORMS, with its variables.

    Variables are named as flax.linen.BatchNorm names them: ``scale`` and ``bias`` in ``params``,
    ``mean`` and ``var`` in ``batch_stats``, all float32 and ``[features]``. Statistics move only if
    the collection ``batch_stats`` is mutable and ``use`` is "batch": which statistics normalise and
    whether the running ones move are two switches.

    If the collection ``moments`` is mutable, mean, variance and count of the site's *input* over
    the whole batch are written there, for every kind (also "none").

    Attributes:
      kind: a key of NORMS.
      options: the keyword options of that kind; numbers may be traced arrays.
      use: "batch" or "running".
      stats_scope: over what one set of batch statistics is computed.
      after_linear: the site directly follows a linear map that left out its bias for the norm's
        sake; kinds without a bias of their own then add one.
      scale_init: initialiser of the scale (zeros for zero-gamma: Goyal et al., 2017).
    """

    kind: str
    options: Mapping[str, Any]
    use: str = "batch"
    stats_scope: Scope = Scope()  # linen keeps the name `scope` for itself
    after_linear: bool = True
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, ..., features]`` to the same shape and dtype."""
        kind = lookup(NORMS, self.kind, "norm.kind")
        shape = (x.shape[-1],)
        self._observe(x)
        if not kind.affine:
            y = kind.function(x, **self.options)
            if not self.after_linear:
                return y
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
            return y + bias.astype(y.dtype)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if not kind.running:
            return kind.function(x, scale, bias, **self.options)
        return self._with_running(kind.function, x, scale, bias)

    def _with_running(
        self, function: Callable, x: jax.Array, scale: jax.Array, bias: jax.Array
    ) -> jax.Array:
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        running = Stats(mean.value, var.value)
        y, new = function(
            x, scale, bias, running, use=self.use, scope=self.stats_scope, **self.options
        )
        # Initialisation must leave the statistics at 0 and 1.
        moving = self.use == "batch" and self.is_mutable_collection("batch_stats")
        if moving and not self.is_initializing():
            mean.value, var.value = new
        return y

    def _observe(self, x: jax.Array) -> None:
        if self.is_mutable_collection("moments") and not self.is_initializing():
            moments = whole_batch(batch_stats(x, self.stats_scope), self.stats_scope)
            self.put_variable("moments", "mean", moments.mean)
            self.put_variable("moments", "var", moments.var)
            count = values_per_batch(x.shape, self.stats_scope)
            self.put_variable("moments", "count", jnp.asarray(count, jnp.float32))


def make_norm(
    kind: str, options: Mapping[str, Any], *, use: str = "batch", scope: Scope = Scope()
) -> Callable[..., Norm]:
    """The constructor ``norm(name=, after_linear=True, scale_init=None)`` that a model receives."""

    def norm(
        *, name: str, after_linear: bool = True, scale_init: Initializer | None = None
    ) -> Norm:
        return Norm(
            kind=kind,
            options=options,
            use=use,
            stats_scope=scope,
            after_linear=after_linear,
            scale_init=scale_init or nn.initializers.ones,
            name=name,
        )

    return norm
