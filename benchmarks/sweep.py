"""100 runs of an MLP in one sweep against the same loop in PyTorch.

Ten learning rates x ten seeds of the 3x100 MLP with BatchNorm on digits: 500 steps of batch 60 with
momentum SGD and a cosine schedule, five evaluations of validation and one of test. Whole processes
are timed, from their start to their end, in turn: what is imported, compiled (with a warm cache)
and written is in it. PyTorch keeps nothing but a number per run; ours leaves a folder for each.
PyTorch has one thread per process: a second one made so small a net no faster (n = 1 at rest) and
many times slower beside other work.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.digits_sweep import EVALUATIONS, STEPS
from benchmarks.measure import in_turn, installed, missing, ratios, spread, text
from benchmarks.picture import Bars
from benchmarks.sweep_ours import FILE
from bnresearch import config as configs
from bnresearch import study
from bnresearch.experiment import evaluator, initial_state, prepare, train_feed

HEADER = ("what", "seconds", "ms per run", "this / bnresearch, 2 workers", "n")
OURS, TORCH = "bnresearch, 2 workers", "PyTorch, 2 processes"


def run(quick: bool) -> dict[str, Any]:
    """Rows of seconds per 100 runs (median and quartiles), and what a bare run would take."""
    # A tenth of the runs proves as well that it runs.
    repeats, patience, scale = (2, 3, "smoke") if quick else (5, 20, "quick")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = study.plan(study.load(FILE), FILE, scale)
        data = write_arrays(folder / "digits.npz", plan)
        ways = {
            OURS: partial(ours, folder / "local", "local", scale),
            "bnresearch, in one process": partial(ours, folder / "inline", "inline", scale),
        }
        if installed("torch"):
            ways["PyTorch, in one process"] = partial(theirs, data, [["--threads=1"]])
            ways[TORCH] = partial(theirs, data, shares(2))
        seconds = in_turn(ways, repeats)
        if TORCH in ways and not quick:  # ten runs differ by more
            check_accuracy(ways)
        rows = [row(how, values, len(plan.runs), seconds[OURS]) for how, values in seconds.items()]
        return {
            "rows": rows,
            "left_out": missing(["torch"]),
            "bare_seconds_per_run": bare(plan, patience),
            "recognised": recognised(folder / "many", repeats),
        }


def row(how: str, values: list[float], runs: int, first: list[float]) -> dict[str, Any]:
    """A row; ``first`` are the seconds of our sweep."""
    return {
        "what": how,
        "seconds": spread(values),
        "seconds_per_run": spread([value / runs for value in values]),
        "this_over_ours": ratios(values, first),
    }


def write_arrays(path: Path, plan: study.Plan) -> Path:
    """What PyTorch gets: the very arrays, normalised and flat, and the grid."""
    dataset = prepare(configs.unresolve(plan.runs[0].resolved)).program.dataset
    arrays: dict[str, Any] = {"steps": STEPS, "batch": plan.runs[0].resolved["data"]["batch_size"]}
    for part in ("train", "validation", "test"):
        feed = dataset.feed(0, 0) if part == "train" else dataset.eval_feed(part)
        image = (np.asarray(feed["image"], np.float32) - dataset.info.mean) / dataset.info.std
        arrays[f"{part}_image"] = image.reshape(len(image), -1).astype(np.float32)
        arrays[f"{part}_label"] = np.asarray(feed["label"], np.int64)
    arrays["grid"] = np.array([(run.point["rate"], run.seed) for run in plan.runs])
    np.savez(path, **arrays)
    return path


def ours(out: Path, launcher: str, scale: str) -> dict[str, Any]:
    """The sweep as a process; its folder is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    return sweep_process(out, launcher, scale)


def sweep_process(out: Path, launcher: str, scale: str) -> dict[str, Any]:
    """What it prints."""
    arguments = [f"--out={out}", f"--launcher={launcher}", f"--scale={scale}"]
    return processes("benchmarks.sweep_ours", [arguments])[0]


def theirs(data: Path, arguments: list[list[str]]) -> dict[str, Any]:
    """The same runs in PyTorch, in as many processes as there are lists of arguments."""
    answers = processes("benchmarks.sweep_torch", [[f"--data={data}", *a] for a in arguments])
    return {"accuracy": [value for answer in answers for value in answer["accuracy"]]}


def shares(count: int) -> list[list[str]]:
    """Arguments for ``count`` processes with a core and a share of the grid each."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    return [
        ["--threads=1", f"--share={i}/{len(cores)}", f"--core={core}"]
        for i, core in enumerate(cores)
    ]


def processes(module: str, arguments: list[list[str]]) -> list[dict[str, Any]]:
    """Start them together, wait for all, and read what each prints last."""
    started = [
        subprocess.Popen([sys.executable, "-m", module, *given], stdout=subprocess.PIPE)
        for given in arguments
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{module} ended with an error")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def check_accuracy(ways: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Both sides have to have trained the same thing: their mean test accuracies agree."""
    means = {how: float(np.mean(ways[how]()["accuracy"])) for how in (OURS, TORCH)}
    if abs(np.subtract(*means.values())) > 0.01:
        raise RuntimeError(f"mean test accuracies differ by more than a point: {means}")


def bare(plan: study.Plan, repeats: int) -> dict[str, float]:
    """Seconds of the compiled calls of one run (start, steps, evaluations), with nothing around."""
    experiment = prepare(configs.unresolve(plan.runs[0].resolved))
    program, evaluate = experiment.program, evaluator(experiment, "running")

    def work() -> None:
        carry, step = program.layout.put(initial_state(experiment)), 0
        for _ in range(EVALUATIONS):
            feed = train_feed(experiment, step, STEPS // EVALUATIONS)
            count = jnp.int32(STEPS // EVALUATIONS)
            carry = program.train(carry, feed, experiment.numbers, count)
            step += STEPS // EVALUATIONS
            evaluate(program.layout.get(carry), "validation")
        evaluate(program.layout.get(carry), "test")

    return spread(in_turn({"bare": work}, repeats)["bare"])


def recognised(out: Path, repeats: int) -> dict[str, float]:
    """Seconds of a process that plans 2,000 runs and finds that all of them are done."""
    plan = study.plan(study.load(FILE), FILE, "full")
    finished = out / plan.runs[0].id
    ours(out, "inline", "smoke")
    for run in plan.runs:
        if not (out / run.id).exists():
            shutil.copytree(finished, out / run.id)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        if sweep_process(out, "inline", "full")["skipped"] != len(plan.runs):
            raise RuntimeError("finished runs were not recognised")
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per way; then what a run costs at least, and the time to see that runs are done."""
    lines = [
        (
            row["what"],
            text(row["seconds"]),
            text(row["seconds_per_run"], 1e3, 1),
            "" if row["what"] == OURS else text(row["this_over_ours"]),
            str(row["seconds"]["n"]),
        )
        for row in result["rows"]
    ]
    bare, done = result["bare_seconds_per_run"], result["recognised"]
    lines += [
        ("compiled calls of a run alone", "", text(bare, 1e3, 1), "", str(bare["n"])),
        ("2,000 finished runs recognised as done", text(done), "", "", str(done["n"])),
    ]
    return lines


def panels(result: dict[str, Any]) -> list[Bars]:
    """Seconds of 100 runs."""
    values = {row["what"]: {"": row["seconds"]} for row in result["rows"]}
    return [Bars("100 runs, whole processes", "seconds", values)]
