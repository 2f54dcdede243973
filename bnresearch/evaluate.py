"""Evaluate a finished or stopped run with the statistics of one's choice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnresearch.checkpoint import Checkpoints
from bnresearch.config import unresolve
from bnresearch.data.base import SPLITS
from bnresearch.errors import UserError, lookup
from bnresearch.experiment import Experiment, evaluator, prepare
from bnresearch.rundir import read_config
from bnresearch.state import State

Evaluator = Callable[[State, str], dict[str, float]]


def _running(experiment: Experiment) -> Evaluator:
    """The running statistics: ordinary inference."""
    return evaluator(experiment, "running")


def _batch(experiment: Experiment) -> Evaluator:
    """Those of each whole evaluation batch, whatever ``norm.scope``: predictions depend on the
    batch around them."""
    return evaluator(experiment, "batch")


STATS: dict[str, Callable[[Experiment], Evaluator]] = {"running": _running, "batch": _batch}


def evaluate_run(workdir: str | Path, stats: str, split: str) -> dict[str, Any]:
    """Metrics of the newest checkpoint in ``workdir`` on one split; nothing in there is changed.

    It runs on one device, whatever the run was trained on: evaluation does not depend on that.

    Raises:
      UserError: unknown ``stats`` or ``split``, no run folder, or no checkpoint in it.
    """
    make = lookup(STATS, stats, "--stats")
    lookup(dict.fromkeys(SPLITS), split, "--split")
    config = on_one_device(unresolve(read_config(workdir)))
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    if not checkpoints.steps():
        raise UserError(
            f"{workdir} has no checkpoint yet; wait for the first one, or train it with "
            "`python -m bnresearch train` (with train.checkpoint_every=never it gets none)"
        )
    experiment = prepare(config)
    try:
        template = jax.eval_shape(experiment.program.init, experiment.numbers)
        restored = checkpoints.restore(template)
        if restored is None:
            raise UserError(f"{workdir} has no sound checkpoint left; train it again")
        step, state = restored
        metrics = make(experiment)(state, split)
    finally:
        if experiment.program.dataset.sharded_feed:
            experiment.program.dataset.close()
    return {"step": step, "stats": stats, "split": split} | metrics


def on_one_device(config: ConfigDict) -> ConfigDict:
    """The same model and data without what only matters to training on many devices."""
    config.parallel.update(mode="jit", devices=1)
    config.norm.scope = "global"
    config.train.accumulate = 1
    return config
