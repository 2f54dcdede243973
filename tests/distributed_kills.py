"""Kills a run of two processes again and again, and looks whether it ends with the same bits.

    python tests/distributed_kills.py 20

Which process is killed, its supervisor or what computes, and when, is drawn; the same command then
goes on. Prints one line per kill: who, after how many steps, how long until all had ended, and what
the run folder said.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from distributed_tools import children, training
from run_tools import metrics, read

OVERRIDES = (
    "data.batch_size=64",
    "model.mlp.widths=(16, 12)",
    "train.duration=6000st",
    "train.log_every=25st",
    "train.eval_every=1000st",
    "train.checkpoint_every=50st",
)


def logged(workdir):
    """The last step that a run has logged."""
    return max((line["step"] for line in metrics(workdir)), default=0)


def killed(run, draw):
    """Lets a run go on and kills one of its processes; the seconds until all had ended."""
    with training(2, run, *OVERRIDES) as running:
        wanted = logged(run) + 25 * draw.randrange(1, 6)
        running.until(lambda: logged(run) >= wanted)
        time.sleep(draw.random())
        process = running.processes[draw.randrange(2)]
        pid = draw.choice([process.pid, children(process)[0]])
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        running.wait()
        return time.monotonic() - started


def main(kills):
    folder, draw = Path(tempfile.mkdtemp()), random.Random(0)
    with training(2, folder / "whole", *OVERRIDES) as whole:
        assert whole.wait() == [0, 0], whole.said(0)
    run = folder / "run"
    for number in range(1, kills + 1):
        seconds = killed(run, draw)
        status = read(run / "status.json")
        print(f"{number}  {seconds:.1f} s  step {logged(run)}  {status['message']}", flush=True)
    with training(2, run, *OVERRIDES) as running:
        assert running.wait() == [0, 0], running.said(0)
    found, wanted = (read(path / "result.json") for path in (run, folder / "whole"))
    same = found["digest"] == wanted["digest"] and metrics(run) == metrics(folder / "whole")
    print("the same digest and metrics" if same else "NOT the same", found["digest"])
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
