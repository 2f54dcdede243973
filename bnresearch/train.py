"""The loop: one run from its config to its result."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from bnresearch import (
    books,
    distributed,
    diverge,
    norm_config,
    processes,
    provenance,
    values,
)
from bnresearch.checkpoint import Checkpoints, digest
from bnresearch.config import NEVER, resolve, validate
from bnresearch.data.cache import cache_folder
from bnresearch.errors import Diverged, Stopped
from bnresearch.evaluate import with_average
from bnresearch.experiment import (
    Experiment,
    evaluator,
    initial_state,
    kernels,
    prepare,
    train_feed,
)
from bnresearch.metrics import Metrics, check_progress, progress
from bnresearch.probes import prober
from bnresearch.rundir import SCHEMA, RunFolder, known, read_status
from bnresearch.signals import stop_requests
from bnresearch.state import State

HEARTBEAT_SECONDS = 15.0
# What to do where processes of one run differ.
SAME_COMMAND = "start all processes with the same command, source and versions"
SAME_KERNELS = (
    "some hosts lack the compiler or the libraries that kernels of CPUs need; install the same on "
    "each (docs/performance.md), or give all --config.parallel.kernels=xla and another --workdir"
)


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    show: str = "auto",
    command: Sequence[str] | None = None,
    stop: threading.Event | None = None,
    tensorboard: bool = True,
    prepare: Callable[[ConfigDict], Experiment] = prepare,
) -> dict[str, Any]:
    """Train a config to its end in ``workdir``, going on from its newest checkpoint.

    Args:
      config: see bnresearch.config.default_config.
      workdir: the run folder; it is made, or continued if it holds the same config.
      show: progress as "bar", "lines" or "off"; "auto" is a bar on a terminal, lines elsewhere.
      command: recorded in status.json; the command line of this process by default.
      stop: set by the caller to stop the run; by default SIGTERM and Ctrl-C do so.
      tensorboard: whether to write TensorBoard events beside metrics.jsonl.
      prepare: makes the experiment of the config; that of a member of a population is another one.

    Returns:
      The content of result.json; that of a run already done is returned as it stands.

    Raises:
      UserError: the config or the workdir is wrong; nothing was written.
      Diverged: the loss, a gradient or a statistic is not finite; recorded in the run folder.
      Stopped: it was asked to stop; the state is saved and the same call goes on.
    """
    check_progress(show)
    enable_compilation_cache()
    if distributed.count() > 1:
        validate(config)
        distributed.check_same({"config": resolve(config), **provenance.program()}, SAME_COMMAND)
    experiment = prepare(config)
    if distributed.count() > 1:
        # Both hang on the compiler and libraries of a host, and the second on the first.
        about = {"kernels": kernels(experiment), "steps per call": experiment.program.chunk}
        distributed.check_same(about, SAME_KERNELS)
    show = show if distributed.is_first() else "off"
    try:
        with (
            books.opened(workdir, experiment.resolved, list(command or sys.argv)) as opened,
            _stop_requests() if stop is None else nullcontext(stop) as asked,
        ):
            folder, earlier = opened
            result = earlier or _run(experiment, folder, show, asked, tensorboard)
            status = (read_status(workdir) or {}) if earlier else {}
            if status.get("status") != result["status"]:
                of_then = known(status) if status else {}
                folder.set_status(
                    result["status"], result["step"], result.get("message"), **of_then
                )
            if result["status"] == "diverged":
                raise Diverged(result["step"], result.get("message", "no reason kept"))
            return result
    finally:
        if experiment.program.dataset.sharded_feed:
            experiment.program.dataset.close()


def _stop_requests() -> AbstractContextManager[Any]:
    """What tells that the run is to stop."""
    return stop_requests() if distributed.count() == 1 else nullcontext(distributed.AgreedStop())


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless jax was told otherwise."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _run(
    experiment: Experiment,
    folder: RunFolder | books.Onlooker,
    show: str,
    stop: threading.Event,
    tensorboard: bool,
) -> dict[str, Any]:
    """Train with the run's books kept: status, checkpoints, metrics, result."""
    started = time.monotonic()
    with books.checkpoints(folder.path, experiment.config.train.keep) as checkpoints:
        fresh = initial_state(experiment)
        step, state = checkpoints.restore(fresh) or (0, fresh)
        sites = values.of_run(experiment)
        folder.about |= {"kernels": kernels(experiment), "values": values.record(sites)}
        folder.set_status("running", step)
        if show != "off":
            for note in norm_config.notes(experiment.config, experiment.program.total_steps):
                print(f"note: {note}", file=sys.stderr)
            for line in values.lines(sites, experiment.config.norm.scope):
                print(line, file=sys.stderr)
        with books.metrics(folder.path, step, tensorboard) as metrics, _progress(show) as bar:
            loop = Loop(experiment, folder, checkpoints, metrics, bar)
            try:
                result = loop.finish(loop.train(state, stop))
            except Diverged as error:
                result = {"status": "diverged", "step": error.step, "message": error.reason}
            except Stopped as error:
                folder.set_status("stopped", error.step, str(error))
                raise
            except KeyboardInterrupt:
                folder.set_status(
                    "stopped", loop.step, "interrupted: the newest checkpoint is left"
                )
                raise
            except BaseException as error:
                folder.set_status("failed", loop.step, f"{type(error).__name__}: {error}")
                raise
    result = {"schema": SCHEMA, **result, "seconds": round(time.monotonic() - started, 3)}
    if experiment.members > 1:  # its last bits are those of that many runs trained together
        result["members"] = experiment.members
    folder.write_result(result)
    if experiment.config.train.checkpoint_every == NEVER:
        checkpoints.discard()  # of where it was stopped: who evaluates it would take it for the end
    return result


