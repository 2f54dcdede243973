"""A run of a study, as its folder has it: config, status, result and curves, each file read once.

Imports no jax.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bnresearch import rundir
from bnresearch.errors import UserError, lookup
from bnresearch.metrics import FILE as METRICS
from bnresearch.metrics import PLACE, PROBES, read_metrics, read_probes

Curve = tuple[np.ndarray, np.ndarray]
NO_CURVE: Curve = (np.zeros(0, int), np.zeros(0))
# The columns of what a probe found, with their types.
LOOK = {"step": int, "site": str, "depth": int, "value": float}


class RunFiles(NamedTuple):
    """What the folder of one run holds; a run that was never begun has only a status, "missing"."""

    path: Path
    status: str
    message: str = ""
    config: Mapping[str, Any] = {}
    result: Mapping[str, Any] = {}
    step: int = 0
    curves: Mapping[tuple[str, str], Curve] = {}
    probes: Mapping[tuple[str, str], pd.DataFrame] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at its place in the study.

    Attributes:
      arm, point, seed: where; ``point`` has a value per axis, ``seed`` numbers the pair.
      status: "done", "diverged", "failed", "stopped", "running", "missing" or "damaged".
      config: the resolved config; result: result.json. Both empty where there is none.
      message: why a run diverged, failed, stopped or is damaged.
    """

    id: str
    arm: str
    point: Mapping[str, Any]
    seed: int
    files: RunFiles = dataclasses.field(repr=False)

    @property
    def status(self) -> str:
        return self.files.status

    @property
    def message(self) -> str:
        return self.files.message

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.files.config

    @property
    def result(self) -> Mapping[str, Any]:
        return self.files.result

    @property
    def step(self) -> int:
        """How many steps it took (or had taken when its status was last written)."""
        return self.files.step

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics at the end, by split; empty unless the run is done."""
        return self.result.get("metrics", {})

    def final(self, split: str, metric: str) -> float:
        """A metric at the end: of result.json, else (split "train") the last one recorded.

        Raises:
          UserError: a run that is done has no such metric.
        """
        if split in self.metrics:
            return float(lookup(self.metrics[split], metric, f"metric of split {split!r}"))
        values = self.curve(split, metric)[1]
        return float(values[-1]) if len(values) else float("nan")

    def curve(self, split: str, metric: str) -> Curve:
        """(steps, values) along the run, int and float arrays [n]; empty where nothing was kept.

        Raises:
          UserError: the run recorded this split, but not this metric.
        """
        known = {name for found, name in self.files.curves if found == split}
        if not known:
            return NO_CURVE
        lookup(dict.fromkeys(known), metric, f"metric of split {split!r}")
        return self.files.curves[split, metric]

    def probe(self, probe: str, quantity: str) -> pd.DataFrame:
        """step, site, depth, value: what a probe found along the run, in the order it was found.

        ``site`` is the path of a norm (or, without one, of a layer), "" for what is about the whole
        net; ``depth`` counts sites in order of execution from 1. Empty where nothing was kept.

        Raises:
          UserError: the run recorded this probe, but not this quantity.
        """
        known = {name for found, name in self.files.probes if found == probe}
        if not known:
            return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in LOOK.items()})
        lookup(dict.fromkeys(known), quantity, f"quantity of probe {probe!r}")
        return self.files.probes[probe, quantity]


# ---- Reading a run folder


def read_run_or_damage(path: Path) -> RunFiles:
    """`read_run`, or, for a damaged folder, the status "damaged" with the reason as its message."""
    try:
        return read_run(path)
    except UserError as error:
        # Named by its place in the folder: reports are read elsewhere.
        reason = str(error).replace(f"{path.absolute()}/", "").replace(f"{path}/", "")
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    return RunFiles(path, "damaged", reason)


def read_run(path: Path) -> RunFiles:
    """The files of a run folder whose name is the beginning of its config's hash.

    Raises:
      UserError: the folder is damaged: config.json is missing, is no JSON or another run's; a file
        has another schema, or is torn.
      OSError: it may not be read.
    """
    if not path.exists():
        return RunFiles(path, "missing")
    if not path.is_dir():
        raise UserError("it is a file, not a folder")
    names = {file.name for file in path.iterdir() if file.name[0] != "."}
    if names <= {"lock"}:
        return RunFiles(path, "missing")  # killed before it wrote its config
    if "config.json" not in names:
        raise UserError("it has no config.json")
    config = rundir.read_json(path / "config.json")
    _check_identity(config, path.name)
    status = _of_schema(rundir.read_status(path), "status.json")
    result = _of_schema(rundir.read_result(path), "result.json")
    if result.get("status") == "done" and not _are_metrics(result.get("metrics")):
        raise UserError("result.json says done, but has no numbers as metrics: it was changed")
    last = result or status
    return RunFiles(
        path,
        status=last.get("status", "missing"),
        message=str(last.get("message") or ""),
        config=config,
        result=result,
        step=last.get("step", 0),
        curves=_curves(path / METRICS) if METRICS in names else {},
        probes=_probes(path / PROBES) if PROBES in names else {},
    )


def _check_identity(config: Mapping[str, Any], name: str) -> None:
    found = rundir.config_hash(config)
    if not found.startswith(name):
        raise UserError(
            f"config.json (schema {config.get('schema')!r}) is that of another run: its hash is "
            f"{found[: len(name)]}..., the folder is called {name}"
        )


def _of_schema(content: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if content is not None and content.get("schema") != rundir.SCHEMA:
        raise UserError(
            f"{name} has schema {content.get('schema')!r}, this version reads {rundir.SCHEMA}"
        )
    return content or {}


def _are_metrics(metrics: Any) -> bool:
    """Whether it is {split: {metric: number}}."""
    if not isinstance(metrics, dict) or not all(isinstance(m, dict) for m in metrics.values()):
        return False
    return all(isinstance(number, int | float) for m in metrics.values() for number in m.values())


def _curves(path: Path) -> dict[tuple[str, str], Curve]:
    """{(split, metric): (steps, values)} of metrics.jsonl."""
    lists: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for record in read_metrics(path):
        split, step = record.pop("split", ""), record.pop("step")
        for name, value in record.items():
            steps, values = lists.setdefault((split, name), ([], []))
            steps.append(step)
            values.append(value)
    try:
        return {
            key: (np.array(steps), np.array(values, float).reshape(len(steps)))
            for key, (steps, values) in lists.items()
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"{METRICS} has something else than a number: {error}") from error


def _probes(path: Path) -> dict[tuple[str, str], pd.DataFrame]:
    """{(probe, quantity): step, site, depth, value} of probes.jsonl."""
    rows: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for record in read_probes(path):
        place = [record.get(name) for name in ("step", "site", "depth")]
        for name, value in record.items():
            if name not in PLACE:
                rows.setdefault((record.get("probe", ""), name), []).append((*place, value))
    try:
        return {
            key: pd.DataFrame(found, columns=list(LOOK)).astype(LOOK) for key, found in rows.items()
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"{PROBES} has something else than a number: {error}") from error
