"""Models: linen modules that get a constructor of norms and know nothing of what it makes.

To add one: a module whose fields are its options, a `check`, and one line in MODELS.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from bnresearch.errors import lookup
from bnresearch.models import mlp, plain, resnet
from bnresearch.models.blocks import ACTIVATIONS, PLACEMENTS

__all__ = ["ACTIVATIONS", "MODELS", "PLACEMENTS", "Entry", "options"]


class Entry(NamedTuple):
    """A model and what the rest of the house needs to know about it.

    Attributes:
      module: the class; called as ``module(num_classes, norm, dtype, **options)(x, train)`` with x
        ``[B, H, W, C]`` it gives float32 logits ``[B, num_classes]``.
      dense: it has no convolutions, so training may scan over steps (on CPU, convolutions inside
        ``lax.scan`` run several times slower).
      check: ``check(options, input_shape)`` raises UserError for options that cannot be, alone or
        with images of ``input_shape`` (H, W, C); needs every option to be there.
    """

    module: type[nn.Module]
    dense: bool
    check: Callable[[Mapping[str, Any], tuple[int, int, int]], None]


def options(name: str) -> dict[str, Any]:
    """The options of a model with their defaults: its fields, but for those all models have."""
    fields = dataclasses.fields(lookup(MODELS, name, "model").module)
    return {field.name: field.default for field in fields if field.name not in COMMON}


COMMON = ("num_classes", "norm", "dtype", "parent", "name")

MODELS = {
    "mlp": Entry(mlp.MLP, dense=True, check=mlp.check),
    "plain": Entry(plain.Plain, dense=False, check=plain.check),
    "resnet": Entry(resnet.ResNet, dense=False, check=resnet.check),
}
