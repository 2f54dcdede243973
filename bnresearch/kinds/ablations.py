"""Batch normalization with one part of it taken away or changed: which part does the work?

All keep `Stats`, the running mean and variance, also where only one of the two normalises: so they
can be compared, observed and exchanged with batch normalization.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch import averages
from bnresearch.errors import UserError
from bnresearch.kinds.batch import (
    Activation,
    Standard,
    affine,
    batch_moments,
    batch_norm,
    moved,
    normalise,
    normalised,
    standardise,
)
from bnresearch.kinds.within import prepared
from bnresearch.sets import Scope, Sets, Stats, whole_batch


def centre_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Batch centring, an ablation of batch normalization (Ioffe & Szegedy, 2015).

        y = scale * (x - m) + bias

    Batch normalization without the division. m is the mean of each feature over the set that the
    scope names. x is ``[batch, ..., features]``; scale, bias and the running mean and variance are
    ``[features]``, float32; the variance is kept for observation and not used.

    Training: subtracts m of the batch; the running statistics move once, towards those of the whole
    batch.
    Inference: subtracts the running mean; nothing moves.
    Options: ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and
    ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: the scale of the input passes through: no invariance to the scale of the weights
    before it, and an initialisation is needed that keeps the variance of the signal.
    Citation: Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift, ICML, arXiv:1502.03167; defined here.

    Raises:
      UserError: a mean over one single value with ``on_single="error"``; integer input; a mask or
        sets that do not fit.
    """
    if use == "running":
        return affine(prepared(x)[0] - running.mean, scale, bias).astype(x.dtype), running
    sets, centred, stats = batch_moments(x, running, scope=scope, mask=mask, on_single=on_single)
    y = sets.join(affine(centred, scale, bias))
    return y, moved(running, sets, stats, decay=decay)


def mean_only_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """``bias`` zeros, ``[features]``; there is no scale."""
    return {"bias": jnp.zeros(features)} if options.get("bias", True) else {}


def mean_only_norm(
    x: jax.Array,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Mean-only batch normalization (Salimans & Kingma, 2016).

        y = x - m + bias

    m is the mean of each feature over the set that the scope names. x is ``[batch, ...,
    features]``; bias and the running mean and variance are ``[features]``, float32; the variance is
    kept for observation and not used. The paper pairs it with weight normalization of the linear
    map before it, whose gain is then the scale; that is the linear map's business.

    Training: subtracts m of the batch; the running statistics move once, towards those of the whole
    batch.
    Inference: subtracts the running mean; nothing moves.
    Options: ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``bias`` false
    to leave it out. A mask leaves positions out of all statistics.
    Pitfalls: as for batch centring; without weight normalization before it, it is not the paper's
    method.
    Citation: Salimans & Kingma (2016), Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks, NeurIPS, arXiv:1602.07868.

    Raises:
      UserError: a mean over one single value with ``on_single="error"``; integer input; a mask or
        sets that do not fit.
    """
    return centre_norm(
        x, None, bias, running, use=use, decay=decay, on_single=on_single, scope=scope, mask=mask
    )


def scale_only_update(running: Stats, batch: Stats, count: Any, *, decay: Any) -> Stats:
    """``mean^2 + var`` becomes the running average of E[x^2]."""
    return averages.update(running, batch, count, decay=decay, track="second_moment")


def scale_only_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Batch scaling, an ablation of batch normalization (Ioffe & Szegedy, 2015).

        y = scale * x / sqrt(mean(x^2) + epsilon) + bias

    Batch normalization without the centring: the mean square of each feature is taken over the set
    that the scope names (m^2 + v). x is ``[batch, ..., features]``; scale, bias and the running
    mean and variance are ``[features]``, float32.

    Training: divides by the root mean square of the batch. The running mean and variance move once,
    so that ``mean^2 + var`` is the running average of the whole batch's E[x^2].
    Inference: divides by ``sqrt(mean^2 + var + epsilon)`` of the running ones; nothing moves.
    Options: ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and
    ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: a mean that is large against the deviation hides the deviation. One single value
    becomes its sign, hence it is refused.
    Citation: Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift, ICML, arXiv:1502.03167; defined here.

    Raises:
      UserError: statistics over one single value with ``on_single="error"``; integer input; a mask
        or sets that do not fit.
    """
    if use == "running":
        square = jnp.square(running.mean) + running.var
        return normalise(x, Stats(jnp.zeros_like(square), square), scale, bias, epsilon), running
    sets, _, stats = batch_moments(x, running, scope=scope, mask=mask, on_single=on_single)
    square = jnp.square(stats.mean) + stats.var
    y = sets.join(standardise(sets.x, square, scale, bias, epsilon))
    return y, moved(running, sets, stats, decay=decay, track="second_moment")


def stop_gradient_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Batch normalization with constant statistics in backward (Ioffe & Szegedy, 2015).

        y = scale * (x - sg(m)) / sqrt(sg(v) + epsilon) + bias

    The values of batch normalization, with m and v taken as constants in the backward pass (sg:
    stop gradient): ``dx = scale / sqrt(v + epsilon) * dy``. x is ``[batch, ..., features]``; scale,
    bias and the running mean and variance are ``[features]``, float32.

    Training: as above; the running statistics move once, towards those of the whole batch.
    Inference: as batch normalization: with the running statistics, which stay as they are.
    Options: ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and
    ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: a step that only shifts or rescales the input does not change the loss, yet the
    gradient asks for it: the weights grow without bound. The paper warns of exactly this for the
    mean; it is an ablation, not a method.
    Citation: Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift, ICML, section 2, arXiv:1502.03167.

    Raises:
      UserError: statistics over one single value with ``on_single="error"``; integer input; a mask
        or sets that do not fit.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon, activation, add), running
    vectors = Standard(scale, bias, epsilon)
    y, sets, stats = normalised(
        x,
        running,
        lambda stats: vectors(jax.lax.stop_gradient(stats)),
        scope=scope,
        mask=mask,
        on_single=on_single,
        activation=activation,
        add=add,
    )
    return y, moved(running, sets, stats, decay=decay)


