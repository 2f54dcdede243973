"""Residual nets that keep the variance of the signal by design, without normalisation: NF-ResNet.

Brock, De & Smith (2021), Characterizing signal propagation to close the performance gap in
unnormalized ResNets, ICLR, arXiv:2101.08692.
The adaptive gradient clipping of the paper that follows it (Brock et al., 2021,
arXiv:2102.06171) is `optim.agc`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch import reparam
from bnresearch.errors import lookup
from bnresearch.models.blocks import (
    ACTIVATIONS,
    NoNorm,
    Parts,
    check_finite,
    global_pool,
    head,
    max_pool,
)
from bnresearch.models.resnet import Conv, check_layout, layout
from bnresearch.reparam import GAINS

STANDARDISED = reparam.hooks(reparam.scaled_standardise)


class Gain(nn.Module):
    """``scale * x + bias``, one pair of numbers per feature."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


def scaled_conv(p: Parts, x: jax.Array, conv: Conv, name: str) -> jax.Array:
    """A convolution with scaled weight standardisation, and its learnable gain and bias."""
    return Gain(name=f"{name}_gain")(p.conv(x, *conv, name=name, hooks=STANDARDISED))


class Plan(NamedTuple):
    """What a block is told.

    Attributes:
      convs: the convolutions of its branch.
      beta: the standard deviation that its input has at the start of training.
      projects: the shortcut is a convolution, because the shape changes.
    """

    convs: Sequence[Conv]
    beta: float
    projects: bool


def plan(
    features: int, stages: Sequence[Sequence[Sequence[Conv]]], alpha: float
) -> tuple[list[list[Plan]], float]:
    """What every block is told, and the standard deviation behind the last one.

    The signal comes with variance 1 and ``features`` from the stem. Each block adds alpha^2; one
    that projects starts again at 1, because its shortcut is a standardised convolution of a signal
    that was divided by beta.
    """
    var = 1.0
    plans: list[list[Plan]] = []
    for stage in stages:
        plans.append([])
        for convs in stage:
            projects = features != convs[-1].features or max(c.stride for c in convs) > 1
            plans[-1].append(Plan(convs, var**0.5, projects))
            var = (1.0 if projects else var) + alpha**2
            features = convs[-1].features
    return plans, var**0.5


class Block(nn.Module):
    """shortcut + alpha * skip_gain * branch(act(x / beta)), every branch of variance 1.

    The shortcut is x, or, where the shape changes, a scaled 1x1 convolution of act(x / beta).
    `Parts.act` includes the gain of the activation.
    """

    parts: Parts
    plan: Plan
    alpha: float
    skip_gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p, convs = self.parts, self.plan.convs
        y = p.act(x / self.plan.beta)
        if self.plan.projects:
            strides = max(conv.stride for conv in convs)
            shortcut = Conv(convs[-1].features, 1, strides)
            x = scaled_conv(p, y, shortcut, "conv_shortcut")
        for i, conv in enumerate(convs, 1):
            y = scaled_conv(p, y if i == 1 else p.act(y), conv, f"conv{i}")
        start = nn.initializers.constant(self.skip_gain)
        gain = self.param("skip_gain", start, (), jnp.float32)
        return x + (self.alpha * gain).astype(y.dtype) * y


class Stem(nn.Module):
    """Scaled convolutions with an activation between them; then max-pooling."""

    parts: Parts
    convs: Sequence[Conv]
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        for i, conv in enumerate(self.convs, 1):
            x = scaled_conv(p, x if i == 1 else p.act(x), conv, f"conv{i}")
        return max_pool(x, 3) if self.pool else x


class Stage(nn.Module):
    """One block per plan."""

    parts: Parts
    plans: Sequence[Plan]
    alpha: float
    skip_gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, plan in enumerate(self.plans, 1):
            x = Block(self.parts, plan, self.alpha, self.skip_gain, name=f"block{i}")(x)
        return x


class NFResNet(nn.Module):
    """ResNet v2 with analytic scaling in the place of normalisation: no norm sites.

    Block: ``x + alpha * f(x / beta)``. With inputs of mean 0 and variance 1, f keeps the variance
    at the start: its convolutions have standardised kernels (`reparam.scaled_standardise`) with a
    learnable gain and bias per output, and its activations are multiplied by their gain
    (`reparam.GAINS`). So the variance of the trunk is known without looking at it:

        beta_1^2 = 1,  beta_{l+1}^2 = beta_l^2 + alpha^2,  or 1 + alpha^2 behind a block that
        changes the shape, whose shortcut is a scaled convolution of act(x / beta)

    In front of the mean the trunk is divided by its standard deviation and activated once more.
    Zero padding and max-pooling are not in that calculation. At the start of a wide relu net, zero
    padding takes about a tenth of the variance of a branch of two 3x3 convolutions on 32x32
    positions, and a third on 8x8.

    Families and stem are those of `resnet.ResNet`; shortcuts are always projections. Kernels start
    as its kernels do (He normal, fan_out; bitwise for one seed), and the standardisation leaves
    their direction of it; head LeCun normal; gains 1, biases 0. Weight decay spares gains and
    biases by default, as in the paper.

    What differs from the published code (google-deepmind/deepmind-research, nfnets/nf_resnet.py):

    * the head: there it takes act(trunk), undivided by the expected deviation, and its kernel
      starts as a normal of deviation 0.01;
    * the activation: there act(x) / beta, here act(x / beta), which is the same for relu only, and
      the one of the two whose input has variance 1;
    * left out: stochastic depth, dropout, squeeze-and-excite.

    `norm` is ignored: `norm.kind` has to be "none", and `init.name` "he", because the start is what
    makes the method.

    Attributes:
      num_classes: length of the logits.
      norm: ignored.
      dtype: of the convolutions; parameters and logits are float32.
      family: a key of FAMILIES.
      depth: see families.
      width: multiplies the features of every stage.
      stem: a key of STEMS, or "auto": that of the family.
      alpha: factor of every branch.
      zero_gain: start the learnable skip_gain of each branch at 0, as the published code does,
        instead of 1; blocks that keep the shape are then the identity at the start, and beta is
        what the deviation would be with gains of 1. Under `optim.agc` gains at 0 move slowly,
        as they count there as weights of length 1e-3: short trainings want 1 then.
      activation: a key of ACTIVATIONS.
    """

    num_classes: int
    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    family: str = "cifar"
    depth: int = 20
    width: float = 1.0
    stem: str = "auto"
    alpha: float = 0.2
    zero_gain: bool = True
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        act, gain = ACTIVATIONS[self.activation], GAINS[self.activation]
        p = Parts(NoNorm(), lambda x: act(x) * gain, "before_act", self.dtype)
        stem, stages = layout("nf_resnet", self.family, self.depth, self.width, self.stem)
        plans, std = plan(stem.convs[-1].features, stages, self.alpha)
        skip_gain = 0.0 if self.zero_gain else 1.0
        x = Stem(p, stem.convs, stem.pool, name="stem")(x.astype(self.dtype))
        for i, stage in enumerate(plans, 1):
            x = Stage(p, stage, self.alpha, skip_gain, name=f"stage{i}")(x)
        return head(global_pool(p.act(x / std)), self.num_classes)


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no NF-ResNet can have, and for images that are too small."""
    lookup(ACTIVATIONS, options["activation"], "activation")
    check_layout("nf_resnet", options, input_shape)
    check_finite(options["alpha"], "model.nf_resnet.alpha")
