"""Residual nets without normalisation whose branches are switched off at the start: SkipInit.

De & Smith (2020), Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
Networks, NeurIPS, arXiv:2002.10444: SkipInit, for convolutional nets.
Bachlechner et al. (2020), ReZero is All You Need: Fast Convergence at Large Depth,
arXiv:2003.04887: the same scalar at 0, for dense nets and transformers, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import UserError, lookup
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


class Block(nn.Module):
    """shortcut(x) + alpha * branch(x), an activation in front of each convolution of the branch.

    ``alpha`` is one learnable number. Where the shape changes, the shortcut starts behind the first
    activation, which it shares with the branch (as in `resnet.BlockV2`); elsewhere it is x itself.
    Convolutions of the branch have a bias.
    """

    parts: Parts
    convs: Sequence[Conv]
    shortcut: str
    alpha: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        y = p.act(x)
        if changes_shape(x, self.convs):
            x = resample(p, y, self.convs, self.shortcut)
        for i, conv in enumerate(self.convs, 1):
            if i > 1:
                y = p.act(y)
            y = p.conv(y, *conv, name=f"conv{i}", bias=True)
        alpha = self.param("alpha", nn.initializers.constant(self.alpha), (), jnp.float32)
        return x + alpha.astype(y.dtype) * y


class Stem(nn.Module):
    """Convolutions with biases and an activation between them; then max-pooling."""

    parts: Parts
    convs: Sequence[Conv]
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        for i, conv in enumerate(self.convs, 1):
            x = p.conv(x if i == 1 else p.act(x), *conv, name=f"conv{i}", bias=True)
        return max_pool(x, 3) if self.pool else x


class SkipInit(nn.Module):
    """ResNet v2 with a learnable scalar per branch in the place of normalisation: no norm sites.

    With alpha 0 every block whose shape does not change is the identity at the start, and what does
    change the shape is the shortcut alone. The gradient reaches a branch when its alpha has moved.
    De & Smith propose 0, or a small number such as 1 / sqrt(number of blocks).

    Families, stem and shortcuts are those of `resnet.ResNet`, and for one seed all kernels are
    bitwise its own. Initialisation: convolutions He normal (fan_out), head LeCun normal, biases 0.
    Weight decay spares biases and alphas by default.

    `norm` is ignored: `norm.kind` has to be "none".

    Attributes:
      num_classes: length of the logits.
      norm: ignored.
      dtype: of the convolutions; parameters and logits are float32.
      family: a key of FAMILIES.
      depth: see families.
      width: multiplies the features of every stage.
      stem: a key of STEMS, or "auto": that of the family.
      shortcut: where the shape changes; a key of SHORTCUTS, or "auto": that of the family.
      alpha: start of the scalar at the end of every branch.
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
    alpha: float = 0.0
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        p = Parts(NoNorm(), ACTIVATIONS[self.activation], "before_act", self.dtype)
        stem, stages = layout("skipinit", self.family, self.depth, self.width, self.stem)
        shortcut = auto(self.shortcut, FAMILIES[self.family].shortcut)
        block = partial(Block, p, shortcut=shortcut, alpha=self.alpha)
        x = Stem(p, stem.convs, stem.pool, name="stem")(x.astype(self.dtype))
        for i, stage in enumerate(stages, 1):
            x = Stage(block, stage, name=f"stage{i}")(x)
        return head(global_pool(p.act(x)), self.num_classes)


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no such net can have, and for images that are too small."""
    lookup(ACTIVATIONS, options["activation"], "activation")
    check_layout("skipinit", options, input_shape)
    if not 0 <= options["alpha"] < math.inf:
        raise UserError(
            f"model.skipinit.alpha is {options['alpha']}, but must be a finite number from 0 up; "
            "0.0 is the paper's"
        )
