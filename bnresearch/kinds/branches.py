"""Batch normalization with several sets of running statistics, one of which each value goes to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import averages
from bnresearch.errors import UserError
from bnresearch.kinds import starts
from bnresearch.kinds.batch import Activation, batch_norm, single_value
from bnresearch.kinds.history import places
from bnresearch.sets import Scope, Sets, Stats, align_mask


def _stack(start: Any, count: int, option: str) -> Any:
    """``count`` copies of every array, on a new first axis."""
    if count < 1:
        raise UserError(f"norm.{option}={count}: give at least 1")
    return jax.tree.map(lambda a: jnp.repeat(a[None], count, 0), start)


def _branch(stack: Any, index: Any) -> Any:
    """One row of every array of a stack; what is shared by all (one axis less) as it is."""
    return jax.tree.map(lambda a: a[index], stack)


def _affine_of(parameter: jax.Array | None, index: Any) -> jax.Array | None:
    return parameter if parameter is None or parameter.ndim == 1 else parameter[index]


def _placed(stack: Any, index: Any, value: Any, valid: Any) -> Any:
    """The stack with one row replaced, or as it was where the index is not valid."""

    def place(rows: jax.Array, row: jax.Array) -> jax.Array:
        # What is kept stays float32, also for float64 input.
        return jnp.where(valid, rows.at[index].set(row.astype(rows.dtype)), rows)

    return jax.tree.map(place, stack, value)


def split_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """``scale`` ones and ``bias`` zeros, ``[splits, features]``, or ``[features]`` if shared."""
    start = starts.affine(features, options)
    return start if options["shared"] else _stack(start, options["splits"], "split.splits")


def split_state(features: int, options: Mapping[str, Any]) -> Any:
    """As batch normalization's, ``[splits, ...]``."""
    return _stack(averages.start(features, options), options["splits"], "split.splits")


def split_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Any,
    *,
    use: str,
    splits: int = 2,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    correction: int = 0,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    average: str = "ema",
    track: str = "variance",
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Split batch normalization, or auxiliary BN (Xie, Tan, Gong, Wang, Yuille & Le, 2020).

        y = scale_k * (x - m_k) / sqrt(v_k + epsilon) + bias_k,  k = part of the batch

    Each set that the scope names consists of ``splits`` equal contiguous parts, such as clean and
    adversarial examples (AdvProp), each with batch normalization of its own; a set on several
    devices is cut as a whole. x is ``[batch, ..., features]``; scale, bias and the running mean and
    variance are ``[splits, features]``, float32.

    Training: each part with its own m and v; each part's running statistics move once, towards
    those of the part in the whole batch.
    Inference: all with part 0, the main one, whose running statistics stay as they are.
    Options: ``splits``; ``shared`` true for one scale and bias, ``[features]``, of all parts;
    ``decay``, ``epsilon``, ``correction``, ``variance``, ``stat_dtype``, ``average`` (``window``),
    ``track``, ``on_single``, ``scale`` and ``bias`` as for batch normalization. A mask leaves
    positions out of all statistics.
    Pitfalls: a config alone joins nothing: the shuffled batch is then cut in halves that are alike,
    and inference knows the first. With statistics per device or ghost batch the parts are those of
    each of these sets, and must be joined there. At inference the auxiliary parts are not used:
    take the kind "domain" where they are to be chosen. The work grows with ``splits``.
    Citation: Xie, Tan, Gong, Wang, Yuille & Le (2020), Adversarial Examples Improve Image
    Recognition, CVPR, arXiv:1911.09665.

    Raises:
      UserError: examples of a set that do not divide into the parts; and as batch normalization.
    """
    part: Any = 0
    if use == "batch":
        part = _parts(x.shape[0], scope, splits)
        if mask is None:  # with one, or in a traced part, only `batch_norm` knows, or the program
            single_value(Sets(x, scope), x.shape, on_single, splits)
    return domain_norm(
        x,
        scale,
        bias,
        running,
        use=use,
        domain=part,
        domains=splits,
        decay=decay,
        epsilon=epsilon,
        correction=correction,
        variance=variance,
        stat_dtype=stat_dtype,
        average=average,
        track=track,
        on_single=on_single,
        scope=scope,
        mask=mask,
        activation=activation,
        add=add,
    )


def _parts(examples: int, scope: Scope, splits: int) -> Any:
    """The part of its set that each example of this device belongs to, ``[examples]``."""
    size = examples // scope.splits * scope.merged_devices()
    if splits < 1 or size % splits:
        raise UserError(
            f"norm.split.splits={splits} does not divide the {size} examples that are normalised "
            "together here; choose a batch size that is a multiple"
        )
    return places(scope, examples) // (size // splits)


def _index(name: str, value: Any, examples: int | None) -> Any:
    """A side input as an integer, an array of integers, or a traced one of these; None is 0."""
    index = 0 if value is None else value
    index = index if isinstance(index, jax.core.Tracer) else np.asarray(index)
    shapes = [()] if examples is None else [(), (examples,)]
    if not jnp.issubdtype(index.dtype, jnp.integer) or index.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise UserError(
            f"the norm's {name} is {index.dtype} of shape {index.shape}; give integers of shape "
            f"{wanted}"
        )
    return index


def _checked_domain(domain: Any, domains: int, examples: int) -> tuple[Any, Any]:
    """The domain within bounds, and whether it was so (an array where only the program knows)."""
    index = _index("domain", domain, examples)
    valid = (index >= 0) & (index < domains)
    if isinstance(index, jax.core.Tracer):
        return jnp.clip(index, 0, domains - 1), valid
    if not valid.all():
        raise UserError(
            f"domain {index[~valid].flat[0] if index.ndim else index} of a norm with "
            f"norm.domain.domains={domains}; domains are 0 to {domains - 1}"
        )
    return index, valid


def domain_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """``scale`` ones and ``bias`` zeros, ``[domains, features]``, or ``[features]`` if shared."""
    start = starts.affine(features, options)
    return start if options["shared"] else _stack(start, options["domains"], "domain.domains")


def domain_state(features: int, options: Mapping[str, Any]) -> Any:
    """As batch normalization's, ``[domains, ...]``."""
    return _stack(averages.start(features, options), options["domains"], "domain.domains")


