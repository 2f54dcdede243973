"""A plain convolutional net without skips, in the manner of VGG (Simonyan & Zisserman, 2015)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import UserError
from bnresearch.models.blocks import (
    Parts,
    check_image,
    check_positive,
    check_style,
    global_pool,
    head,
    max_pool,
    parts,
)


class Stage(nn.Module):
    """``convs`` times a 3x3 convolution of ``width`` features with its norm and activation."""

    parts: Parts
    width: int
    convs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        for i in range(1, self.convs + 1):
            x = p.conv(x, self.width, 3, 1, f"conv{i}", bias=p.linear_bias)
            x = p.norm_act(x, f"norm{i}")
        return x


class Plain(nn.Module):
    """Stages of 3x3 convolutions with 2x2 max-pooling between, global mean, head.

    ``before_act``: conv without bias -> norm -> activation.
    ``after_act``:  conv with bias -> activation -> norm.

    VGG-16 is widths (64, 128, 256, 512, 512) with convs (2, 2, 3, 3, 3), but for its three dense
    layers, for which the global mean stands here. Max-pooling drops an odd last row and column.

    Initialisation: convolutions He normal (fan_out), head LeCun normal, biases 0.

    Attributes:
      num_classes: length of the logits.
      norm: constructor of norm modules, see `blocks.Parts`.
      dtype: of the convolutions; parameters and logits are float32.
      widths: features of each stage.
      convs: convolutions in each stage, as many numbers as widths.
      activation: a key of ACTIVATIONS.
      placement: a key of PLACEMENTS.
    """

    num_classes: int
    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    widths: tuple[int, ...] = (32, 64, 128)
    convs: tuple[int, ...] = (2, 2, 2)
    activation: str = "relu"
    placement: str = "before_act"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        p = parts(self)
        x = x.astype(self.dtype)
        for i, (width, convs) in enumerate(zip(self.widths, self.convs, strict=True), 1):
            if i > 1:
                x = max_pool(x, 2)
            x = Stage(p, width, convs, name=f"stage{i}")(x)
        return head(global_pool(x), self.num_classes)


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no plain net can have, and for images too small to pool."""
    check_style(options)
    widths, convs = options["widths"], options["convs"]
    check_positive(widths, "model.plain.widths")
    check_positive(convs, "model.plain.convs")
    if not widths or len(widths) != len(convs):
        raise UserError(
            f"model.plain.widths {tuple(widths)} names {len(widths)} stages and model.plain.convs "
            f"{tuple(convs)} names {len(convs)}; give one number per stage in both, at least one"
        )
    check_image(input_shape, len(widths) - 1, "take fewer stages")
