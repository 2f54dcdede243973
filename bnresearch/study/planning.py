"""From a study file to a checked plan of runs, and to what study.json says before the first."""

import json
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnresearch import config_file, provenance
from bnresearch.claims import (
    SCHEMA,
    Claim,
    Slope,
    to_json,
)
from bnresearch.errors import UserError
from bnresearch.rundir import config_hash
from bnresearch.study import checks, claim_checks
from bnresearch.study.axes import (
    Axis,
)
from bnresearch.study.parts import Arm, Cell, Extent, Study, at_scale
from bnresearch.study.subjects import Measuring, Settled, Subject, Training

LIMIT = 10_000  # runs that nobody asks for by accident


def load(path: str | Path) -> Study:
    """The study in a file.

    Raises:
      UserError: no such file, a syntax error, no ``get_study``, whatever it raises, or no Study.
    """
    name = str(path)
    module = config_file.execute(name, "study file", "list studies")
    if not callable(getattr(module, "get_study", None)):
        raise UserError(
            f"study file {name!r} has no get_study() function; it must return a Study, see "
            "docs/own_study.md"
        )
    with config_file.failures_explained(name, "study file"):
        study = module.get_study()
    if not isinstance(study, Study):
        raise UserError(
            f"get_study() in study file {name!r} returns a {type(study).__name__}, not a "
            "bnresearch.study.Study; see docs/own_study.md"
        )
    return study


class PlannedRun(NamedTuple):
    """One place of a study: an arm, a point and a pair.

    Attributes:
      id: name of the run folder. Cells whose configs are the same have the same id and share one
        run: an axis may not matter to an arm.
      arm: a name.
      point: value by axis.
      seed: the pair: 0, 1, ...; the config's seed is this plus the arm's first_seed.
      resolved: the content of config.json. Runs share its parts: not to be changed.
      program: runs with equal ones share a compilation; "" for functions.
    """

    id: str
    arm: str
    point: dict[str, Any]
    seed: int
    resolved: dict[str, Any]
    program: str


class Plan(NamedTuple):
    """A study at one scale, checked: what is going to run.

    Attributes:
      name: of the study: its file's, without folder and suffix.
      file: as it was given.
      scale: a key of the study's scales.
      overrides: what all runs have in common on top of the base.
      arms, axes, seeds: of this scale; seeds are the pairs.
      runs: every place, arm by arm and point by point.
      notes: what a user should know before they start, in sentences.
    """

    study: Study
    name: str
    file: str
    scale: str
    overrides: dict[str, Any]
    arms: dict[str, Arm]
    axes: dict[str, Axis]
    seeds: range
    runs: list[PlannedRun]
    notes: list[str]


def count(study: Study, scale: str, seeds: int | None = None) -> int:
    """How many places a study has at a scale: its runs, and more where places share one."""
    checks.check_parts(study)
    return at_scale(study, scale, seeds).size


def plan(
    study: Study,
    file: str | Path,
    scale: str,
    *,
    seeds: int | None = None,
    confirmed: bool = False,
) -> Plan:
    """Checks a study and lists its runs. Compiles nothing and writes nothing.

    Args:
      file: where the study came from; its base is looked for from there.
      scale: "smoke", "quick" or "full".
      seeds: instead of the scale's.
      confirmed: more than LIMIT runs are meant.

    Raises:
      UserError: whatever is wrong with the study, in words.
    """
    checks.check_parts(study)
    extent = at_scale(study, scale, seeds)
    if extent.size > LIMIT and not confirmed:
        raise UserError(
            f"scale {scale} asks for {extent.size:,} runs, more than {LIMIT:,}; take fewer values, "
            "arms or seeds, or confirm them with --yes"
        )
    subject = _subject(study, file)
    for name in study.scales:
        checks.check_claims(study, name, seeds if name == scale else None)
    checks.check_overlaps(extent)
    settled = _settle(study, extent, subject)
    checks.check_arms_differ(extent, subject, settled)
    checks.check_axes_matter(extent, settled)
    checks.check_metrics(study, subject, settled)
    runs = [run for cell in settled for run in _runs(extent, cell, settled[cell])]
    few = claim_checks.notes(study.claims, len(extent.seeds)) if scale != "smoke" else []
    name = Path(file).stem
    return Plan(study, name, str(file), scale, extent.overrides, *extent[:3], runs, few)


# ---- From cells to runs


def _subject(study: Study, file: str | Path) -> Subject:
    if study.function is not None:
        return Measuring(study.function)
    return Training(_base(study, file))


