"""Evaluate a finished or stopped run with the statistics of one's choice."""

import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnresearch import average
from bnresearch.checkpoint import Checkpoints
from bnresearch.config import unresolve
from bnresearch.data.base import SPLITS
from bnresearch.errors import NotFinite, UserError, lookup
from bnresearch.experiment import Experiment, prepare
from bnresearch.metrics import check_progress, progress
from bnresearch.parallel import parse_scope
from bnresearch.run_statistics import run_statistics
from bnresearch.rundir import check_usable, open_run, path_of, read_config, write_json
from bnresearch.state import State
from bnresearch.stats import STATS, Asked, Statistic

Evaluator = Callable[[State, str], dict[str, float]]

WEIGHTS = ("raw", "averaged")
ANEW = ("precise", "corrected")  # take their statistics anew themselves
BATCHES = 100  # of training, over which statistics are taken anew


def evaluate_run(
    workdir: str | Path,
    stats: str | None = None,
    split: str = "test",
    *,
    batches: int | None = None,
    save: str | Path | None = None,
    weights: str = "raw",
    show: str = "off",
) -> dict[str, Any]:
    """Metrics of the newest checkpoint in ``workdir`` on one split; nothing in there is changed.

    It runs on one device, whatever the run was trained on: evaluation does not depend on that.

    Args:
      stats: a name of STATS, for some with an argument behind a colon; by default "running", and
        "precise" for averaged weights.
      split: train, validation or test.
      batches: of training, from the checkpoint's step on, over which statistics are taken anew (by
        those of ANEW); None: BATCHES.
      save: with "precise", a folder that is made: the run with the statistics of one pass (and the
        weights evaluated) in its checkpoint.
      weights: "raw", or "averaged": the average that the run kept (``train.average``).
      show: progress as "bar", "lines", "off" or "auto".

    Raises:
      UserError: an unknown choice, no run folder, no checkpoint in it, or what the statistics need
        is not there.
    """
    lookup(dict.fromkeys(SPLITS), split, "--split")
    lookup(dict.fromkeys(WEIGHTS), weights, "--weights")
    check_progress(show)
    name, argument = parse(stats) if stats is not None else (None, None)
    workdir = path_of(workdir)
    expected = name or ("precise" if weights == "averaged" else "running")
    batches = _checked_batches(batches, expected)
    _check_save(save, expected)
    config = unresolve(read_config(workdir))
    checkpoints(Path(workdir))
    experiment = prepare(on_one_device(config))
    bar = progress(show)
    try:
        step, state = restored(experiment, Path(workdir))
        name = name or ("precise" if weights == "averaged" and state.batch_stats else "running")
        _check_save(save, name)  # again: now it is known whether there are statistics at all
        if weights == "averaged":
            state = _average_of(experiment, state, Path(workdir), name)
        asked = Asked(experiment, state, split, batches, lambda total: _ticks(bar, total))
        found = _evaluate(asked, name, argument, weights)
    finally:
        bar.close()
        if experiment.program.dataset.sharded_feed:
            experiment.program.dataset.close()
    new = found.pop("batch_stats", None)
    if save is not None:
        origin = {"workdir": str(workdir), "step": step, "weights": weights, "batches": batches}
        _save(path_of(save), origin, state.replace(batch_stats=new))
    about: dict[str, Any] = {"weights": weights} if weights != "raw" else {}
    if STATS[name].on_batch:
        about["depends_on_batch"] = True  # on the other examples that are evaluated
    return {"step": step, "stats": stats or name, "split": split} | about | found


def _checked_batches(batches: int | None, stats: str) -> int:
    if batches is None:
        return BATCHES
    if stats not in ANEW:
        raise UserError(
            f"--batches={batches}: {stats} takes no statistics anew; leave it out, or choose "
            f"{' or '.join(f'--stats={name}' for name in ANEW)}"
        )
    if batches < 1:
        raise UserError(f"--batches={batches}: statistics are taken over at least 1 batch")
    return batches


def parse(text: str) -> tuple[str, float | None]:
    """``NAME`` or ``NAME:ARGUMENT`` of STATS, taken apart.

    Raises:
      UserError: an unknown name; an argument that is missing, or not one.
    """
    name, colon, rest = text.partition(":")
    entry: Statistic = lookup(STATS, name, "--stats")
    if entry.argument is None:
        if colon:
            raise UserError(f"--stats={text}: {name} takes nothing; write --stats={name}")
        return name, None
    if not colon and not entry.needed:
        return name, None
    return name, entry.argument(rest)


def _evaluate(asked: Asked, name: str, argument: float | None, weights: str) -> dict[str, Any]:
    run = STATS[name].run
    if name != "running" or weights != "raw":
        return run(asked, argument)

    def evaluate(state: State, split: str) -> dict[str, Any]:
        return run(asked._replace(state=state, split=split), argument)

    return with_average(asked.experiment, evaluate)(asked.state, asked.split)


