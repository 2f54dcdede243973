"""The axes of a study: their values, and what each of them changes."""

import numpy as np
import pytest

from bnresearch.study import axes, grid, log_range, settings, zipped


@pytest.mark.parametrize(
    ("axis", "points"),
    [
        (grid("a", [1, 2.5, "x"]), [(1, {"a": 1}), (2.5, {"a": 2.5}), ("x", {"a": "x"})]),
        (grid("a", np.array([3, 4])), [(3, {"a": 3}), (4, {"a": 4})]),
        (log_range("a", 0.01, 1, 3), [(0.01, {"a": 0.01}), (0.1, {"a": 0.1}), (1, {"a": 1})]),
        (zipped({"a": [1, 2], "b": [3, 4]}), [(1, {"a": 1, "b": 3}), (2, {"a": 2, "b": 4})]),
        (
            zipped({"a": [1, 2], "b": [3, 4]}, names=["low", "high"]),
            [("low", {"a": 1, "b": 3}), ("high", {"a": 2, "b": 4})],
        ),
        (settings({"p": {"a": 1}, "q": {"b": (2, 3)}}), [("p", {"a": 1}), ("q", {"b": (2, 3)})]),
    ],
)
def test_an_axis_has_these_points(axis, points):
    assert [tuple(point) for point in axis.points] == points


def test_a_log_range_has_equal_ratios_to_four_digits():
    axis = log_range("a", 0.003, 3, 7)
    assert axis.values == [0.003, 0.009487, 0.03, 0.09487, 0.3, 0.9487, 3.0]
    assert axis.log and not grid("a", [1, 10]).log


def test_random_settings():
    keys = {"a": axes.log_uniform(0.01, 1), "b": axes.choice((16, "x")), "c": axes.uniform(-1, 1)}
    few, many = (axes.random(keys, n, seed=5) for n in (3, 400))
    assert few.points == many.points[:3]
    assert axes.random(keys, 3, seed=6).points != few.points
    assert many.values == list(range(400))
    assert many.keys == ["a", "b", "c"]
    drawn = {key: [point.overrides[key] for point in many.points] for key in keys}
    # Medians of 400: the standard error of log10(a), uniform over two decades, is below 0.06.
    assert abs(np.median(np.log10(drawn["a"])) + 1) < 0.2
    assert min(drawn["a"]) >= 0.01 and max(drawn["a"]) <= 1
    assert abs(np.median(drawn["c"])) < 0.2
    assert 140 < drawn["b"].count(16) == 400 - drawn["b"].count("x") < 260


def test_an_axis_has_room_for_many_values():
    assert len(grid("a", range(20_000)).points) == 20_000


def test_random_values_of_one_key_are_called_by_their_values():
    axis = axes.random({"a": axes.uniform(0, 1)}, 5)
    assert axis.values == [point.overrides["a"] for point in axis.points]
