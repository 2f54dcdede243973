"""A study folder as objects and pandas frames, read from its files alone.

    results = load_study("runs/usable_rates")
    results.runs                              # a row per run: arm, axes, seed, status, metrics
    results.curves("validation", "accuracy")  # long: arm, axes, seed, step, value
    results.values["accuracy"]                # a measure of the study, in its unit
    results.verdicts                          # one row per claim

A run folder that is not as a run leaves it is named in ``damaged`` with the reason, and left out of
all numbers. Imports no jax.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bnresearch import measures as measuring
from bnresearch import rundir
from bnresearch.claims import SCHEMA, Measure, claim_from_json, measure_from_json
from bnresearch.errors import UserError, lookup
from bnresearch.runs import LOOK, NO_CURVE, Run, read_run_or_damage

if TYPE_CHECKING:
    from bnresearch.verdict import Verdict

FILE = "study.json"
DEEPEST = 3  # folders below the given one in which studies are looked for
NUMBER = (int, float)
# What the parts of study.json have to be, as far as reading and reporting need it.
NEEDED: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "question", "scale", "source", "prediction", "about"), (str,)),
    **dict.fromkeys(("arms", "axes", "measures"), (dict,)),
    **dict.fromkeys(("claims", "runs"), (list,)),
    **dict.fromkeys(("tune", "computed"), (dict, type(None))),
    "verdicts": (list, type(None)),
}
ARM: Mapping[str, tuple[type, ...]] = {"overrides": (dict,), "label": (str,)}
AXIS: Mapping[str, tuple[type, ...]] = {"values": (list,), "keys": (list,), "label": (str,)}
MEASURE: Mapping[str, tuple[type, ...]] = {"label": (str,), "unit": (str,)}
EFFECT: Mapping[str, tuple[type, ...]] = dict.fromkeys(("estimate", "low", "high"), NUMBER)
VERDICT: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("text", "verdict", "reason", "interval", "unit", "of"), (str,)),
    **dict.fromkeys(("null", "boundary", "n", "censored", "p", "p_holm", "p_zero"), NUMBER),
    **dict.fromkeys(("claim", "missing", "at", "points"), (dict,)),
    **dict.fromkeys(("pairs", "same_rate", "runs"), (list,)),
    "n_needed": (*NUMBER, type(None)),
    "log": (bool,),
    **EFFECT,
}
VERDICTS = dict.fromkeys(("supported", "refuted", "inconclusive"))
# The fields of a verdict that fit into a cell.
IN_TABLE = (
    *("text", "verdict", "estimate", "low", "high", "interval", "of", "unit", "log", "n"),
    *("censored", "p", "p_holm", "p_zero", "n_needed", "boundary", "null", "reason"),
)


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """A study as its folder has it.

    Attributes:
      folder: the folder with study.json.
      definition: the content of study.json.
      records: the runs in the order of the plan, also those that are missing or damaged. A run that
        stands at several places is there for each of them.
      damaged: {run id: what is wrong with its folder}.
    """

    folder: Path
    definition: Mapping[str, Any]
    records: Sequence[Run]
    damaged: Mapping[str, str]

    @property
    def axes(self) -> list[str]:
        return list(self.definition["axes"])

    @functools.cached_property
    def measures(self) -> dict[str, Measure]:
        plain = self.definition["measures"]
        return {name: measure_from_json(measure) for name, measure in plain.items()}

    @functools.cached_property
    def claims(self) -> list[Any]:
        return [claim_from_json(plain) for plain in self.definition["claims"]]

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """arm, <axes>, seed, id, status, step, seconds, message, "test/accuracy", ...: raw values.

        One row per place of the plan; a number that a run does not have is NaN.
        """
        rows = [
            {
                **_place(run),
                "id": run.id,
                "status": run.status,
                "step": run.step,
                "seconds": run.result.get("seconds", np.nan),
                "message": run.message,
                **{
                    f"{split}/{name}": value
                    for split, metrics in run.metrics.items()
                    for name, value in metrics.items()
                },
            }
            for run in self.records
        ]
        first = ["arm", *self.axes, "seed", "id", "status", "step", "seconds", "message"]
        return pd.DataFrame(rows, columns=None if rows else first)

    def curves(self, split: str, metric: str) -> pd.DataFrame:
        """arm, <axes>, seed, step, value: every point of every run that kept this curve; raw."""
        found = [(run, run.curve(split, metric)) for run in self.records]
        lengths = [len(steps) for _, (steps, _) in found]
        places = pd.DataFrame(
            [_place(run) for run, _ in found], columns=["arm", *self.axes, "seed"]
        )
        frame = places.loc[places.index.repeat(lengths)].reset_index(drop=True)
        frame["step"] = np.concatenate([NO_CURVE[0], *(steps for _, (steps, _) in found)])
        frame["value"] = np.concatenate([NO_CURVE[1], *(values for _, (_, values) in found)])
        return frame

    def probe(self, probe: str, quantity: str) -> pd.DataFrame:
        """arm, <axes>, seed, step, site, depth, value: what a probe found in every run that kept
        this quantity (`runs.Run.probe`)."""
        runs = [run for run in self.records if (probe, quantity) in run.files.probes]
        places = ["arm", *self.axes, "seed"]
        frames = [run.probe(probe, quantity).assign(**_place(run)) for run in runs]
        columns = [*places, *LOOK]
        return (
            pd.concat(frames, ignore_index=True)[columns]
            if frames
            else pd.DataFrame(columns=columns)
        )

    @property
    def probes(self) -> list[tuple[str, str]]:
        """(probe, quantity) of all that the runs kept."""
        return list(dict.fromkeys(key for run in self.records for key in run.files.probes))

    @functools.cached_property
    def values(self) -> dict[str, pd.DataFrame]:
        """{measure: frame}, see `measures.values`."""
        known = self.definition["computed"] or {}
        return {
            name: measuring.values(self.records, measure, self.axes, known.get(name, {}))
            for name, measure in self.measures.items()
        }

    @functools.cached_property
    def tuning(self) -> measuring.Tuning | None:
        """Which value of the tuned axis each arm takes; None for a study that tunes nothing."""
        tune = self.definition["tune"]
        if tune is None:
            return None
        measure = measure_from_json(tune["measure"])
        return measuring.tuning(self.records, tune["axis"], measure, self.axes)

    @property
    def verdicts(self) -> pd.DataFrame:
        """One row per claim, as study.json has them; no rows before they were decided."""
        found = self.definition["verdicts"] or []
        rows = [{name: verdict.get(name) for name in IN_TABLE} for verdict in found]
        return pd.DataFrame(rows, columns=list(IN_TABLE))


def _place(run: Run) -> dict[str, Any]:
    return {"arm": run.arm, **run.point, "seed": run.seed}


# ---- Reading


def load_study(folder: str | Path) -> StudyResults:
    """Reads study.json and every run of its plan.

    Raises:
      UserError: there is no study.json, or it is none that this version reads.
    """
    folder = Path(os.path.expanduser(folder))
    definition = read_definition(folder)
    places = definition["runs"]
    files = {place["id"]: read_run_or_damage(folder / "runs" / place["id"]) for place in places}
    return StudyResults(
        folder=folder,
        definition=definition,
        records=[Run(**place, files=files[place["id"]]) for place in places],
        damaged={id: found.message for id, found in files.items() if found.status == "damaged"},
    )


def find_studies(folder: str | Path) -> list[Path]:
    """The study folders at or below ``folder``, sorted; UserError if there is none."""
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds a study or several")
    found = list(_studies(folder, DEEPEST))
    if not found:
        raise UserError(
            f"{folder} holds no study: there is no {FILE} in it or up to {DEEPEST} folders below; "
            f"give the folder that `python -m bnresearch study ... --out=` was given"
        )
    return found


def _studies(folder: Path, deeper: int) -> list[Path]:
    if (folder / FILE).is_file():
        return [folder]
    if deeper == 0:
        return []
    below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [study for path in below for study in _studies(path, deeper - 1)]


def read_name(folder: Path) -> str:
    """Which study a folder holds; what else is in its study.json may be of any kind."""
    return str(_read(folder).get("name"))


def read_definition(folder: Path) -> dict[str, Any]:
    """The content of study.json, checked as far as reading the study needs it."""
    path, definition = folder / FILE, _read(folder)
    _check(f"{path}", definition, NEEDED)
    try:
        _check_contents(path, definition)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not as a study leaves it ({error!r}): it was changed by hand"
        ) from error
    return definition


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is no study folder: it has no {FILE}")
    definition = rundir.read_json(path)
    schema = definition.get("schema")
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}: read it with the version "
            "that wrote it, or run the study again into another folder"
        )
    return definition


def _check(what: str, part: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """UserError if ``part`` has not all the fields in ``kinds``."""
    there = part if isinstance(part, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(there.get(name, ...), kind)]
    if wrong:
        raise UserError(
            f"{what} has no {', '.join(wrong)} as it should: changed by hand, or written by "
            "another version; the study's command, called again, writes it anew"
        )


def _check_contents(path: Path, definition: Mapping[str, Any]) -> None:
    """That measures and claims can be made, and that runs are at places of the study."""
    axes, measures = definition["axes"], definition["measures"]
    for name, arm in definition["arms"].items():
        _check(f"{path}: arm {name!r}", arm, ARM)
    for name, axis in axes.items():
        _check(f"{path}: axis {name!r}", axis, AXIS)
    tune = definition["tune"]
    for measure in [*measures.values(), *([tune["measure"]] if tune is not None else [])]:
        _check(f"{path}: a measure", measure, MEASURE)
        measuring.check(measure_from_json(measure), axes)
    if tune is not None:
        lookup(axes, tune["axis"], "tuned axis")
    for number, claim in enumerate(definition["claims"], start=1):
        lookup(measures, claim_from_json(claim).measure, f"measure of claim {number}")
    for number, verdict in enumerate(definition["verdicts"] or [], start=1):
        what = f"{path}: verdict {number}"
        _check(what, verdict, VERDICT)
        _check(f"{what}: at", verdict["at"], dict.fromkeys(verdict["at"], (str, *NUMBER)))
        lookup(measures, claim_from_json(verdict["claim"]).measure, f"measure of verdict {number}")
        lookup(VERDICTS, verdict["verdict"], "verdict")
        for row in verdict["same_rate"]:
            _check(f"{what}: same_rate", row, {"value": (str, *NUMBER), **EFFECT})
        for row in verdict["pairs"]:
            _check(f"{what}: pairs", row, {"of": (str,), **EFFECT})
    for place in definition["runs"]:
        if not _fits(place, definition):
            shown = json.dumps(place)[:120]
            raise UserError(f"{path} lists a run that does not fit its arms and axes: {shown}")


def _fits(place: Any, definition: Mapping[str, Any]) -> bool:
    axes = definition["axes"]
    return (
        isinstance(place, dict)
        and place.keys() == {"id", "arm", "point", "seed"}
        and re.fullmatch("[0-9a-f]{8,64}", str(place["id"])) is not None
        and place["arm"] in list(definition["arms"])
        and place["point"].keys() == axes.keys()
        and all(value in axes[name]["values"] for name, value in place["point"].items())
        and isinstance(place["seed"], int)
    )


# ---- Deciding


def conclude(results: StudyResults) -> list["Verdict"]:
    """The verdicts on the claims of a study, in their order, from its files alone."""
    from bnresearch import verdict  # scipy and statsmodels: a second that readers need not wait

    labels = [
        {name: part.get("label", "") for name, part in results.definition[parts].items()}
        for parts in ("arms", "axes")
    ]
    return verdict.decide(results.claims, results.values, results.tuning, results.measures, *labels)