def _gaussian_factor(p: Any) -> jax.Array:
    """c_p with ``c_p * E[|z|^p]^(1/p) = 1`` for a standard normal z: sqrt(pi/2) at p = 1."""
    p = jnp.asarray(p, float)
    log_moment = p / 2 * jnp.log(2.0) + jax.scipy.special.gammaln((p + 1) / 2)
    return jnp.exp(-(log_moment - jnp.log(jnp.pi) / 2) / p)


def _lp_variance(sets: Sets, centred: jax.Array, var: jax.Array, p: Any, pooled: bool) -> jax.Array:
    """``(c_p * mean(|x - m|^p)^(1/p))^2`` of each set, or pooled over the whole batch.

    The deviations are divided by their standard deviation before the power is taken, which changes
    no value and keeps the power within float32 (the result is homogeneous: no gradient is lost by
    holding that unit constant).
    """
    flat = var == 0
    unit = jax.lax.stop_gradient(jnp.sqrt(jnp.where(flat, 1, var)))
    moment = sets.mean(jnp.power(jnp.abs(centred / unit), p))
    if pooled:
        moment, flat, unit = sets.batch_mean(moment), flat.reshape(-1), unit.reshape(-1)
    root = jnp.power(jnp.where(flat, 1, moment), 1 / p)
    return jnp.where(flat, 0, jnp.square(unit * _gaussian_factor(p).astype(root.dtype) * root))


def _lp_whole_batch(sets: Sets, stats: Stats, square: jax.Array, scope: Scope, p: Any) -> Stats:
    if scope.splits == 1 and scope.pool is None:  # one set, which is the whole batch
        return Stats(stats.mean.reshape(-1), square.reshape(-1))
    # The moment about the mean of the whole batch does not follow from those about other means.
    mean, var = whole_batch(sets, stats)
    return Stats(mean, _lp_variance(sets, sets.x - mean, var, p, pooled=True))


