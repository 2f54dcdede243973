"""Reparametrisations: pure functions from the kernel a layer learns to the one it computes with.

Kernels are ``[..., in, out]``, of dense layers and convolutions alike: one output feature per last
index, everything in front of it its fan-in. All compute in float32 at least and give back the shape
and dtype of the kernel.

A layer of flax uses one through the hook that it has for its linear map; the parameter stays
``kernel``, with the same start:

    plain = reparam.hooks(reparam.scaled_standardise)
    nn.Conv(features, (3, 3), conv_general_dilated=plain.conv)
    nn.Dense(features, dot_general=plain.dense)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.sets import wide


def weight_norm(kernel: jax.Array, *, epsilon: float | jax.Array = 1e-12) -> jax.Array:
    """Weight normalization (Salimans & Kingma, 2016).

        W = v / sqrt(max(||v||^2, epsilon))

    The norm is taken over the fan-in of each output feature. The gain g of the paper's
    ``w = g v / ||v||`` is the ``scale`` of the site behind the layer: multiplying an output is
    multiplying its weights. The kernel's own length has no effect on the layer; its gradient is
    orthogonal to it, and every step along it makes the kernel longer.

    Options:
      epsilon: the smallest squared length that is divided by.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Pitfalls: with unit rows and g = 1 a layer preserves the variance of centred inputs, and halves
    the mean square in a relu net; He's start is g = sqrt(2). The paper chooses g and the bias from
    a first batch.
    Citation: Salimans & Kingma (2016), Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks, NeurIPS, arXiv:1602.07868.

    Raises:
      UserError: a kernel without a fan-in.
    """
    v, axes = _by_output(kernel)
    square = jnp.square(v).sum(axes, keepdims=True)
    return (v * jax.lax.rsqrt(jnp.maximum(square, epsilon))).astype(kernel.dtype)


def centred(kernel: jax.Array) -> jax.Array:
    """Centred weights (Huang et al., 2017).

        W = v - mean(v)

    The mean over the fan-in of each output feature is taken away: what all inputs have in common
    reaches no output. Of the paper's centred weight normalization this is the first half (for the
    whole of it, apply `weight_norm` to the result).

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Pitfalls: zero padding lets a common mean through at the borders of an image.
    Citation: Huang, Liu, Liu, Lang & Tao (2017), Centered Weight Normalization in Accelerating
    Training of Deep Neural Networks, ICCV.

    Raises:
      UserError: a kernel without a fan-in.
    """
    v, axes = _by_output(kernel)
    return (v - v.mean(axes, keepdims=True)).astype(kernel.dtype)


def standardise(kernel: jax.Array, *, epsilon: float | jax.Array = 1e-10) -> jax.Array:
    """Weight standardization (Qiao et al., 2019).

        W = (v - mean(v)) / sqrt(var(v) + epsilon)

    Mean and biased variance over the fan-in of each output feature. Entries have variance 1, so
    outputs grow with the square root of the fan-in: it is made for layers with a norm behind them
    (group norm, in the paper). `scaled_standardise` is the one for layers without.

    Options:
      epsilon: added to the variance; small against 1 / fan_in, which is what weights have.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Pitfalls: useless with a fan-in of 1 (a depthwise 1x1 convolution): all weights become 0.
    Citation: Qiao, Wang, Liu, Shen & Yuille (2019), Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization, arXiv:1903.10520.

    Raises:
      UserError: a kernel without a fan-in.
    """
    v, axes = _by_output(kernel)
    v = v - v.mean(axes, keepdims=True)
    var = jnp.square(v).mean(axes, keepdims=True)
    return (v * jax.lax.rsqrt(var + epsilon)).astype(kernel.dtype)


def scaled_standardise(kernel: jax.Array, *, epsilon: float | jax.Array = 1e-4) -> jax.Array:
    """Scaled weight standardization (Brock et al., 2021).

        W = (v - mean(v)) / sqrt(max(fan_in * var(v), epsilon))

    Mean and biased variance over the fan-in of each output feature; entries have mean 0 and
    variance 1 / fan_in, so that outputs have the variance of centred, independent inputs. The
    learnable gain of the paper is a ``scale`` per output behind the layer, the fixed gain of the
    activation (`GAINS`) a factor of the layer's input.

    Options:
      epsilon: the smallest value of fan_in * var that is divided by. A kernel of He's start has
        about 2 (fan_in) or 2 * in / out (fan_out) there.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Pitfalls: useless with a fan-in of 1. Without the gain of the activation, the signal shrinks
    with every layer. Zero padding takes some variance away at the borders of an image.
    Citation: Brock, De & Smith (2021), Characterizing signal propagation to close the performance
    gap in unnormalized ResNets, ICLR, arXiv:2101.08692.

    Raises:
      UserError: a kernel without a fan-in.
    """
    v, axes = _by_output(kernel)
    v = v - v.mean(axes, keepdims=True)
    square = jnp.square(v).sum(axes, keepdims=True)  # = fan_in * var
    return (v * jax.lax.rsqrt(jnp.maximum(square, epsilon))).astype(kernel.dtype)


def spectral_norm(kernel: jax.Array, *, iterations: int = 10) -> jax.Array:
    """Spectral normalization (Miyato et al., 2018).

        W = v / s,  s = a' v b,  b = normalise(v' a),  a = normalise(v b)   (power iteration)

    The kernel is taken as one matrix ``[fan_in, out]`` (of a convolution, too, whose true operator
    norm can be larger), and s estimates its largest singular value. The gradient goes through s
    with a and b held fixed, as in the paper.

    The paper keeps b between steps and iterates once per step. Here nothing is kept: every call
    begins at the same random b and iterates ``iterations`` times.

    Options:
      iterations: of the power method.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Pitfalls: s is a lower bound; where the largest singular values lie close together, as in a
    random matrix, it is some percent too small after ten iterations.
    Citation: Miyato, Kataoka, Koyama & Yoshida (2018), Spectral Normalization for Generative
    Adversarial Networks, ICLR, arXiv:1802.05957.

    Raises:
      UserError: a kernel without a fan-in, or less than one iteration.
    """
    if iterations < 1:
        raise UserError(f"spectral_norm: iterations is {iterations}; give at least 1")
    v, _ = _by_output(kernel)
    v = v.reshape(-1, v.shape[-1])
    fixed = jax.lax.stop_gradient(v)

    def improve(_: Any, b: jax.Array) -> jax.Array:
        return _unit(_dot(_unit(_dot(fixed, b)), fixed))

    # Random, not ones: a centred kernel has nothing in that direction.
    b = jax.random.normal(jax.random.key(0), v.shape[-1:], v.dtype)
    b = jax.lax.fori_loop(0, iterations, improve, b)
    a = _unit(_dot(fixed, b))
    largest = jnp.maximum(_dot(a, _dot(v, b)), 1e-12)
    return (wide(kernel) / largest).astype(kernel.dtype)


def _by_output(kernel: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """The kernel in float32 at least, and the axes of its fan-in."""
    if kernel.ndim < 2:
        raise UserError(
            f"a kernel of shape {kernel.shape} has no fan-in to reparametrise over; give one of "
            "shape [..., in, out]"
        )
    return wide(kernel), tuple(range(kernel.ndim - 1))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(), 1e-24))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    # Accelerators would multiply in fewer bits, and the ratio of the estimate would follow.
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)


class Hooks(NamedTuple):
    """What a layer computes its linear map with; None is flax's own.

    Attributes:
      conv: for ``nn.Conv(..., conv_general_dilated=)``.
      dense: for ``nn.Dense(..., dot_general=)``.
    """

    conv: Callable[..., jax.Array] | None = None
    dense: Callable[..., jax.Array] | None = None


PLAIN = Hooks()


def hooks(transform: Callable[[jax.Array], jax.Array]) -> Hooks:
    """Linear maps that put their kernel through ``transform`` first.

    The layer has already cast the kernel to its compute dtype: in bfloat16 it is transformed in
    float32 and rounded once more.
    """

    def conv(
        x: jax.Array,
        kernel: jax.Array,
        *arguments: Any,
        convolve: Callable[..., jax.Array] = jax.lax.conv_general_dilated,
        **keywords: Any,
    ) -> jax.Array:
        return convolve(x, transform(kernel), *arguments, **keywords)

    def dense(x: jax.Array, kernel: jax.Array, *arguments: Any, **keywords: Any) -> jax.Array:
        return jax.lax.dot_general(x, transform(kernel), *arguments, **keywords)

    return Hooks(conv, dense)


REPARAMS: dict[str, Callable[..., jax.Array]] = {
    "weight_norm": weight_norm,
    "centred": centred,
    "standardise": standardise,
    "scaled_standardise": scaled_standardise,
    "spectral_norm": spectral_norm,
}

# activation -> 1 / std(activation(z)) for a standard normal z: times this factor, a signal that
# came with variance 1 has variance 1 again (Brock et al., 2021). A test recomputes all of them.
GAINS = {
    "relu": math.sqrt(2 * math.pi / (math.pi - 1)),
    "tanh": 1.5925374197228,
    "sigmoid": 4.8013133720398,
    "gelu": 1.7009165616954,  # with tanh, as flax computes it
    "silu": 1.7871872221005,
    "elu": 1.2708434178502,
    "leaky_relu": 1.7048316271773,  # slope 0.01
    "identity": 1.0,
}
