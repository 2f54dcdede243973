"""Normalisers without batch statistics: one example at a time, in training as in evaluation."""

from typing import Any

import jax

from bnresearch import sets
from bnresearch.errors import UserError
from bnresearch.kinds.batch import standardise
from bnresearch.kinds.grouped import group_affine
from bnresearch.kinds.within import (
    centred_and_var,
    mean_square,
    prepared,
    refuse_single,
    values_in,
)

OVER = ("example", "features")


def _axes(x: jax.Array, over: str, kind: str) -> tuple[int, ...]:
    if over not in OVER:
        raise UserError(f"unknown norm.{kind}.over {over!r}; choose one of {OVER}")
    return tuple(range(1, x.ndim)) if over == "example" else (x.ndim - 1,)


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any = 1e-5,
    over: str = "example",
    mask: Any = None,
) -> jax.Array:
    """Layer normalization (Ba, Kiros & Hinton, 2016).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    m and v are mean and biased variance of one example, in two passes and in float32. x is
    ``[batch, ..., features]``; scale and bias are ``[features]``, float32. Nothing is kept.

    Training: as above; no example sees another one.
    Inference: the same.
    Options: ``over="example"`` takes m and v over all axes but the first (the layer norm of the
    convolutional literature: group norm with one group), ``over="features"`` over the last axis
    only (that of transformers: each position for itself). For ``[batch, features]`` both are one.
    A mask leaves positions out of m and v; over features it changes nothing for the others.
    Pitfalls: over features it takes one direction per position away, so that two features can only
    become +1 and -1. A bias of the linear map before it is not needless (the mean is not taken per
    feature). Default epsilons differ: 1e-6 in flax, 1e-5 in torch.
    Citation: Ba, Kiros & Hinton (2016), Layer Normalization, arXiv:1607.06450.

    Raises:
      UserError: an unknown ``over``, one single value to normalise, integer input, a mask that
        does not fit.
    """
    axes = _axes(x, over, "layer")
    if over == "example":
        return group_affine(x, scale, bias, epsilon, 1, mask, "layer").astype(x.dtype)
    wide, mask = prepared(x, mask)
    refuse_single("layer", x.shape, values_in(x.shape, axes))
    centred, var = centred_and_var(wide, axes, mask)
    return standardise(centred, var, scale, bias, epsilon).astype(x.dtype)


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any = 1e-6,
    over: str = "features",
    mask: Any = None,
) -> jax.Array:
    """Root mean square layer normalization (Zhang & Sennrich, 2019).

        y = scale * x / sqrt(mean(x^2) + epsilon) + bias

    The mean square is that of one example, in float32; nothing is subtracted. x is
    ``[batch, ..., features]``; scale and bias are ``[features]``, float32. Nothing is kept.

    Training: as above; no example sees another one.
    Inference: the same.
    Options: ``over="features"`` takes the mean square over the last axis (each position for
    itself), ``over="example"`` over all axes but the first. The paper has no bias: off by default.
    Without scale, over features, it is the pixel norm of Karras et al. (2018). A mask leaves
    positions out of the mean square; over features it changes nothing for the others.
    Pitfalls: a large common offset of the features stays, and hides the differences between them.
    Citation: Zhang & Sennrich (2019), Root Mean Square Layer Normalization, NeurIPS,
    arXiv:1910.07467.

    Raises:
      UserError: an unknown ``over``, integer input, a mask that does not fit.
    """
    wide, mask = prepared(x, mask)
    axes = _axes(x, over, "rms")
    return standardise(wide, mean_square(wide, axes, mask), scale, bias, epsilon).astype(x.dtype)


