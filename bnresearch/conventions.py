"""What other libraries mean by batch normalization, as presets of our options.

=========  ========  =====  ===================  ==========  ========  ==========  =========
library    decay     eps    running variance     variance    average   statistics  one value
=========  ========  =====  ===================  ==========  ========  ==========  =========
bnresearch 0.9       1e-5   biased               two_pass    ema       float32     error
torch      0.9       1e-5   unbiased             two_pass    ema       float32     error
flax       0.99      1e-5   biased               fast        ema       float32     beta
keras      0.99      1e-3   biased               two_pass    ema       float32     beta
haiku      (given)   1e-5   biased               fast        debiased  input       beta
onnx       0.9       1e-5   biased               two_pass    ema       float32     beta
=========  ========  =====  ===================  ==========  ========  ==========  =========

Sources: torch.nn.BatchNorm2d, flax.linen.BatchNorm, keras.layers.BatchNormalization,
haiku.BatchNorm (dm-haiku 0.0.17), ONNX operator BatchNormalization, opset 15.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bnresearch.errors import UserError, lookup


class Preset(NamedTuple):
    """The options a library's defaults stand for, and what its ``momentum`` says about decay."""

    options: Mapping[str, Any]
    decay: Callable[[float], float]


def _same(momentum: float) -> float:
    return momentum


def _complement(momentum: float) -> float:
    return 1 - momentum


_OWN = dict(
    decay=0.9,
    epsilon=1e-5,
    correction=0,
    variance="two_pass",
    stat_dtype="float32",
    average="ema",
    on_single="error",
)

PRESETS = {
    "bnresearch": Preset(_OWN, _same),
    "torch": Preset(_OWN | dict(correction=1), _complement),
    "flax": Preset(_OWN | dict(decay=0.99, variance="fast", on_single="beta"), _same),
    "keras": Preset(_OWN | dict(decay=0.99, epsilon=1e-3, on_single="beta"), _same),
    # haiku makes its users choose the decay.
    "haiku": Preset(
        {name: value for name, value in _OWN.items() if name != "decay"}
        | dict(variance="fast", stat_dtype="input", average="debiased", on_single="beta"),
        _same,
    ),
    "onnx": Preset(_OWN | dict(on_single="beta"), _same),
}

CONVENTIONS = tuple(_OWN)


def has_conventions(defaults: Mapping[str, Any]) -> bool:
    """Whether a kind with these options can be given a preset."""
    return all(name in defaults for name in CONVENTIONS)


def complete(kind: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a kind, from the few that are given.

    What is given wins over the preset, the preset over the kind's own defaults. For kinds with all
    of CONVENTIONS two more are understood: ``preset``, a key of PRESETS, and with it ``momentum``
    in the meaning of that library. Arrays (traced numbers) are taken as they are.

    Raises:
      UserError: an option the kind does not have; a value of the wrong type or out of range; an
        unknown preset; ``momentum`` without preset, or beside ``decay``.
    """
    given = dict(given)
    options = dict(defaults)
    if has_conventions(defaults):
        options |= _preset(kind, given)
    for name in given:
        if name == "momentum" and "decay" in defaults:
            raise UserError(momentum_message(kind, given[name], has_conventions(defaults)))
        if name not in defaults:
            raise UserError(
                f"norm kind {kind!r} has no option {name!r}; "
                f"it has: {', '.join(defaults) or 'none'}"
            )
    options |= given
    return {name: _checked(kind, name, options[name], defaults[name]) for name in defaults}


def _checked(kind: str, name: str, value: Any, default: Any) -> Any:
    """The value, a float where the default is one, if it can be a value of this option."""
    key = f"norm.{kind}.{name}"
    if hasattr(value, "dtype"):
        return value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(
            f"{key}={value!r} is of type {type(value).__name__}, not {type(default).__name__}; "
            f"give a value such as {name}={default}"
        )
    if isinstance(value, float) and not 0 <= value < math.inf:
        raise UserError(f"{key}={value} is out of range; give a finite number, 0 or more")
    if name.endswith("decay") and not value <= 1:
        raise UserError(f"{key}={value} is out of range; give one in [0, 1]")
    if name == "correction" and value not in (0, 1):
        raise UserError(
            f"unknown {key} {value!r}; choose one of: 0, 1 (a biased or an unbiased running "
            "variance)"
        )
    if type(value) is int and value < 0:
        raise UserError(f"{key}={value} is negative; give 0 or more")
    return value


def _preset(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the preset; takes ``preset`` and ``momentum`` out of ``given``."""
    name = given.pop("preset", "bnresearch")
    preset = lookup(PRESETS, name, f"norm.{kind}.preset")
    if name == "bnresearch":
        return {}
    options = dict(preset.options)
    if "momentum" in given:
        if "decay" in given:
            raise UserError(
                f"norm.{kind}.decay={given['decay']} and momentum={given['momentum']} say the same "
                "thing twice; give one of them"
            )
        options["decay"] = preset.decay(_momentum(kind, given.pop("momentum")))
    if "decay" not in options and "decay" not in given:
        raise UserError(
            f"{name} has no default decay; give norm.{kind}.decay, such as norm.{kind}.decay=0.99"
        )
    return options


def _momentum(kind: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UserError(f"norm.{kind}.momentum={value!r} is out of range; give a number in [0, 1]")
    return value


def momentum_message(kind: str, value: Any, has_presets: bool) -> str:
    """Why ``momentum`` is refused, with its translations."""
    try:
        torch = f"{1 - float(value):.12g}"
    except (TypeError, ValueError):
        torch = f"1 - {value}"
    preset = f", or name the library: norm.{kind}.preset=torch" if has_presets else ""
    return (
        f"norm.{kind}.momentum={value} can mean two things; write norm.{kind}.decay={value} for "
        f"what flax, keras, haiku and ONNX mean, norm.{kind}.decay={torch} for what torch means"
        f"{preset}"
    )
