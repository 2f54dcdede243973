"""Models: linen modules that get a constructor of norms and know nothing of what it makes.

To add one: a module whose fields are its options, a `check`, and one line in MODELS.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from bnresearch.errors import UserError, lookup
from bnresearch.models import fixup, mlp, nf_resnet, plain, resnet, skipinit
from bnresearch.models.blocks import ACTIVATIONS, PLACEMENTS

__all__ = ["ACTIVATIONS", "MODELS", "PLACEMENTS", "Entry", "check_arm", "options"]


class Entry(NamedTuple):
    """A model and what the rest of the house needs to know about it.

    Attributes:
      module: the class; called as ``module(num_classes, norm, dtype, **options)(x, train)`` with x
        ``[B, H, W, C]`` it gives float32 logits ``[B, num_classes]``.
      dense: it has no convolutions, so training may scan over steps (on CPU, convolutions inside
        ``lax.scan`` run several times slower).
      check: ``check(options, input_shape)`` raises UserError for options that cannot be, alone or
        with images of ``input_shape`` (H, W, C); needs every option to be there.
      sites: it calls ``norm``. A model without sites takes no kind but "none".
      own_start: the start of its parameters is what makes the method: no other initialiser.
    """

    module: type[nn.Module]
    dense: bool
    check: Callable[[Mapping[str, Any], tuple[int, int, int]], None]
    sites: bool = True
    own_start: bool = False


def options(name: str) -> dict[str, Any]:
    """The options of a model with their defaults: its fields, but for those all models have."""
    fields = dataclasses.fields(lookup(MODELS, name, "model").module)
    return {field.name: field.default for field in fields if field.name not in COMMON}


def check_arm(name: str, kind: str, weights: str, init: str) -> None:
    """Raises UserError for a norm or an initialiser that the model would ignore or be broken by.

    Args:
      name: a key of MODELS.
      kind: of ``norm.kind``.
      weights: of ``norm.weights``.
      init: of ``init.name``.
    """
    entry = lookup(MODELS, name, "model")
    if kind != "none" and not entry.sites:
        raise UserError(
            f"norm.kind={kind}, but model {name} has no norms: nothing would be normalised; choose "
            "norm.kind=none, or model.name=resnet for a residual net with norms"
        )
    if weights not in ("auto", "none") and not entry.sites:
        raise UserError(
            f"norm.weights={weights}, but model {name} takes nothing from norm and would leave its "
            "kernels as they are; choose norm.weights=auto, or model.name=resnet"
        )
    if init != "he" and entry.own_start:
        raise UserError(
            f"init.name={init} would replace the start that model {name} is made of; choose "
            "init.name=he, which leaves every model its own"
        )


COMMON = ("num_classes", "norm", "dtype", "parent", "name")

MODELS = {
    "mlp": Entry(mlp.MLP, dense=True, check=mlp.check),
    "plain": Entry(plain.Plain, dense=False, check=plain.check),
    "resnet": Entry(resnet.ResNet, dense=False, check=resnet.check),
    "fixup": Entry(fixup.Fixup, False, fixup.check, sites=False, own_start=True),
    "skipinit": Entry(skipinit.SkipInit, False, skipinit.check, sites=False),
    "nf_resnet": Entry(nf_resnet.NFResNet, False, nf_resnet.check, sites=False, own_start=True),
}