def checkpoints(workdir: Path) -> Checkpoints:
    """The checkpoints of a run, to be read; UserError where there is none."""
    found = Checkpoints(workdir / "checkpoints", read_only=True)
    if not found.steps():
        raise UserError(
            f"{workdir} has no checkpoint yet; wait for the first one, or train it with "
            "`python -m bnresearch train` (with train.checkpoint_every=never it gets none)"
        )
    return found


def restored(experiment: Experiment, workdir: Path) -> tuple[int, State]:
    """The newest checkpoint."""
    template = jax.eval_shape(experiment.program.init, experiment.numbers)
    newest = checkpoints(workdir).restore(template)
    if newest is None:
        raise UserError(f"{workdir} has no sound checkpoint left; train it again")
    return newest


def _ticks(bar: Any, total: int) -> Callable[[], None]:
    """What counts to ``total`` on the display."""
    count = 0
    bar.start(0, total, "statistics")

    def tick() -> None:
        nonlocal count
        count += 1
        bar.update(count)

    return tick


def on_one_device(config: ConfigDict) -> ConfigDict:
    """The same model and data on one device, where the sets of examples that share statistics are
    those of training."""
    if config.train.accumulate_statistics == "batch":
        config.train.accumulate = 1
    size = config.data.batch_size // config.train.accumulate
    devices = parse_scope(config.norm.scope).devices
    if devices is not None:
        shared = size * devices // config.parallel.devices
        config.norm.scope = f"ghost:{shared}" if shared < size else "global"
    config.parallel.update(mode="jit", devices=1)
    return config


# ---- Weights that were averaged


def with_average(experiment: Experiment, evaluate: Evaluator) -> Evaluator:
    """``evaluate``, and for a run that averages its weights what it says of the average, too: as
    further metrics (`average.metrics`), once there are weights in it."""
    if experiment.config.train.average.name == "none":
        return evaluate

    last: list[State] = []  # a state, and its average: several splits are evaluated at one step

    def both(state: State, split: str) -> dict[str, float]:
        found = evaluate(state, split)
        if not state.average["count"]:
            return found
        try:
            if not last or last[0] is not state:
                last[:] = state, averaged(experiment, state)
            others = evaluate(last[1], split)
        except NotFinite:  # the weights are far off; training ends where it does without an average
            others = dict.fromkeys(found, math.nan)
        return found | {name: others[of] for of, name in average.metrics(others).items()}

    return both


def averaged(experiment: Experiment, state: State) -> State:
    """The state with the average in place of its weights, and statistics of its own: over
    ``train.average.batches`` training batches, since the running ones are of other weights
    (Izmailov et al., 2018)."""
    params, batch_stats = state.average["params"], state.batch_stats
    if batch_stats:
        batches = experiment.config.train.average.batches
        batch_stats = run_statistics(experiment, params, batch_stats, int(state.step), batches)
    return state.replace(params=params, batch_stats=batch_stats)


def _average_of(experiment: Experiment, state: State, workdir: Path, stats: str) -> State:
    """`averaged`, or a UserError where that cannot be evaluated."""
    if not state.average:
        raise UserError(
            f"{workdir} kept no average of its weights; evaluate it with --weights=raw, or train "
            "with --config.train.average.name=ema|swa"
        )
    if not state.average["count"]:
        raise UserError(
            f"no weights are in the average of {workdir} yet; wait for a later checkpoint"
        )
    if stats == "running" and state.batch_stats:
        raise UserError(
            "--weights=averaged with --stats=running: the running statistics are those of the raw "
            "weights, not of their average; take them anew with --stats=precise, the default there"
        )
    if stats in ANEW:
        return state.replace(params=state.average["params"])
    return averaged(experiment, state)


# ---- A new run folder


def _check_save(save: str | Path | None, stats: str) -> None:
    if save is None:
        return
    if stats != "precise":
        raise UserError(
            f"--save keeps new running statistics, which --stats=precise makes; {stats} has none "
            "that could be kept"
        )
    path = path_of(save)
    if path.exists():
        raise UserError(f"--save={save} is there already; give a folder that is to be made")
    run = next((parent for parent in path.parents if (parent / "config.json").exists()), None)
    if run is not None:
        raise UserError(f"--save={save} lies in the run {run}; give a folder beside it")
    check_usable(path)


def _save(folder: Path, origin: dict[str, Any], state: State) -> None:
    """A run folder with this state as its checkpoint, and ``origin.json``: where that comes from.
    It appears whole."""
    step, temporary = origin["step"], folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    message = (
        f"step {step} of {origin['workdir']}, {origin['weights']} weights; statistics of "
        f"{origin['batches']} training batches"
    )
    try:
        with open_run(temporary, read_config(origin["workdir"]), list(sys.argv)) as new:
            with Checkpoints(new.path / "checkpoints", keep=1) as kept:
                kept.save(step, state)
            new.set_status("stopped", step, message)
            write_json(new.path / "origin.json", origin)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