@contextmanager
def _progress(show: str) -> Iterator[Any]:
    bar = progress(show)
    try:
        yield bar
    finally:
        bar.close()


class Loop:
    """Advances a state to the end, stopping at the boundaries where something is due."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder | books.Onlooker,
        checkpoints: Checkpoints | books.SharedCheckpoints,
        metrics: Metrics | books.NoMetrics,
        bar: Any,
    ):
        self.experiment, self.program = experiment, experiment.program
        self.folder, self.checkpoints = folder, checkpoints
        self.metrics, self.bar = metrics, bar
        self.total = self.program.total_steps
        self.every = {
            name: experiment.steps(f"{name}_every")
            for name in ("log", "eval", "checkpoint")
            if experiment.config.train[f"{name}_every"] != NEVER
        }
        if experiment.config.probes.names:
            self.every["probe"] = prober.every(experiment)
        self.evaluate = with_average(experiment, evaluator(experiment, "running"))
        self.timer = self.beat = time.monotonic()
        self.step = 0
        self.timed_from: int | None = None
        self.latest: dict[str, dict[str, float]] = {}
        self.shown: tuple[float | None, float | None] = (None, None)

    def train(self, state: State, stop: threading.Event) -> State:
        """From ``state`` to the last step, or until ``stop`` is set."""
        self.step = int(state.step)
        self.bar.start(self.step, self.total, self.folder.path.name)
        if self.step == 0 and "probe" in self.every:
            self._look_inside(state)
        while self.step < self.total:
            boundary = self.step + min(n - self.step % n for n in self.every.values())
            boundary = min(boundary, self.total)
            state = self._advance(state, boundary, stop)
            if self.step == boundary:
                state = self._at_boundary(state, self.step)
            if stop.is_set() and self.step < self.total:
                self.checkpoints.save(self.step, state)
                self.checkpoints.wait()
                raise Stopped(self.step)
        return state

    def _advance(self, state: State, boundary: int, stop: threading.Event) -> State:
        """Train up to ``boundary``, where something is due, or until somebody asks to stop."""
        carry = self.program.layout.put(state)
        while self.step < boundary and not stop.is_set():
            count = min(self.program.chunk, boundary - self.step)
            feed = train_feed(self.experiment, self.step, count)
            carry = self.program.train(carry, feed, self.experiment.numbers, np.int32(count))
            self.step += count
            self._tick(carry)
        state = self.program.layout.get(carry)
        if bool(state.meter["bad"]):
            raise Diverged(int(state.step), diverge.explain(self.experiment, state))
        return state

    def _at_boundary(self, state: State, step: int) -> State:
        due = {name for name, n in self.every.items() if step % n == 0 or step == self.total}
        if "log" in due:
            state = self._log(state, step)
        if "eval" in due:
            self._evaluate(state, step, "validation")
        if step == self.total:
            self._evaluate(state, step, "test")
        if "probe" in due:
            self._look_inside(state)
            self.timer, self.timed_from = time.monotonic(), step
        # Last, so that no record up to a checkpoint is ever missing or written twice.
        if "checkpoint" in due:
            self.metrics.flush()
            self.checkpoints.save(step, state)
        return state

    def _log(self, state: State, step: int) -> State:
        """Write the means since the last log line, and empty the meter."""
        meter, norm = jax.device_get((state.meter, weight_norm(state.params)))
        count = max(1, int(meter["count"]))
        values = {
            "loss": float(meter["loss"]) / count,
            "learning_rate": self.experiment.learning_rate(step - 1),
            "gradient_norm": float(meter["gradient_norm"]) / count,
            "weight_norm": float(norm),
        }
        if not math.isfinite(values["weight_norm"]):
            raise Diverged(step, "the norm of the parameters is not finite")
        images = (step - (self.timed_from or 0)) * self.experiment.config.data.batch_size
        if images:  # none are timed yet if the call that compiled was the only one
            values["images_per_second"] = images / (time.monotonic() - self.timer)
        self._write(step, "train", values)
        self.shown = values["loss"], values.get("images_per_second")
        self.bar.update(step, *self.shown)
        self.timer, self.timed_from = time.monotonic(), step
        return state.replace(meter=self.program.empty_meter())

    def _evaluate(self, state: State, step: int, split: str) -> None:
        self.latest[split] = self.evaluate(state, split)
        processes.advanced()
        self._write(step, split, self.latest[split])
        self.timer, self.timed_from = time.monotonic(), step

    def _look_inside(self, state: State) -> None:
        for name, rows in prober.look(self.experiment, state):
            processes.advanced()
            self.metrics.write_probe(self.step, name, rows)

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        epoch = {"epoch": round(step / self.program.steps_per_epoch, 4)}
        self.metrics.write(step, split, epoch | values)
        if split != "train":
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.bar.line(f"step {step}  {split}  {shown}")

    def _tick(self, carry: State) -> None:
        """Show that the run moves: on the display and, now and then, in status.json."""
        if self.timed_from is None:
            jax.block_until_ready(carry)  # compilation is not part of any rate
            self.timer, self.timed_from = time.monotonic(), self.step
        processes.advanced()
        self.bar.update(self.step, *self.shown)
        if time.monotonic() - self.beat > HEARTBEAT_SECONDS:
            self.folder.set_status("running", self.step)
            self.beat = time.monotonic()

    def finish(self, state: State) -> dict[str, Any]:
        """The final metrics on validation and test, and the digest of the state."""
        metrics = {
            split: self.latest.get(split) or self.evaluate(state, split)
            for split in ("validation", "test")
        }
        self.checkpoints.wait()
        return {
            "status": "done",
            "step": self.total,
            "metrics": metrics,
            "digest": digest(state),
        }


@jax.jit
def weight_norm(params: Any) -> jax.Array:
    """The Euclidean norm of all parameters together."""
    return optax.tree.norm(params)
