"""The doctor for a run of this project: everything that it asks for is in the run's folder."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import optim, values
from bnresearch.config import unresolve
from bnresearch.data.base import SPLITS
from bnresearch.doctor import EVALUATED, SCOPES, examined_report, treatment_of
from bnresearch.doctor.mends import MENDS
from bnresearch.doctor.report import Report
from bnresearch.errors import UserError, lookup
from bnresearch.evaluate import on_one_device, restored
from bnresearch.experiment import Experiment, prepare
from bnresearch.net import of_run
from bnresearch.parallel import parse_scope
from bnresearch.rundir import read_config
from bnresearch.state import State

Batch = dict[str, np.ndarray]

BATCHES = 50
MOST_BYTES = 2**31  # of pictures that are kept on the host: of large ones fewer batches are taken


def diagnose_run(
    workdir: str | Path, *, batches: int = BATCHES, split: str = "validation", scope: str = ""
) -> Report:
    """What is wrong with the norms of a run, at its newest checkpoint. Nothing in there is changed.

    Args:
      batches: of training, as the next steps would see them.
      split: on which evaluation is looked at.
      scope: over what statistics were meant to be taken, "global" or "device"; "": as the config
        says.

    Raises:
      UserError: no run folder, no checkpoint in it, a model without norms, an unknown choice.
    """
    lookup(dict.fromkeys(SPLITS), split, "--split")
    lookup({**SCOPES, "": None}, scope, "--scope")
    if batches < 2:
        raise UserError(f"--batches={batches}: the doctor compares batches and needs at least 2")
    config = unresolve(read_config(workdir))
    trained = config.norm.scope
    experiment = prepare(on_one_device(config))
    step, state, seen, evaluated = _read(experiment, Path(workdir), batches, split)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    declared = "global" if parse_scope(trained).devices is None else "device"
    about = {
        "workdir": str(workdir),
        "model": experiment.config.model.name,
        "norm": experiment.config.norm.kind,
        "step": step,
        "split": split,
    }
    return examined_report(
        of_run(experiment.config, experiment.program.dataset.info.num_classes, experiment.numbers),
        variables,
        seen,
        evaluated,
        about=about,
        mended=lambda check: _mend(check, workdir, experiment.config.norm.kind),
        treatment=_treatment(experiment, state),
        scope=scope or declared,
        declared=declared,
        values=values.of_sets(values.of_run(experiment)),
    )


def _read(
    experiment: Experiment, workdir: Path, batches: int, split: str
) -> tuple[int, State, list[Batch], list[Batch]]:
    """The newest checkpoint, its step first, and the batches of training, fewer where they are
    large, and of evaluation."""
    dataset = experiment.program.dataset
    try:
        step, state = restored(experiment, workdir)
        fitting = max(4, MOST_BYTES // _batch_bytes(experiment))
        seen = list(training_batches(experiment, step, min(batches, fitting)))
        return step, state, seen, list(evaluation_batches(experiment, split))
    finally:
        if dataset.sharded_feed:
            dataset.close()


def _mend(check: str, workdir: str | Path, kind: str) -> str:
    """The command, for this folder and this kind of norm."""
    text = MENDS[check].run.replace("{workdir}_precise", "{precise}")
    paths = {"workdir": Path(workdir), "precise": Path(f"{Path(workdir)}_precise")}
    quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
    return text.format(**quoted).replace("norm.batch.", f"norm.{kind}.")


def training_batches(experiment: Experiment, step: int, count: int) -> Iterator[Batch]:
    """The batches of ``count`` training steps from ``step`` on, on the host."""
    dataset, seed = experiment.program.dataset, experiment.seed
    rows = jnp.arange(experiment.config.data.batch_size)
    make = jax.jit(dataset.train_batch)
    for index in range(step, step + count):
        feed = dataset.feed(seed, index)
        yield jax.device_get(make(feed, np.uint32(seed), np.int32(index), rows))


def evaluation_batches(experiment: Experiment, split: str) -> Iterator[Batch]:
    """A split in batches of the size of training, without padding; a rest is left out, unless it is
    all there is."""
    config, dataset = experiment.config.data, experiment.program.dataset
    rows = jnp.arange(config.eval_batch_size)
    make, parts = jax.jit(dataset.eval_batch), []
    wanted = EVALUATED * config.batch_size
    for index in range(dataset.eval_steps(split)):
        batch = jax.device_get(make(dataset.eval_feed(split, index), np.int32(index), rows))
        inside = batch.pop("mask")
        parts.append({name: value[inside] for name, value in batch.items()})
        if sum(len(part["label"]) for part in parts) >= wanted:
            break
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    size, there = config.batch_size, len(whole["label"])
    for start in range(0, max(there - size, 0) + 1, size):
        yield {name: value[start : start + size] for name, value in whole.items()}


def _batch_bytes(experiment: Experiment) -> int:
    """Of a batch in float32."""
    shape = experiment.program.dataset.info.shape
    return 4 * experiment.config.data.batch_size * math.prod(shape)


def _treatment(experiment: Experiment, state: State) -> Any:
    optimizer = optim.make_optimizer(experiment.config.optim, experiment.numbers, 1.0)
    return treatment_of(optimizer, state.params)
