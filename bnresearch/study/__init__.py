"""A study: a question, its arms and axes, and the claims that its runs decide. One file each.

A study file has a docstring (its first line is the title) and a ``get_study()`` that returns a
`Study`; all that such a file needs can be imported from here. `load` reads it, `plan` checks it and
lists its runs, `describe` writes down what is to be found out before the first of them.

    parts.py       what a study is made of
    axes.py        grid, log_range, zipped, random, settings
    planning.py    load, plan, describe
    subjects.py    what arms and axes change: a config, or the arguments of a function
    checks.py, claim_checks.py   what is refused
"""

from bnresearch.claims import (
    Difference,
    Equivalence,
    Measure,
    Ordering,
    Slope,
    Value,
    area,
    best,
    computed,
    final,
    largest_usable,
    steps_to,
)
from bnresearch.study.axes import (
    Axis,
    Point,
    choice,
    grid,
    log_range,
    log_uniform,
    random,
    settings,
    uniform,
    zipped,
)
from bnresearch.study.parts import (
    Arm,
    Scale,
    Study,
    Tune,
)
from bnresearch.study.planning import (
    Plan,
    PlannedRun,
    count,
    describe,
    load,
    plan,
)

__all__ = [
    "Arm",
    "Axis",
    "Difference",
    "Equivalence",
    "Measure",
    "Ordering",
    "Plan",
    "PlannedRun",
    "Point",
    "Scale",
    "Slope",
    "Study",
    "Tune",
    "Value",
    "area",
    "best",
    "choice",
    "computed",
    "count",
    "describe",
    "final",
    "grid",
    "largest_usable",
    "load",
    "log_range",
    "log_uniform",
    "plan",
    "random",
    "settings",
    "steps_to",
    "uniform",
    "zipped",
]
