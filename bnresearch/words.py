"""Numbers as a reader wants them: few digits, real minus signs, a dash for what is not there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"


def number(value: Any, digits: int = 3) -> str:
    """``value`` to so many significant digits, whole numbers whole: 97.1, 0.00312, 1240, −3."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NOTHING if value is None else str(value)
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        text = f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e-")
    else:
        after = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{value:.{after}f}"
        text = text.rstrip("0").rstrip(".") if isinstance(value, int) else text
    return text.replace("-", "−")


def signed(value: Any) -> str:
    """A difference: with its sign."""
    text = number(value)
    return f"+{text}" if isinstance(value, int | float) and value > 0 else text


def together(values: Sequence[float], sign: bool = False) -> list[str]:
    """An estimate and its interval, all to the decimals that the interval's width is worth: its
    first two digits, three where it begins with 1 or 2. ``sign``: differences, with a sign."""
    there = [value for value in values if math.isfinite(value)]
    width = max(there, default=0.0) - min(there, default=0.0)
    if not 1e-4 < width < 1e6:
        texts = [number(value) for value in values]
    else:
        after = max(0, 1 - math.floor(math.log10(width / 3)))
        texts = [
            f"{value:.{after}f}".replace("-", "−") if math.isfinite(value) else number(value)
            for value in values
        ]
    return [
        f"+{text}" if sign and value > 0 else text
        for text, value in zip(texts, values, strict=True)
    ]


def setting(value: Any) -> str:
    """The value of an axis, to four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:g}"


def chance(p: Any) -> str:
    """A p-value with its relation: "= 0.013", "< 0.001"."""
    if not isinstance(p, int | float) or math.isnan(p):
        return f"= {NOTHING}"
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def count(number: int, noun: str) -> str:
    """A number of things: "1 seed", "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def amount(value: Any, unit: str) -> str:
    """A number with its unit: "97.1 %"."""
    return with_unit(number(value), unit)


def with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}".rstrip()


def point(place: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A place on the axes: "learning rate 0.1, batch size 4"."""
    return ", ".join(f"{labels.get(name, name)} {setting(value)}" for name, value in place.items())


def duration(seconds: Any) -> str:
    """A time in the unit that fits: "2.1 s", "4 min 10 s", "3 h 5 min"."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