def lp_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    p: Any = 1.0,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Lp batch normalization (Hoffer, Banner, Golan & Soudry, 2018).

        y = scale * (x - m) / sqrt(s^2 + epsilon) + bias,  s = c_p * mean(|x - m|^p)^(1/p)

    The deviation is measured by its p-th absolute moment. The constant ``c_p = (sqrt(pi) / (2^(p/2)
    gamma((p+1)/2)))^(1/p)`` makes s the standard deviation of a Gaussian (p = 1: sqrt(pi/2); p = 2:
    batch normalization). x is ``[batch, ..., features]``; scale, bias, the running mean and the
    running var, which holds s^2, are ``[features]``, float32.

    Training: with m and s of the set that the scope names. The running statistics move once,
    towards m and s^2 of the whole batch.
    Inference: with the running mean and var, which stay as they are.
    Options: ``p`` > 0; ``decay`` of the running statistics; ``on_single`` error, warn or beta;
    ``scale`` and ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: for values that are not Gaussian (after a ReLU) s is not the standard deviation. At p
    < 1 the gradient is infinite at the mean. The authors' code averages 1/s; this is an average of
    s^2, as everywhere here.
    Citation: Hoffer, Banner, Golan & Soudry (2018), Norm Matters: Efficient and Accurate
    Normalization Schemes in Deep Networks, NeurIPS, arXiv:1803.01814.

    Raises:
      UserError: p not above 0; statistics over one single value with ``on_single="error"``; integer
        input; a mask or sets that do not fit.
    """
    if not isinstance(p, jax.core.Tracer) and not p > 0:
        raise UserError(f"norm.lp.p={p} is no moment; give a number above 0, such as norm.lp.p=1")
    if use == "running":
        return normalise(x, running, scale, bias, epsilon), running
    sets, centred, stats = batch_moments(x, running, scope=scope, mask=mask, on_single=on_single)
    square = _lp_variance(sets, centred, stats.var, p, pooled=False)
    if sets.mask is not None:
        square = jnp.where(sets.count == 0, stats.var, square)
    y = sets.join(standardise(centred, square, scale, bias, epsilon))
    batch, count = _lp_whole_batch(sets, stats, square, scope, p), sets.batch_count()
    return y, averages.update(running, batch, count, decay=decay)


def _own_key(key: jax.Array, scope: Scope) -> jax.Array:
    """Another key on every device, out of one that is the same on all."""
    for axis in sorted(scope.axes()):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def noisy_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    rng: Any = None,
    shift: Any = 0.5,
    stretch: Any = 1.25,
    shift_jitter: Any = 0.1,
    stretch_jitter: Any = 0.1,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Noisy batch normalization (Santurkar, Tsipras, Ilyas & Madry, 2018).

        y = a * BN(x) + b,  a ~ N(A, stretch_jitter^2),  b ~ U(B - shift_jitter, B + shift_jitter)

    Batch normalization, its affine included, and behind it noise whose distribution changes at
    every step: ``A ~ U(1, stretch)`` and ``B ~ U(-shift, shift)`` are drawn anew for each feature
    and step (covariate shift that no training can follow), a and b for each value. x is ``[batch,
    ..., features]``; scale, bias and the running mean and variance are ``[features]``, float32.

    Training: as above. A and B are the same on all devices. The running statistics, those of the
    input, move once, towards those of the whole batch.
    Inference: the running statistics, and the noise replaced by its mean: ``(1 + stretch) / 2``
    times batch normalization.
    Options: ``shift``, ``stretch``, ``shift_jitter`` and ``stretch_jitter``, as above: 0, 1, 0 and
    0 are batch normalization. ``decay`` and ``epsilon`` as for batch normalization; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions out
    of all statistics.
    Pitfalls: noise behind every norm is an experiment of the paper, which reports the training
    only. The distributions and the four defaults are those of its appendix (n_mu: ``shift``,
    n_sigma: ``stretch``, r_mu and r_sigma: the jitters), read as public re-implementations read
    them; the rule for inference is defined here.
    Citation: Santurkar, Tsipras, Ilyas & Madry (2018), How Does Batch Normalization Help
    Optimization?, NeurIPS, arXiv:1805.11604.

    Raises:
      UserError: no random key in training; statistics over one single value with
        ``on_single="error"``; integer input; a mask or sets that do not fit.
    """
    y, new = batch_norm(
        prepared(x)[0],
        scale,
        bias,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        on_single=on_single,
        scope=scope,
        mask=mask,
    )
    if use == "running":
        return ((1 + stretch) / 2 * y).astype(x.dtype), new
    if rng is None:
        raise UserError(
            "norm.kind=noisy draws random numbers in training; give model.apply(..., "
            "rngs={'norm': key})"
        )
    keys = jax.random.split(rng, 4)
    features = (x.shape[-1],)
    a = 1 + (stretch - 1) * jax.random.uniform(keys[0], features, jnp.float32)
    b = shift * jax.random.uniform(keys[1], features, jnp.float32, -1)
    a += stretch_jitter * jax.random.normal(_own_key(keys[2], scope), y.shape, jnp.float32)
    b += shift_jitter * jax.random.uniform(_own_key(keys[3], scope), y.shape, jnp.float32, -1)
    return (a * y + b).astype(x.dtype), new
