"""Jobs for the tests of sweeps: tiny MLPs on digits, and functions that do what they are told."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from run_tools import DIGITS, ROOT

from bnresearch import config
from bnresearch.sweep.jobs import Job

TINY = (
    "model.mlp.widths=(8,)",
    "train.duration=12st",
    "train.log_every=6st",
    "train.eval_every=12st",
    "train.checkpoint_every=never",
    "parallel.devices=1",
)
DIVERGING = ("optim.learning_rate=1e30", "norm.kind=none")
TOO_LARGE = ("data.batch_size=100000",)  # which is seen when the data are there

# A study file whose runs do ``what`` the arguments say.
DOING = '''"""Does what it is told."""
import os, signal, sys, time
from bnresearch.study import Scale, Study, final

def does(seed, what="", seconds=0.0, log=""):
    if log:
        with open(log, "a") as file:
            file.write(f"{what} {seed}\\n")
    time.sleep(seconds)
    while what == "wait" and not os.path.exists(log + ".go"):
        time.sleep(0.05)
    if what == "fail":
        raise ValueError("no such thing")
    if what == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "end":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "leave":
        sys.exit("goodbye")
    if what == "exit":
        os._exit(7)
    if what == "one":
        return 1.5
    return {"double": 2 * seed, "cores": len(os.sched_getaffinity(0))}

def get_study():
    scales = {name: Scale(seeds=2) for name in ("smoke", "quick", "full")}
    arms, measures = {"a": {"what": "a"}, "b": {"what": "b"}}, {"double": final("double")}
    return Study(question="?", source="", prediction="", function=does, scales=scales, arms=arms,
                 measures=measures)
'''

# A sweep in a process of its own: python -c SWEEP folder launcher < pickled jobs.
SWEEP = """
import pickle, sys
from bnresearch.errors import Stopped
from bnresearch.sweep import sweep
jobs = pickle.load(sys.stdin.buffer)
try:
    workers = 2 if sys.argv[2] == "local" else 0
    print(sweep(jobs, sys.argv[1], launcher=sys.argv[2], workers=workers, show="off"))
except (Stopped, KeyboardInterrupt) as error:
    print(repr(error))
    sys.exit(75)
"""


def training(*overrides, arm="batch"):
    """A job that trains the config with these overrides."""
    resolved = config.resolve(config.load(DIGITS, [*TINY, *overrides]))
    name = config.config_hash(resolved)[:16]
    return Job(name, " ".join(overrides), arm, resolved, config.program_key(resolved))


def trainings(count, *overrides, arm="batch"):
    """The same with several seeds."""
    return [training(f"seed={seed}", *overrides, arm=arm) for seed in range(count)]


def doing(folder, what="", seed=0, program="", **arguments):
    """A job that calls the function of DOING, whose file is written into ``folder``."""
    path = Path(folder) / "doing.py"
    if not path.exists():
        path.write_text(DOING)
    arguments |= {"what": what}
    text = DOING[DOING.index("def does") : DOING.index("def get_study")].rstrip() + "\n"
    resolved = {
        "schema": 1,
        "function": "does",
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "arguments": arguments,
        "seed": seed,
    }
    name = config.config_hash(resolved)[:16]
    return Job(name, f"{what} seed={seed}", what, resolved, program, str(path))


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def start(code, *arguments, **options):
    """Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