def group_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any = 1e-5,
    groups: int = 32,
    mask: Any = None,
) -> jax.Array:
    """Group normalization (Wu & He, 2018).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    The features are cut into ``groups`` contiguous groups; m and v are mean and biased variance of
    one example's group, over its features and all positions, in float32. x is
    ``[batch, ..., features]``; scale and bias are ``[features]``, float32. Nothing is kept.

    Training: as above; no example sees another one.
    Inference: the same.
    Options: ``groups=1`` is layer norm over the example, ``groups=features`` instance norm. A mask
    leaves positions out of m and v.
    Pitfalls: the paper's 32 groups are one feature each at 32 features: instance norm, which is
    refused where there is one position only. The number of groups must divide the features.
    Citation: Wu & He (2018), Group Normalization, ECCV, arXiv:1803.08494.

    Raises:
      UserError: groups that do not divide the features, one single value per group, integer
        input, a mask that does not fit.
    """
    return group_affine(x, scale, bias, epsilon, groups, mask, "group").astype(x.dtype)


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any = 1e-5,
    mask: Any = None,
) -> jax.Array:
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky, 2016).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    m and v are mean and biased variance of each feature of one example over its positions, in
    float32. x is ``[batch, ..., features]`` with at least two positions; scale and bias are
    ``[features]``, float32. Nothing is kept.

    Training: as above; no example sees another one.
    Inference: the same (no running statistics: torch's ``track_running_stats=False``).
    Options: a mask leaves positions out of m and v.
    Pitfalls: the mean of a feature over an image, its contrast and its brightness, is lost: a
    global average pool behind it sees nothing but the bias. At 1x1 positions, so for
    ``[batch, features]``, the output would be the bias whatever the input: refused. Where a mask
    leaves an example one position, the output is the bias there.
    Citation: Ulyanov, Vedaldi & Lempitsky (2016), Instance Normalization: The Missing Ingredient
    for Fast Stylization, arXiv:1607.08022.

    Raises:
      UserError: one single position, integer input, a mask that does not fit.
    """
    groups = x.shape[-1]
    return group_affine(x, scale, bias, epsilon, groups, mask, "instance").astype(x.dtype)


def positional_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any = 1e-5,
    mask: Any = None,
) -> jax.Array:
    """Positional normalization (Li, Wu, Weinberger & Belongie, 2019).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    m and v are mean and biased variance over the features at each position of each example, in
    float32: the moments of layer norm with ``over="features"``; only the defaults differ. The paper
    hands m and sqrt(v) to a later layer of a generator ("moment shortcut"); that is the model's
    business and not done here. x is ``[batch, ..., features]``; scale and bias are ``[features]``,
    float32. Nothing is kept.

    Training: as above; no example and no position sees another one.
    Inference: the same.
    Options: ``scale`` and ``bias``, both off by default as in the paper. A mask of examples or
    positions changes nothing for the others.
    Pitfalls: without the moment shortcut the structure of the image that m and v hold is lost.
    Citation: Li, Wu, Weinberger & Belongie (2019), Positional Normalization, NeurIPS,
    arXiv:1907.04312.

    Raises:
      UserError: one single feature, integer input, a mask that does not fit.
    """
    wide, mask = prepared(x, mask)
    axes = (x.ndim - 1,)
    refuse_single("positional", x.shape, values_in(x.shape, axes))
    centred, var = centred_and_var(wide, axes, mask)
    return standardise(centred, var, scale, bias, epsilon).astype(x.dtype)


def identity(x: jax.Array) -> jax.Array:
    """No normalization, the control (Mishkin & Matas, 2016).

        y = x

    What every claim about a norm is held against. x is ``[batch, ..., features]``, any floating
    dtype, and comes back bit for bit. Nothing is averaged, learned or kept; the layer puts the bias
    back that a norm would have made needless, ``[features]``, float32.

    Training: as above.
    Inference: the same.
    Pitfalls: a fair control has its own learning rate, and an initialisation that keeps the
    variance of the signal (see the models without norms).
    Citation: the control, of nobody's making. That deep networks train without norms from a good
    start: Mishkin & Matas (2016), All You Need Is a Good Init, ICLR, arXiv:1511.06422.

    Raises:
      UserError: integer input.
    """
    sets.wide(x)  # refuses what every norm refuses
    return x
