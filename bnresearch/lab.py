"""A study from its file to its page: plan, sweep, measures, verdicts, report."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import measures, records, report, rundir, study
from bnresearch.errors import UserError
from bnresearch.sweep import Counts, Job, check_options, sweep


class Outcome(NamedTuple):
    """What became of a study.

    Attributes:
      definition: the content of study.json, with the verdicts.
      counts: how the runs ended.
      page: the report's index.html.
    """

    definition: dict[str, Any]
    counts: Counts
    page: Path


def run_study(file: str | Path, scale: str, out: str | Path, **options: Any) -> dict[str, Any]:
    """Runs what is missing of a study and returns the content of its study.json.

    Args:
      file: the study file.
      scale: "smoke", "quick" or "full".
      out: the study's folder; the same call again goes on.
      options: of ``conduct``.
    """
    return conduct(file, scale, out, **options).definition


def conduct(
    file: str | Path,
    scale: str,
    out: str | Path,
    *,
    launcher: str = "auto",
    workers: int = 0,
    seeds: int | None = None,
    show: str = "auto",
    confirmed: bool = False,
    command: Sequence[str] | None = None,
) -> Outcome:
    """Runs what is missing of a study, decides its claims and writes its page.

    Args:
      file, scale, seeds, confirmed: see ``study.plan``.
      out: the study's folder: made, or continued if it holds a study of the same name.
      launcher, workers, show: see ``sweep``.
      command: recorded in study.json; the command line of this process by default.

    Raises:
      UserError: whatever is wrong with the study, its folder or the options.
      SweepStopped: it was asked to stop; the same call goes on.
    """
    check_options(launcher, workers, show)
    started = time.monotonic()
    command = list(command or sys.argv)
    plan = study.plan(study.load(file), file, scale, seeds=seeds, confirmed=confirmed)
    definition = study.describe(plan, command)
    folder = _open(Path(out).expanduser(), definition)
    if show != "off":
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
    with rundir.held(folder):
        _write(folder, definition)
    todo = list(jobs(plan))
    counts = sweep(
        todo, folder / "runs", launcher=launcher, workers=workers, show=show, command=command
    )
    definition |= {"device": _device(folder, todo), "finished": _now()}
    definition |= {"seconds": round(time.monotonic() - started, 3)}
    definition |= _conclusions(folder, definition, plan)
    with rundir.held(folder):
        _write(folder, definition)
        page = report.write([records.load_study(folder)], folder / "report")
    return Outcome(definition, counts, page)


def jobs(plan: study.Plan) -> Iterator[Job]:
    """The runs of a plan; one that stands at several places comes once, for the first of them."""
    function = plan.study.function
    seen = set()
    for run in plan.runs:
        if run.id in seen:
            continue
        seen.add(run.id)
        place = [f"{axis}={_shown(value)}" for axis, value in run.point.items()]
        yield Job(
            run.id,
            " ".join([run.arm, *place, f"seed={run.seed}"]),
            run.arm,
            run.resolved,
            run.program,
            (plan.file, function.__name__) if function else None,
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _open(folder: Path, definition: Mapping[str, Any]) -> Path:
    """Refuses a folder that holds anything but this study, before anything is written."""
    there = folder / records.FILE
    try:
        if there.exists():
            name = records.read_definition(folder)["name"]
            if name != definition["name"]:
                raise UserError(
                    f"{folder} holds the study {name!r}, this one is {definition['name']!r}: "
                    "choose another folder with --out"
                )
        elif folder.exists():
            # Runs alone are a study that was killed, or is just about to write its study.json.
            others = sorted(
                path.name
                for path in folder.iterdir()
                if not path.name.startswith(".") and path.name not in ("lock", "runs")
            )
            if others:
                raise UserError(
                    f"{folder} is neither empty nor a study: it has no {records.FILE}, but "
                    f"{', '.join(others[:3])}; choose another folder with --out"
                )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another with --out"
        ) from error
    return folder


def _write(folder: Path, definition: Mapping[str, Any]) -> None:
    rundir.write_json(folder / records.FILE, definition)


def _conclusions(folder: Path, definition: Mapping[str, Any], plan: study.Plan) -> dict[str, Any]:
    """What study.json says only at the end: the measures that are functions, and the verdicts."""
    results = records.load_study(folder)
    found = {"computed": measures.compute(plan.study.measures, results.records)}
    if not definition["may_conclude"]:
        return found | {"verdicts": None}
    results = dataclasses.replace(results, definition={**definition, **found})
    return found | {"verdicts": [verdict.to_json() for verdict in records.conclude(results)]}


def _device(folder: Path, todo: Sequence[Job]) -> Any:
    """What the runs ran on, as the first that says so has it."""
    for job in todo:
        status = rundir.read_status(folder / "runs" / job.id) or {}
        if status.get("device"):
            return status["device"]
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
