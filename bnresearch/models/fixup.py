"""Residual nets without normalisation that train from a rescaled start: Fixup.

Zhang, Dauphin & Ma (2019), Fixup Initialization: Residual Learning Without Normalization, ICLR,
arXiv:1901.09321.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import lookup
from bnresearch.models.blocks import ACTIVATIONS, NoNorm, Parts, global_pool, head, max_pool
from bnresearch.models.resnet import (
    FAMILIES,
    Conv,
    Stage,
    auto,
    changes_shape,
    check_layout,
    layout,
    resample,
)

ZEROS = nn.initializers.zeros


class Block(nn.Module):
    """act(shortcut(x) + branch(x)), with a bias in front of everything that is not linear.

    Convolution i of the m in the branch reads ``y + bias{i}a``; behind it comes ``bias{i}b`` and
    the activation, behind the last one ``scale`` and ``bias{m}b``. All of these are single numbers:
    biases start at 0, the scale at 1. The last convolution starts at 0, the ones before it at He's
    start times ``branches ** (-1 / (2m - 2))``. Where the shape changes, the shortcut reads what
    the first convolution reads.
    """

    parts: Parts
    convs: Sequence[Conv]
    branches: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p, end = self.parts, len(self.convs)
        y = shifted = self._bias(x, "bias1a")
        for i, conv in enumerate(self.convs, 1):
            if i > 1:
                y = self._bias(y, f"bias{i}a")
            init = first_inits(end, self.branches) if i < end else ZEROS
            y = p.conv(y, *conv, name=f"conv{i}", init=init)
            if i < end:
                y = p.act(self._bias(y, f"bias{i}b"))
        y = y * self.param("scale", nn.initializers.ones, (), jnp.float32).astype(y.dtype)
        y = self._bias(y, f"bias{end}b")
        if changes_shape(x, self.convs):
            x = resample(p, shifted, self.convs, self.shortcut)
        return p.act(x + y)

    def _bias(self, x: jax.Array, name: str) -> jax.Array:
        return x + self.param(name, ZEROS, (), jnp.float32).astype(x.dtype)


def first_inits(convs: int, branches: int) -> Callable[..., jax.Array]:
    """He normal (fan_out) times ``branches ** (-1 / (2 * convs - 2))``: how much one step of SGD
    changes the output of the net then does not grow with the number of branches."""
    return nn.initializers.variance_scaling(
        2.0 * branches ** (-1 / (convs - 1)), "fan_out", "normal"
    )


class Fixup(nn.Module):
    """ResNet v1 with the rules of Fixup in the place of normalisation: no norm sites.

    1. The head and the last convolution of every branch start at 0.
    2. The other convolutions of a branch of m start at He's start times L^(-1 / (2m - 2)), with L
       the number of branches in the net.
    3. Every branch has a scalar multiplier, and a scalar bias in front of every convolution, of the
       head and of every activation (see `Block`).

    So the logits are exactly 0 at the start. With relu every block with an unchanged shape starts
    as the identity, because what it reads is never negative; rule 2 is derived for relu.

    Families, stem and shortcuts are those of `resnet.ResNet`; the draws of its kernels, too. Family
    cifar with depth 20, 32, 44, 56, 110 are the nets of the published code.

    The published training code takes a tenth of the learning rate for the scalars. Weight decay
    spares them by default, as it does biases. `norm` is ignored: `norm.kind` has to be "none", and
    `init.name` "he", because the start is what makes the method.

    Attributes:
      num_classes: length of the logits.
      norm: ignored.
      dtype: of the convolutions; parameters and logits are float32.
      family: a key of FAMILIES.
      depth: see families.
      width: multiplies the features of every stage.
      stem: a key of STEMS, or "auto": that of the family.
      shortcut: where the shape changes; a key of SHORTCUTS, or "auto": that of the family.
      activation: a key of ACTIVATIONS.
    """

    num_classes: int
    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    family: str = "cifar"
    depth: int = 20
    width: float = 1.0
    stem: str = "auto"
    shortcut: str = "auto"
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        p = Parts(NoNorm(), ACTIVATIONS[self.activation], "before_act", self.dtype)
        stem, stages = layout("fixup", self.family, self.depth, self.width, self.stem)
        shortcut = auto(self.shortcut, FAMILIES[self.family].shortcut)
        branches = sum(len(stage) for stage in stages)
        block = partial(Block, p, branches=branches, shortcut=shortcut)
        x = Stem(p, stem.convs, stem.pool, name="stem")(x.astype(self.dtype))
        for i, stage in enumerate(stages, 1):
            x = Stage(block, stage, name=f"stage{i}")(x)
        x = global_pool(x) + self.param("bias", ZEROS, (), jnp.float32)
        return head(x, self.num_classes, ZEROS)


class Stem(nn.Module):
    """Convolutions, each with a scalar bias and the activation behind it; then max-pooling."""

    parts: Parts
    convs: Sequence[Conv]
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        for i, conv in enumerate(self.convs, 1):
            x = p.conv(x, *conv, name=f"conv{i}")
            x = p.act(x + self.param(f"bias{i}", ZEROS, (), jnp.float32).astype(x.dtype))
        return max_pool(x, 3) if self.pool else x


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no Fixup net can have, and for images that are too small."""
    lookup(ACTIVATIONS, options["activation"], "activation")
    check_layout("fixup", options, input_shape)
