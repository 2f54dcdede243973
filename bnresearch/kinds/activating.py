"""Normalisers without batch statistics that bring their activation: the model leaves its own out.

All take ``activates``: false at a site with no activation behind it, such as the end of a residual
branch, where they leave theirs out and normalise only. Parameters of the activation stand there all
the same, without a gradient, so that a site's parameters do not depend on its place.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch.errors import UserError
from bnresearch.kinds import starts
from bnresearch.kinds.batch import affine, standardise
from bnresearch.kinds.grouped import examples, group_affine, lean, of_groups, refuse
from bnresearch.kinds.within import mean_square, prepared, values_in
from bnresearch.moments import scaled
from bnresearch.sets import Sets


def frn_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``threshold`` zeros, ``[features]``; with ``learned_epsilon`` also
    ``extra_epsilon``, one number, 1e-4 here."""
    start = starts.affine(features, options) | {"threshold": jnp.zeros(features)}
    if options.get("learned_epsilon", False):
        start["extra_epsilon"] = jnp.full((), 1e-4)
    return start


def frn(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    threshold: jax.Array,
    extra_epsilon: jax.Array | None = None,
    *,
    epsilon: Any = 1e-6,
    activates: bool = True,
    mask: Any = None,
) -> jax.Array:
    """Filter response normalization with thresholded linear unit (Singh & Krishnan, 2020).

        y = max(scale * x / sqrt(mean(x^2) + epsilon + |extra_epsilon|) + bias, threshold)

    The mean square is that of each feature of one example over its positions, in float32; nothing
    is subtracted. x is ``[batch, ..., features]`` with at least two positions (``[batch,
    features]`` counts as one), or any number with learned_epsilon; scale (ones), bias and threshold
    (zeros) are ``[features]``, extra_epsilon is one number, all float32. Nothing is kept.

    Training: as above; no example sees another one. It is its own activation: the model leaves its
    activation out.
    Inference: the same.
    Options: ``epsilon`` added to the mean square; ``learned_epsilon`` adds the learned
    extra_epsilon besides, which starts at 1e-4 here, for layers with one position. A mask leaves
    positions out of the mean square.
    Pitfalls: over one position without learned_epsilon the output would be the sign of the input,
    with hardly any gradient: refused. Where a mask leaves an example one position, it is that. It
    wants a warm-up of the learning rate. Where no activation belongs (``activates=False``) the
    threshold is left out.
    Citation: Singh & Krishnan (2020), Filter Response Normalization Layer: Eliminating Batch
    Dependence in the Training of Deep Neural Networks, CVPR, arXiv:1911.09737.

    Raises:
      UserError: one single position without learned_epsilon, integer input, a mask that does not
        fit.
    """
    wide, mask = prepared(x, mask)
    axes = tuple(range(1, x.ndim - 1))
    if extra_epsilon is not None:
        epsilon = epsilon + jnp.abs(extra_epsilon)
    elif values_in(x.shape, axes) == 1:
        raise UserError(
            f"norm.kind=frn over one single value (input {x.shape}): the output would be its sign; "
            "give it several positions, or set norm.frn.learned_epsilon=true"
        )
    square = mean_square(wide, axes, mask)
    y = standardise(wide, square, scale, bias, epsilon)
    return (jnp.maximum(y, threshold) if activates else y).astype(x.dtype)


