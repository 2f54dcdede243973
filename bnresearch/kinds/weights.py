"""Kinds that normalise the weights in front of a site (`bnresearch.reparam`) instead of its input.

What stands at the site itself is the learned gain and bias of each output: multiplying an output is
multiplying the weights that lead to it.
"""

from typing import Any

import jax

from bnresearch.kinds.batch import affine
from bnresearch.kinds.grouped import group_affine
from bnresearch.sets import wide


def weight_norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, gain: Any
) -> jax.Array:
    """Weight normalization (Salimans & Kingma, 2016).

        y = gain * scale * (h * v / ||v||) + bias

    h is the input of the linear map in front of the site, v its kernel, ||v|| the length of the
    weights of each output (`reparam.weight_norm`, with a small fixed epsilon beneath it). x, the
    output of that map, is ``[batch, ..., features]`` of any floating dtype, and so is y; scale (the
    paper's g, ones) and bias (zeros) are ``[features]``, float32. Nothing in the activations is
    averaged, and nothing is kept.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Options: ``gain``, a fixed factor: sqrt(2) keeps the mean square of the signal through relu.
    ``scale`` and ``bias`` false to leave them out.
    Pitfalls: the paper chooses scale and bias from a first batch, here they start at 1 and 0. At
    a site without a linear map directly in front (a pre-activation block) only scale and bias are
    left.
    Citation: Salimans & Kingma (2016), Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks, NeurIPS, arXiv:1602.07868.

    Raises:
      UserError: integer input.
    """
    return affine(gain * wide(x), scale, bias).astype(x.dtype)


def weight_standardisation(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: Any,
    groups: int,
    mask: Any = None,
) -> jax.Array:
    """Weight standardization with group norm (Qiao et al., 2019).

        y = group_norm(h * (v - mean(v)) / std(v))

    The kernel v of the linear map in front of the site has mean 0 and variance 1 over the fan-in of
    each output (`reparam.standardise`); its output, which grows with the fan-in, goes through group
    norm: mean and variance of one example's group of features over all positions, in float32. x is
    ``[batch, ..., features]`` of any floating dtype, and so is y; scale (ones) and bias (zeros) are
    ``[features]``, float32. Nothing is kept.

    Training: one example at a time; no statistics of the batch.
    Inference: the same.
    Options: those of group norm: ``groups``; ``epsilon``, added to the variance of the activations
    (that of the weights has an epsilon of its own, fixed); ``scale`` and ``bias`` false to leave
    them out. A mask leaves positions out of the statistics. For the weights alone, or with another
    norm behind them, set ``norm.weights=standardise``.
    Pitfalls: useless with a fan-in of 1: all weights become 0.
    Citation: Qiao, Wang, Liu, Shen & Yuille (2019), Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization, arXiv:1903.10520.

    Raises:
      UserError: groups that do not divide the features, one single value per group, integer
        input, a mask that does not fit.
    """
    kind = "weight_standardisation"
    return group_affine(x, scale, bias, epsilon, groups, mask, kind).astype(x.dtype)


def scaled_weight_standardisation(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, gain: Any
) -> jax.Array:
    """Scaled weight standardization (Brock et al., 2021).

        y = gain * scale * (h * (v - mean(v)) / sqrt(fan_in * var(v))) + bias

    h is the input of the linear map in front of the site, v its kernel, whose mean and variance are
    those of each output's weights (`reparam.scaled_standardise`, with a small fixed epsilon beneath
    the root). x, the output of that map, is ``[batch, ..., features]`` of any floating dtype, and
    so is y; scale (ones) and bias (zeros) are ``[features]``, float32. Nothing is kept. The signal
    keeps its variance without any statistics of the data.

    Training: nothing but the formula; no statistics of the data.
    Inference: the same.
    Options: ``gain``, a fixed factor that gives back the variance which the activation takes:
    sqrt(2 pi / (pi - 1)) for relu (`reparam.GAINS` has others). ``scale`` and ``bias`` false to
    leave them out.
    Pitfalls: residual branches need more than this (model nf_resnet has it all).
    Citation: Brock, De & Smith (2021), Characterizing signal propagation to close the performance
    gap in unnormalized ResNets, ICLR, arXiv:2101.08692.

    Raises:
      UserError: integer input.
    """
    return affine(gain * wide(x), scale, bias).astype(x.dtype)
