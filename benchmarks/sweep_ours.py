"""The runs of ``benchmarks.sweep`` as a sweep of bnresearch.

    python -m benchmarks.sweep_ours --out=DIR --scale=quick --launcher=local

plans the study `benchmarks.digits_sweep`, brings its runs to their ends, and prints one JSON
object: the seconds of planning and of the sweep, and the test accuracy of each run.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path

from bnresearch.imports import without_gc

FILE = Path(__file__).parent / "digits_sweep.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Plan and sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="quick")
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)

    from bnresearch.rundir import read_result
    from bnresearch.sweep import started_early, sweep

    workers = options.workers if options.launcher == "local" else 0
    with started_early(options.launcher, workers):  # as the command line does
        with without_gc():
            from bnresearch import study

        start = time.perf_counter()
        plan = study.plan(study.load(FILE), FILE, options.scale)
        planned = time.perf_counter()
        jobs = jobs_of(plan)
        counts = sweep(jobs, options.out, launcher=options.launcher, workers=workers, show="off")
    swept = time.perf_counter()
    results = [read_result(options.out / job.id) or {} for job in jobs]
    accuracy = [result["metrics"]["test"]["accuracy"] for result in results]
    print(
        json.dumps(
            {
                "plan": planned - start,
                "sweep": swept - planned,
                "skipped": counts.skipped,
                "accuracy": accuracy,
            }
        )
    )


def jobs_of(plan):
    """What the verb ``study`` makes of a plan."""
    from bnresearch.sweep import Job

    return [Job(run.id, run.id, run.arm, run.resolved, run.program) for run in plan.runs]


if __name__ == "__main__":
    main()
    gc.freeze()  # as the command line does before it ends