def evonorm_s0_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``v`` ones, ``[features]``."""
    return starts.affine(features, options) | {"v": jnp.ones(features)}


def evonorm_s0(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    v: jax.Array,
    *,
    epsilon: Any = 1e-5,
    groups: int = 32,
    activates: bool = True,
    mask: Any = None,
) -> jax.Array:
    """EvoNorm-S0 (Liu, Brock, Simonyan & Le, 2020).

        y = scale * x * sigmoid(v * x) / sqrt(var(x) + epsilon) + bias

    The variance (biased) is that of one example's group of features, as in group norm, in two
    passes and in float32; the input itself is not centred. x is ``[batch, ..., features]``; scale
    and v (ones) and bias (zeros) are ``[features]``, float32. Nothing is kept.

    Training: as above; no example sees another one. It is its own activation: the model leaves its
    activation out.
    Inference: the same.
    Options: ``groups`` as in group norm. A mask leaves positions out of the variance.
    Pitfalls: where no activation belongs (``activates=False``) the numerator is x alone; that still
    divides by the deviation, whereas public code for these sites applies scale and bias only. An
    offset much larger than the deviation is not taken away, but blown up.
    Citation: Liu, Brock, Simonyan & Le (2020), Evolving Normalization-Activation Layers, NeurIPS,
    arXiv:2004.02967.

    Raises:
      UserError: groups that do not divide the features, one single value per group, integer
        input, a mask that does not fit.
    """
    refuse(x, groups, "evonorm_s0", mask)

    @lean
    def body(x: jax.Array) -> jax.Array:
        sets, stats = examples(x, mask)
        var = of_groups(sets, stats, groups).var
        numerator = sets.x * jax.nn.sigmoid(v * sets.x) if activates else sets.x
        return sets.join(standardise(numerator, var, scale, bias, epsilon))

    return body(x)


def proxy_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``proxy_bias`` and ``proxy_scale`` zeros, ``[features]``."""
    zeros = {name: jnp.zeros(features) for name in ("proxy_bias", "proxy_scale")}
    return starts.affine(features, options) | zeros


def proxy_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    proxy_bias: jax.Array,
    proxy_scale: jax.Array,
    *,
    epsilon: Any = 1e-5,
    proxy_epsilon: Any = 0.03,
    groups: int = 1,
    samples: int = 256,
    activates: bool = True,
    mask: Any = None,
) -> jax.Array:
    """Proxy normalization (Labatie, Masters, Eaton-Rosen & Luschi, 2021).

        y = (f(h) - mean(f(p))) / sqrt(var(f(p)) + proxy_epsilon)
        h = scale * (x - m) / sqrt(v + epsilon) + bias
        p = scale * (proxy_bias + (1 + proxy_scale) * N(0, 1)) + bias
        f = relu

    Group norm and a rectifier, then the mean and deviation that the rectified feature would have if
    the normalised one were normally distributed: what batch norm would see, without a batch. m and
    v are as in group norm, in float32; mean and variance of the proxy p are taken over ``samples``
    evenly spaced quantiles of the normal distribution, of variance 1. x is ``[batch, ...,
    features]``; scale, bias, proxy_bias and proxy_scale (both zeros) are ``[features]``, float32.
    Nothing is kept.

    Training: as above; no example sees another one. It is its own activation: the model leaves its
    activation out.
    Inference: the same; mean and deviation of the proxy could be computed once.
    Options: ``groups`` as in group norm, 1 for layer norm over the example; ``proxy_epsilon`` and
    ``samples`` of the proxy. A mask leaves positions out of m and v.
    Pitfalls: the activation is relu, whatever the model's own is. The output is no longer positive.
    Where no activation belongs (``activates=False``) y is h: group norm.
    Citation: Labatie, Masters, Eaton-Rosen & Luschi (2021), Proxy-Normalizing Activations to Match
    Batch Normalization while Removing Batch Dependence, NeurIPS, arXiv:2106.03743.

    Raises:
      UserError: groups that do not divide the features, one single value per group, fewer than two
        samples, integer input, a mask that does not fit.
    """
    if samples < 2:
        raise UserError(f"norm.proxy.samples={samples} have no variance; give at least 2")
    h = group_affine(x, scale, bias, epsilon, groups, mask, "proxy")
    if not activates:
        return h.astype(x.dtype)
    drawn = np.array([NormalDist().inv_cdf((i + 0.5) / samples) for i in range(samples)])
    quantiles = jnp.asarray(drawn / drawn.std(), h.dtype)[:, None]
    proxy = jax.nn.relu(affine(proxy_bias + (1 + proxy_scale) * quantiles, scale, bias))
    multiplier = jax.lax.rsqrt(proxy.var(0) + proxy_epsilon)
    return scaled(Sets(jax.nn.relu(h)), proxy.mean(0), multiplier, jnp.zeros(1)).astype(x.dtype)
