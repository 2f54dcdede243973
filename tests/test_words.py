"""Numbers as a reader wants them."""

import math

import pytest

from bnresearch import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (97.123, "97.1"), (0.0031249, "0.00312"), (1240.4, "1240"), (-3, "−3"), (0.0, "0"),
        (math.nan, "–"), (None, "–"), (-math.inf, "−∞"), (1.5e-7, "1.50e−7"), (12, "12"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert words.number(value) == text


def test_an_interval_has_the_digits_that_its_width_is_worth():
    assert words.together([2.3149, 1.9162, 2.7001]) == ["2.31", "1.92", "2.70"]
    assert words.together([0.7, 0.2, 1.2], sign=True) == ["+0.70", "+0.20", "+1.20"]
    assert words.together([-12.3, -30.0, 5.0]) == ["−12", "−30", "5"]
    assert words.together([3.0, math.nan, math.nan]) == ["3.00", "–", "–"]
    assert words.together([30.0, 10.0, math.inf]) == ["30.0", "10.0", "∞"]


def test_durations():
    shown = [words.duration(s) for s in (2.147, 250.4, 11_100, None)]
    assert shown == ["2.1 s", "4 min 10 s", "3 h 5 min", "–"]


def test_settings_are_short():
    assert [words.setting(v) for v in (0.00464159, 0.1, 512, 20000.0, "mlp", True)] == [
        *("0.004642", "0.1", "512", "20000", "mlp", "True"),
    ]
