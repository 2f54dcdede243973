"""Moments of several batches as one: exact for parts of any size."""

import numpy as np
import pytest

from bnresearch.norm import Stats
from bnresearch.pooled import distance, merged


def test_parts_of_any_size_merge_to_the_whole():
    x = np.random.default_rng(5).normal(size=(50, 3)) * 4 - 100
    parts = np.split(x, [1, 20, 20, 33])
    rows = [
        [p.mean(0) if len(p) else np.zeros(3) for p in parts],
        [p.var(0) if len(p) else np.zeros(3) for p in parts],
        [np.full(3, len(p)) for p in parts],
    ]
    whole = merged(rows)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.var, x.var(0), rtol=1e-12)
    assert (whole.values == 50).all()


def test_the_distance_is_how_far_the_normalised_input_moves():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2000, 4)) * [1, 2, 3, 0.5] + [0, 1, 2, 3]
    running = Stats(np.array([0.5, 1, 1, 3.2]), np.array([1, 9, 4, 0.25]))
    precise = Stats(x.mean(0), x.var(0))
    z, other = ((x - s.mean) / np.sqrt(s.var + 1e-5) for s in (precise, running))
    expected = pytest.approx(np.sqrt(((z - other) ** 2).mean()), rel=1e-4)
    assert distance(running, precise, 1e-5) == expected
    assert distance(precise, precise, 1e-5) == 0
    at_0, at_1 = (Stats(np.array([mean]), np.zeros(1)) for mean in (0.0, 1.0))
    assert distance(at_0, at_1, 0.01) == pytest.approx(10)
