"""A multi-layer perceptron: the net of Ioffe & Szegedy (2015), section 4.1, at its defaults."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import UserError
from bnresearch.models.blocks import check_positive, check_style, head, parts


class MLP(nn.Module):
    """Hidden layers of dense, norm, activation; then a dense head.

    ``before_act``: dense without bias -> norm -> activation.
    ``after_act``:  dense with bias -> activation -> norm.

    Dropout comes last in a layer, behind both, so that no norm sees dropped inputs directly (the
    variance shift of Li et al., 2019); its randomness is the rng collection ``dropout``.

    Initialisation: hidden kernels He normal (fan_in), head LeCun normal, biases 0.

    Attributes:
      num_classes: length of the logits.
      norm: constructor of norm modules, see `blocks.Parts`.
      dtype: of the computation in hidden layers; parameters and logits are float32.
      widths: of the hidden layers; its length is the depth. () is softmax regression.
      activation: a key of ACTIVATIONS.
      dropout: probability of zeroing a unit, in [0, 1).
      placement: a key of PLACEMENTS.
    """

    num_classes: int
    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    widths: tuple[int, ...] = (100, 100, 100)
    activation: str = "relu"
    dropout: float = 0.0
    placement: str = "before_act"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        p = parts(self)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, width in enumerate(self.widths, 1):
            x = p.norm_act(p.dense(x, width, f"dense{i}"), f"norm{i}")
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return head(x, self.num_classes)


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no MLP can have; any image size will do."""
    check_style(options)
    check_positive(options["widths"], "model.mlp.widths")
    if not 0 <= options["dropout"] < 1:
        raise UserError(
            f"model.mlp.dropout is {options['dropout']}, but is the probability of zeroing a unit "
            "and must be at least 0 and below 1; 0 switches it off"
        )
