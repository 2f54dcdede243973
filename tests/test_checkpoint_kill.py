"""Checkpoints: nothing lost to a kill, at whatever moment it comes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnresearch import checkpoint

CHILD = """
import os, sys
import numpy as np
from bnresearch import checkpoint

def state(step):
    arrays = np.random.default_rng(step).standard_normal((10, 1_250_000), dtype=np.float32)
    return {"step": np.int32(step), "params": {f"layer{n}": a for n, a in enumerate(arrays)}}

folder, log = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(folder, keep=2)
found = checkpoints.restore(state(0))
step = found[0] if found else 0
print("from", step, checkpoint.digest(found[1]) if found else "", flush=True)
while True:
    step += 1
    new = state(step)
    with open(log, "a") as file:
        file.write(f"{step} {checkpoint.digest(new)}\\n")
    checkpoints.save(step, new)
    print("saving", step, flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_the_checkpoints_before(tmp_path):
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    source = Path(checkpoint.__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(source)}
    chance = random.Random(0)
    last = 0
    for kill in range(8):
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(log)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        _, step, *digest = child.stdout.readline().split()
        if kill:
            recorded = dict(line.split() for line in log.read_text().splitlines())
            assert int(step) > last
            assert digest == [recorded[step]]
        for _ in range(2):  # when the second save has begun, the first is on disk
            child.stdout.readline()
        time.sleep(chance.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        _, errors = child.communicate()
        assert errors == ""
        last = int(step)
    names = [path.name for path in folder.iterdir()]
    # At most the two that are kept, one half-written, and one whose deletion was interrupted.
    assert len(names) <= 4
    assert not any(name.startswith("damaged") for name in names)