def domain_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Any,
    *,
    use: str,
    domain: Any = None,
    domains: int = 2,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    correction: int = 0,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    average: str = "ema",
    track: str = "variance",
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Domain-specific batch normalization (Chang, You, Seo, Kwak & Han, 2019).

        y = scale_d * (x - m_d) / sqrt(v_d + epsilon) + bias_d,  d = domain of the example

    Batch normalization of each domain's examples for themselves; a batch may mix domains. The side
    input ``domain`` is an integer (the same on all devices), or one per example, ``[batch]``; none
    means 0. x is ``[batch, ..., features]``; scale, bias and the running mean and variance are
    ``[domains, features]``, float32.

    Training: with m and v of the domain's examples in the set that the scope names, weighted by
    their counts where devices are merged. The running statistics of each domain move once, towards
    those of its examples in the whole batch; those of a domain without examples stay.
    Inference: with the running statistics of the example's domain, which stay as they are.
    Options: ``domains``; ``shared`` true for one scale and bias, ``[features]``, of all domains;
    ``decay``, ``correction``, ``variance``, ``stat_dtype``, ``average`` (``window``), ``track``,
    ``on_single``, ``scale`` and ``bias`` as for batch normalization. A mask leaves positions out of
    all statistics.
    Pitfalls: a config alone gives no domain: every example is of domain 0 then, and the others stay
    as they start. A domain with one single value in a set is refused, or NaN where only the
    compiled program knows it; ``on_single=beta`` lets it pass. A domain out of range is refused, or
    its examples are NaN (masked ones, too) where only the compiled program knows it. Statistics of
    a domain never seen are 0 and 1. With one domain per example the work grows with ``domains``.
    Citation: Chang, You, Seo, Kwak & Han (2019), Domain-Specific Batch Normalization for
    Unsupervised Domain Adaptation, CVPR, arXiv:1906.03950.

    Raises:
      UserError: a domain that is no integer, of another shape, or out of range; and as batch
        normalization.
    """
    index, valid = _checked_domain(domain, domains, x.shape[0])
    settings = dict(
        use=use,
        decay=decay,
        epsilon=epsilon,
        correction=correction,
        variance=variance,
        stat_dtype=stat_dtype,
        average=average,
        track=track,
        on_single=on_single,
        scope=scope,
        activation=activation,
        add=add,
    )
    if index.ndim == 0:
        scale, bias = _affine_of(scale, index), _affine_of(bias, index)
        y, new = batch_norm(x, scale, bias, _branch(running, index), mask=mask, **settings)
        new = running if use == "running" else _placed(running, index, new, valid)
        return jnp.where(valid, y, jnp.nan), new
    ones = (1,) * (x.ndim - 1)
    index, valid = jnp.reshape(index, (-1, *ones)), jnp.reshape(valid, (-1, *ones))
    y = jnp.full_like(x, jnp.nan)
    for k in range(domains):
        chosen = (index == k) & valid
        counted = chosen if mask is None else chosen & align_mask(mask, x.shape)
        scale_k, bias_k = _affine_of(scale, k), _affine_of(bias, k)
        y_k, new = batch_norm(x, scale_k, bias_k, _branch(running, k), mask=counted, **settings)
        y = jnp.where(chosen, y_k, y)
        running = running if use == "running" else _placed(running, k, new, True)
    return y, running


def recurrent_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """``scale`` at ``scale_start`` and ``bias`` zeros, ``[features]``, shared by all steps."""
    start = starts.affine(features, options)
    return {n: a * options["scale_start"] if n == "scale" else a for n, a in start.items()}


def recurrent_state(features: int, options: Mapping[str, Any]) -> Stats:
    """Mean 0 and variance 1 of each time step, ``[steps, features]``."""
    return _stack(starts.stats(features, options), options["steps"], "recurrent.steps")


def _checked_time(time: Any, steps: int) -> tuple[Any, Any]:
    """The time step, the last one for all beyond it, and whether it is not negative."""
    index = _index("time", time, None)
    if isinstance(index, jax.core.Tracer):
        return jnp.clip(index, 0, steps - 1), index >= 0
    if index < 0:
        raise UserError(f"time step {index} of a norm; time steps count from 0")
    return min(int(index), steps - 1), True


def recurrent_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    time: Any = None,
    steps: int = 100,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Recurrent batch normalization (Cooijmans, Ballas, Laurent, Gulcehre & Courville, 2017).

        y = scale * (x - m_t) / sqrt(v_t + epsilon) + bias,  t = time step

    Batch normalization inside a recurrent network: each time step has statistics of its own, all
    share scale and bias. The side input ``time`` is an integer, a plain or a traced one (of a
    scan); none means 0. x is one step's ``[batch, ..., features]``; scale (from ``scale_start``)
    and bias are ``[features]``, the running mean and variance ``[steps, features]``, float32.

    Training: with m and v of this step over the set that the scope names; this step's running
    statistics move once, towards those of the whole batch.
    Inference: with this step's running statistics, which stay as they are.
    Options: ``steps`` to keep statistics for; those beyond share the last one's. ``scale_start``
    0.1; ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and
    ``bias`` false to leave them out. A mask (of finished sequences) leaves examples out.
    Pitfalls: a config alone gives no time: every call is step 0 then. A scale of 1 saturates tanh
    and lets the gradient vanish over time, hence 0.1. With equal inputs in all examples at step 0
    the variance there is 0: the paper adds noise to the initial state. Training on more than
    ``steps`` mixes the late ones. A negative time is refused, or NaN where only the compiled
    program knows it.
    Citation: Cooijmans, Ballas, Laurent, Gulcehre & Courville (2017), Recurrent Batch
    Normalization, ICLR, arXiv:1603.09025.

    Raises:
      UserError: a time that is no integer or negative; statistics over one single value with
        ``on_single="error"``; integer input; a mask or sets that do not fit.
    """
    index, valid = _checked_time(time, steps)
    y, new = batch_norm(
        x,
        scale,
        bias,
        _branch(running, index),
        use=use,
        decay=decay,
        epsilon=epsilon,
        on_single=on_single,
        scope=scope,
        mask=mask,
        activation=activation,
        add=add,
    )
    new = running if use == "running" else _placed(running, index, new, valid)
    return (y if valid is True else jnp.where(valid, y, jnp.nan)), new