def _base(study: Study, file: str | Path) -> str:
    return os.path.relpath(Path(file).parent / str(study.base))


def _settle(study: Study, extent: Extent, subject: Subject) -> dict[Cell, Settled]:
    """Every cell's config, but for the seed: made once, whatever the number of seeds."""
    with _blamed("overrides of the study"):
        subject.check_keys(extent.overrides)
    for name, arm in extent.arms.items():
        with _blamed(f"arm {name!r}"):
            subject.check_keys(arm.overrides)
    for name, axis in extent.axes.items():
        with _blamed(f"axis {name!r}"):
            subject.check_keys(dict.fromkeys(axis.keys))
    settled = {}
    for cell, overrides in extent.cells():
        named = zip(extent.axes, cell[1], strict=True)
        where = [f"arm {cell[0]!r}", *(f"{axis}={value!r}" for axis, value in named)]
        with _blamed(", ".join(where)):
            together = dict(extent.overrides)
            for given in overrides:
                together |= given
            settled[cell] = subject.settle(together)
    return settled


class _blamed:
    """A UserError in its block says where the fault is."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self._where}: {error}") from error


def _runs(extent: Extent, cell: Cell, settled: Settled) -> Iterator[PlannedRun]:
    arm, values = cell
    point = dict(zip(extent.axes, values, strict=True))
    for pair in extent.seeds:
        resolved = {**settled.resolved, "seed": extent.arms[arm].first_seed + pair}
        name = config_hash(resolved)[:16]
        yield PlannedRun(name, arm, point, pair, resolved, settled.program)


# ---- study.json


def describe(plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """What study.json holds before the first run: the definition and the plan.

    "device", "finished", "seconds" and "verdicts" are None and "computed" is empty: for whoever
    runs it to fill in. (To ask for the device here would start jax in the process that hands out
    the runs, too.)
    """
    study = plan.study
    title, _, about = config_file.docstring(plan.file).partition("\n")
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "file": plan.file,
        "title": title or study.question,
        "about": about.strip("\n"),  # an indented first line is code
        "question": study.question,
        "source": study.source,
        "prediction": study.prediction,
        "base": study.base and _base(study, plan.file),
        "overrides": _plain(plan.overrides),
        "scale": plan.scale,
        "may_conclude": plan.scale != "smoke",
        "arms": {name: _arm_json(arm) for name, arm in plan.arms.items()},
        "axes": {name: _axis_json(name, axis) for name, axis in plan.axes.items()},
        "tune": _tune_json(study),
        "measures": {name: to_json(measure) for name, measure in study.measures.items()},
        "claims": [_claim_json(claim, plan) for claim in study.claims],
        "seeds": list(plan.seeds),
        "runs": [
            {"id": run.id, "arm": run.arm, "point": run.point, "seed": run.seed}
            for run in plan.runs
        ],
        "computed": {},
        "command": list(command),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "device": None,
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "finished": None,
        "seconds": None,
        "verdicts": None,
    }


def _plain(value: Any) -> Any:
    """As it will be read back: tuples as lists, numpy's numbers as Python's."""
    return json.loads(json.dumps(value, default=_python))


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else dict(value)


def _arm_json(arm: Arm) -> dict[str, Any]:
    plain = {"label": arm.label, "overrides": _plain(arm.overrides)}
    return {**plain, "first_seed": arm.first_seed}


def _axis_json(name: str, axis: Axis) -> dict[str, Any]:
    label = axis.label or name
    return {"values": axis.values, "keys": axis.keys, "log": axis.log, "label": label}


def _tune_json(study: Study) -> dict[str, Any] | None:
    if study.tune is None:
        return None
    return {"axis": study.tune.axis, "measure": to_json(checks.tuning_measure(study))}


def _claim_json(claim: Claim, plan: Plan) -> dict[str, Any]:
    """A claim with what goes without saying: the value of an axis that has only one, and, where
    ratios are compared, the factor 1 for no smallest effect of interest."""
    plain = _plain(to_json(claim))
    measure = plan.study.measures[claim.measure]
    tuned = plan.study.tune.axis if plan.study.tune else None
    given = {
        name for side in claim_checks.sides(claim) if not isinstance(side, str) for name in side
    }
    free = claim_checks.free_axes(claim, measure, tuned)
    for name, axis in plan.axes.items():
        if len(axis.points) == 1 and name not in (*given, *free):
            plain["where"] = {name: axis.values[0]} | plain["where"]
    if measure.log and not isinstance(claim, Slope) and plain.get("sesoi") == 0:
        plain["sesoi"] = 1.0
    return plain
