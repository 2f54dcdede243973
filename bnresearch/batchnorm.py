"""`BatchNorm`, in the place of flax.linen.BatchNorm: change one import."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from bnresearch.errors import UserError, lookup
from bnresearch.kinds.batch import ON_SINGLE, batch_norm
from bnresearch.sets import Scope, Stats


class BatchNorm(nn.BatchNorm):
    """flax.linen.BatchNorm without its silent errors.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    Fields, call arguments, positions, names, shapes and dtypes of the variables are those of
    flax.linen.BatchNorm, of which this is a subclass; so are the results, up to rounding, and
    checkpoints of either load into the other. ``momentum`` is flax's, the share of the old running
    statistics that is kept; the running variance is the biased one.

    What differs, because flax is silently wrong there:

    ====================================  ============================  ============================
    in training                           flax                          here
    ====================================  ============================  ============================
    a mean of thousands of deviations     E[x^2] - E[x]^2 in float32    two passes, exact; no matter
                                          loses all digits              ``use_fast_variance``
    one value per feature                 gives bias, moves the         refused; see ``on_single``
                                          variance towards 0
    a mask that leaves nothing            NaN, which stays in the       running statistics, which do
                                          running statistics            not move; so does an empty
                                                                        batch
    masks with unequal counts on devices  mean of the devices' means    weighted by counts
    a mask that only tells features       masks whole features          refused
    apart, such as ``[batch]`` where
    there are as many examples as
    features
    ====================================  ============================  ============================

    On a CPU a training step is as fast with two passes as with one: the gradient needs the centred
    values anyway. With a mask, the counts are data: under ``jit`` one single value gives NaN where
    it is refused otherwise. Initialisation moves nothing and takes a batch of any size. Complex
    input is refused.

    Fields, as in flax:
      use_running_average: True to normalise with the running statistics (evaluation); given here
        or in the call.
      axis: the feature axis, or a tuple of them.
      momentum: decay of the running statistics.
      epsilon: added to the variance.
      dtype: of the result; by default that of input and parameters together.
      param_dtype: of scale and bias.
      use_bias, use_scale, bias_init, scale_init: the parameters.
      axis_name, axis_index_groups: the named axis (``pmap``, ``vmap``, ``shard_map``) over which
        statistics are merged, and groups of its indices that are merged apart from each other.
        As in flax, each group then has running statistics of its own.
      use_fast_variance: accepted, and without effect.
      force_float32_reductions: False for statistics in the dtype of ``x`` (or in ``dtype``), and
        running ones in ``param_dtype``: in bfloat16 these stop moving short of where they go.

    Field of ours:
      on_single: what to do about batch statistics over one single value: "error" (UserError),
        "warn", or "beta" (flax: the output is the bias, whatever the input).

    Raises:
      UserError: see above; a mask that does not broadcast against the input.
    """

    on_single: str = "error"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The normalised input, of its shape.

        Args:
          x: the input.
          use_running_average: the field of that name, given here instead.
          mask: booleans that broadcast against ``x`` as in numpy (so ``[batch, 1]`` for examples,
            ``[batch, time, 1]`` for positions); False leaves values out of the statistics.
        """
        use_running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        self._check_fields()
        x = jnp.asarray(x)
        axes = feature_axes(self.axis, x.ndim)
        shape = tuple(x.shape[axis] for axis in axes)
        running = self._running(shape)
        scale, bias = self._params(shape)
        starting = self.is_initializing()
        use = "running" if use_running or x.size == 0 else "batch"
        y, new = batch_norm(
            features_last(self._widened(x, use), axes),
            scale if scale is None else scale.reshape(-1),
            bias if bias is None else bias.reshape(-1),
            Stats(*(variable.value.reshape(-1) for variable in running)),
            use=use,
            decay=self.momentum,
            epsilon=self.epsilon,
            stat_dtype="float32" if self.force_float32_reductions else "input",
            on_single="beta" if starting else self.on_single,
            scope=Scope() if starting else self._merged(),
            mask=None if mask is None else features_last(whole_mask(mask, x.shape, axes), axes),
        )
        if not use_running and not starting:
            for variable, value in zip(running, new, strict=True):
                variable.value = value.reshape(shape).astype(variable.value.dtype)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        return features_back(y, axes, x.shape).astype(dtype)

    def _check_fields(self) -> None:
        lookup(dict.fromkeys(ON_SINGLE), self.on_single, "on_single of BatchNorm")
        for name, largest in (("momentum", 1), ("epsilon", math.inf)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value <= largest:
                raise UserError(
                    f"BatchNorm({name}={value}) is out of range; give a number in [0, {largest}]"
                )

    def _running(self, shape: tuple[int, ...]) -> tuple[nn.Variable, nn.Variable]:
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        return mean, self.variable("batch_stats", "var", jnp.ones, shape, dtype)

    def _params(self, shape: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
        """Scale and bias, made in flax's order: each draws its own key."""
        dtype, scale, bias = self.param_dtype, None, None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, dtype)
        return scale, bias

    def _widened(self, x: jax.Array, use: str) -> jax.Array:
        """The input in the dtype that it is normalised in."""
        dtype = dtypes.canonicalize_dtype(x, dtype=self.dtype)
        if self.force_float32_reductions or use == "running":
            dtype = jnp.promote_types(jnp.promote_types(dtype, x.dtype), jnp.float32)
        return x.astype(dtype)

    def _merged(self) -> Scope:
        groups = self.axis_index_groups
        return Scope(self.axis_name, groups and tuple(map(tuple, groups)))


def feature_axes(axis: int | Iterable[int], rank: int) -> tuple[int, ...]:
    """The feature axes: sorted, none twice, counted from the front."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({rank + a if a < 0 else a for a in axes}))


def features_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``[..., features]`` with all feature axes in one, and at least one axis before it."""
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    shape = x.shape[: x.ndim - len(axes)] or (1,)
    return x.reshape(*shape, math.prod(x.shape[x.ndim - len(axes) :]))


def features_back(y: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `features_last` for an input of ``shape``."""
    rest = [n for axis, n in enumerate(shape) if axis not in axes]
    y = y.reshape(*rest, *(shape[axis] for axis in axes))
    return jnp.moveaxis(y, range(len(rest), len(shape)), axes)


def whole_mask(mask: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """A mask that broadcasts against ``shape`` as in numpy, with as many axes; its feature axes are
    all of length 1 or all whole.

    Raises:
      UserError: it does not broadcast, or it tells nothing but features apart.
    """
    mask = jnp.asarray(mask).astype(bool)
    given, rank = mask.shape, len(shape)
    advice = f"give one of shape {(*shape[:1], *(1,) * (rank - 1))} (examples) or {shape}"
    full = (*(1,) * (rank - len(given)), *given)
    if len(full) != rank or any(m not in (1, n) for m, n in zip(full, shape, strict=True)):
        raise UserError(f"a mask of shape {given} does not broadcast against {shape}; {advice}")
    mask = mask.reshape(full)
    if all(full[axis] == 1 for axis in axes):
        return mask
    values = [axis for axis in range(rank) if axis not in axes and shape[axis] > 1]
    if values and all(full[axis] == 1 for axis in values):
        raise UserError(
            f"a mask of shape {given} for an input of shape {shape} leaves whole features out, not "
            f"values; {advice}"
        )
    return jnp.broadcast_to(mask, tuple(shape[i] if i in axes else m for i, m in enumerate(full)))
