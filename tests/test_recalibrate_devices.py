"""Recalibration over devices and processes: the statistics are those of all data together."""

import pickle
import socket
import subprocess
import sys

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from recalibrate_tools import WAYS, Mlp, X, assert_close, by_hand, cut, random_variables
from run_tools import ROOT

import bnresearch


@pytest.fixture(scope="module")
def variables():
    return random_variables()


@pytest.mark.parametrize("how", WAYS)
def test_batches_over_eight_devices_give_the_statistics_of_the_whole_batch(how, variables):
    mesh = jax.make_mesh((8,), ("data",))
    batches = cut(X[:120], 40)
    spread = [jax.device_put(b, NamedSharding(mesh, PartitionSpec("data"))) for b in batches]
    on_all = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    new = bnresearch.recalibrate(Mlp(), on_all, spread, how=how)
    assert_close(new["batch_stats"], by_hand(variables, batches, how))


PROCESS = """
import os, pickle, sys
import jax
index, address, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
try:
    jax.distributed.initialize(address, 2, index, initialization_timeout=60)
    from jax.experimental.multihost_utils import process_allgather
    process_allgather(jax.numpy.ones(2))
except Exception as error:
    print("no collectives:", error)
    sys.exit(77)
sys.path.insert(0, "tests")
import bnresearch
from recalibrate_tools import Mlp, X, cut
variables = pickle.load(open(path, "rb"))
mine = cut(X[:37], 10) if index == 0 else cut(X[37:], 20)
for how in ("one_pass", "layer_after_layer"):
    new = bnresearch.recalibrate(Mlp(), variables, mine, how=how)
    pickle.dump(new["batch_stats"], open(f"{path}.{how}.{index}", "wb"))
for wrong in ([X[:10] * float("nan")] * 2, [], mine[:1]):
    for how in ("one_pass", "layer_after_layer"):
        try:
            given = wrong if index == 0 else cut(X[37:], 20)
            bnresearch.recalibrate(Mlp(), variables, given, count=2, how=how)
            print("REFUSED nothing")
        except bnresearch.errors.UserError as error:
            print("REFUSED", error)
"""


@pytest.mark.slow
def test_two_processes_with_unequal_shares_get_the_statistics_of_all(tmp_path, variables):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = tmp_path / "variables"
    path.write_bytes(pickle.dumps(variables))
    command = [sys.executable, "-c", PROCESS]
    both = [
        subprocess.Popen(
            [*command, str(index), address, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    if any(process.returncode == 77 for process in both):
        pytest.skip(f"this jax has no collectives between processes on CPU: {said}")
    assert [process.returncode for process in both] == [0, 0], said
    batches = cut(X[:37], 10) + cut(X[37:], 20)
    for how in WAYS:
        found = [pickle.loads((tmp_path / f"variables.{how}.{i}").read_bytes()) for i in (0, 1)]
        assert_close(found[0], found[1], 0)
        assert_close(found[0], by_hand(variables, batches, how))
    # What one cannot do, none does, and nobody waits.
    reasons = ["is not finite in batch 0"] * 2 + ["no batch"] * 2 + ["1 batches were given"] * 2
    for index, text in enumerate(said):
        refused = [line for line in text.splitlines() if line.startswith("REFUSED")]
        assert len(refused) == len(reasons), text
        for line, reason in zip(refused, reasons, strict=True):
            assert reason in line
            assert ("process 0: " in line) == (index == 1)  # whose it is, said to the other
