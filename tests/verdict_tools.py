"""Values as `measures.values` gives them, made from plain numbers; imports no jax."""

import gc

import numpy as np
import pandas as pd
import pytest

from bnresearch import claims, verdict
from bnresearch.measures import Tuning


@pytest.fixture(autouse=True)
def light_garbage():
    """statsmodels' multipletests collects garbage each time: beside jax, 100 ms and more."""
    gc.freeze()
    yield
    gc.unfreeze()


def at(arm, **point):
    """A place on the axes, as a key for `frame`."""
    return arm, tuple(point.items())


def frame(arms, **lost):
    """A frame of ``{arm: values by seed}``, or ``{at(arm, axis=value): values}``.

    NaN is a run that diverged; ``lost=...`` names another status. A value is a number or a pair
    (number, censored).
    """
    rows = []
    for place, values in arms.items():
        arm, point = place if isinstance(place, tuple) else at(place)
        point = dict(point)
        for seed, value in enumerate(values):
            value, censored = value if isinstance(value, tuple) else (value, 0)
            status = lost.get("lost", "diverged") if value != value else "done"
            name = "-".join([arm, *map(str, point.values()), str(seed)])
            rows.append((arm, *point.values(), seed, float(value), censored, status, name))
    axes = list(point)
    return pd.DataFrame(rows, columns=["arm", *axes, "seed", "value", "censored", "status", "id"])


def decide(written, arms, measure="accuracy", tuning=None, **options):
    """The verdicts on claims about one measure, of `frame`'s arms."""
    made = claims.final("accuracy", **options.pop("given", {}))
    values = arms if isinstance(arms, pd.DataFrame) else frame(arms, **options)
    return verdict.decide(written, {measure: values}, tuning, {measure: made})


def one(claim, arms, **options):
    """The verdict on a single claim."""
    return decide([claim], arms, **options)[0]


def difference(treatment="a", control="b", measure="accuracy", **fields):
    return claims.Difference(treatment=treatment, control=control, measure=measure, **fields)


def equivalence(margin, treatment="a", control="b", measure="accuracy", **fields):
    return claims.Equivalence(
        treatment=treatment, control=control, measure=measure, margin=margin, **fields
    )


def ordering(arms, **fields):
    return claims.Ordering(arms=arms, measure="accuracy", **fields)


def value(expected, tolerance, arm="a", **fields):
    return claims.Value(
        arm=arm, measure="accuracy", expected=expected, tolerance=tolerance, **fields
    )


def slope(**fields):
    return claims.Slope(**{"arm": "a", "axis": "x", "measure": "accuracy", **fields})


def exactly(mean, sd, n=10):
    """n numbers with just this mean and sd, not symmetric."""
    x = np.linspace(-1, 1, n) ** 3 + 0.1 * np.linspace(-1, 1, n) ** 2
    return mean + sd * (x - x.mean()) / x.std(ddof=1)


def tuned(axis, best, others=()):
    """A tuning that chose ``{arm: value}``, or ``{(arm, values of the others): value}``."""
    rows = []
    for place, value in best.items():
        place = place if isinstance(place, tuple) else (place,)
        rows.append(dict(zip(["arm", *others], place, strict=True)) | {axis: value, "chosen": True})
    return Tuning(axis, claims.final("accuracy", "validation"), pd.DataFrame(rows))
