"""A study from its file to its page: plan, sweep, measures, verdicts, report."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import locks, measures, records, report, rundir, study
from bnresearch.errors import UserError
from bnresearch.sweep import Counts, Job, check_options, slurm, sweep


class Outcome(NamedTuple):
    """What became of a study.

    Attributes:
      definition: the content of study.json, with the verdicts.
      counts: how the runs ended.
      damaged: id -> what is wrong with the folder, of runs that were left out for it.
      page: the report's index.html.
    """

    definition: dict[str, Any]
    counts: Counts
    damaged: Mapping[str, str]
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
    cluster: slurm.Options | None = None,
) -> Outcome:
    """Runs what is missing of a study, decides its claims and writes its page.

    Args:
      file, scale, seeds, confirmed: see ``study.plan``.
      out: the study's folder: made, or continued if it holds a study of the same name.
      launcher, workers, show, cluster: see ``sweep``.
      command: recorded in study.json; the command line of this process by default.

    Raises:
      UserError: whatever is wrong with the study, its folder or the options.
      SweepStopped: it was asked to stop; the same call goes on.
    """
    check_options(launcher, workers, show, cluster)
    started = time.monotonic()
    command = list(command or sys.argv)
    plan = study.plan(study.load(file), file, scale, seeds=seeds, confirmed=confirmed)
    definition = study.describe(plan, command)
    folder = _folder(out, definition)
    if cluster is None:  # whose nodes have other devices than this machine
        _check_programs(plan, folder)
    if show != "off":
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
    _make(folder)
    with locks.held(folder):
        _write(folder, definition)
    todo = list(jobs(plan))
    counts = sweep(
        todo,
        folder / "runs",
        launcher=launcher,
        workers=workers,
        show=show,
        command=command,
        cluster=cluster,
    )
    definition |= _origin(folder, todo) | {"finished": _now()}
    definition |= {"seconds": round(time.monotonic() - started, 3)}
    with locks.held(folder):
        _write(folder, definition)  # again: another call may have left its own plan there
        definition |= _conclusions(folder, definition, plan)
        _write(folder, definition)
        results = records.load_study(folder)
        page = report.write([results], folder / "report")
    return Outcome(definition, counts, results.damaged, page)


def jobs(plan: study.Plan) -> Iterator[Job]:
    """The runs of a plan; one that stands at several places comes once, for the first of them."""
    seen = set()
    for run in plan.runs:
        if run.id in seen:
            continue
        seen.add(run.id)
        yield Job(
            run.id,
            f"{_place(run)}, seed={run.seed}",
            run.arm,
            run.resolved,
            run.program,
            plan.file if plan.study.function else "",
        )


def _place(run: study.PlannedRun) -> str:
    place = (f"{axis}={_shown(value)}" for axis, value in run.point.items())
    return ", ".join([f"arm {run.arm!r}", *place])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folder(out: str | Path, definition: Mapping[str, Any]) -> Path:
    """Refuses a folder that holds anything but this study, before anything is written."""
    with _writable(out):
        folder = Path(out).expanduser()
        there = folder / records.FILE
        if there.exists():
            name = records.read_name(folder)
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
    return folder


def _check_programs(plan: study.Plan, folder: Path) -> None:
    """Refuses configs that no run could begin with, before hours are spent on the others: one of
    each program that is still to run, of a great many the first."""
    if plan.study.function is not None:
        return
    from bnresearch import config, experiment

    first: dict[str, study.PlannedRun] = {}
    for run in plan.runs:
        if run.program not in first and not (folder / "runs" / run.id / "result.json").exists():
            first[run.program] = run
    for run in list(first.values())[:MOST_CHECKED]:
        try:
            experiment.check(config.unresolve(run.resolved))
        except UserError as error:
            raise UserError(f"{_place(run)}: {error}") from error


MOST_CHECKED = 100  # programs; each takes some 20 ms


def _make(folder: Path) -> None:
    with _writable(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)


@contextmanager
def _writable(out: str | Path) -> Iterator[None]:
    """Says what to do where a path cannot be the folder of a study."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: "~somebody" without such a user
        raise UserError(
            f"cannot write to {out}: {getattr(error, 'strerror', None) or error}; choose another "
            "folder with --out"
        ) from error


def _write(folder: Path, definition: Mapping[str, Any]) -> None:
    try:
        rundir.write_json(folder / records.FILE, definition)
    except OSError as error:
        raise UserError(
            f"cannot write {folder / records.FILE}: {error.strerror or error}; the runs are kept: "
            "make room, then run the same command again"
        ) from error


def _conclusions(folder: Path, definition: Mapping[str, Any], plan: study.Plan) -> dict[str, Any]:
    """What study.json says only at the end: the measures that are functions, and the verdicts."""
    results = records.load_study(folder)
    found = {"computed": measures.compute(plan.study.measures, results.records)}
    if not definition["may_conclude"]:
        return found | {"verdicts": None}
    results = dataclasses.replace(results, definition={**definition, **found})
    return found | {"verdicts": [verdict.to_json() for verdict in records.conclude(results)]}


def _origin(folder: Path, todo: Sequence[Job]) -> dict[str, Any]:
    """What made the runs, which may be older than this call: the device that the first of them
    names, and their commits."""
    found = [_status(folder / "runs" / job.id) for job in todo]
    commits = dict.fromkeys(str(status["commit"]) for status in found if status.get("commit"))
    devices = [status["device"] for status in found if status.get("device")]
    origin: dict[str, Any] = {"device": devices[0] if devices else None}
    return origin | ({"commit": ", ".join(commits)} if commits else {})


def _status(path: Path) -> dict[str, Any]:
    """Nothing for a damaged run, which the report names."""
    try:
        return rundir.read_status(path) or {}
    except UserError:
        return {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
