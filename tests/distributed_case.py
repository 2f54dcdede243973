"""One process of several: python distributed_case.py PROCESS PROCESSES ADDRESS OUT CASES.

Trains the digits MLP for 50 steps by the loop's own functions in every case (mode and scope, as
JSON); the first process writes parameters and statistics to OUT, a .npz.
"""

import json
import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")

from test_parallel import digits_config, trained  # noqa: E402

from bnresearch import distributed  # noqa: E402
from bnresearch.processes import DEFAULTS, plan  # noqa: E402

STEPS = 50


def states(cases):
    """The parameters and statistics of each case, by name."""
    found = {}
    for mode, scope in cases:
        state = trained(digits_config(mode, scope, "parallel.devices=0"), STEPS)
        tree = {"params": state.params, "batch_stats": state.batch_stats}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[f"{mode} {scope} {name}"] = np.asarray(leaf)
    return found


def main(process, processes, address, out, cases):
    given = {"processes": int(processes), "process": int(process), "coordinator": address}
    with distributed.joined(plan(DEFAULTS | given) if int(processes) > 1 else None):
        found = states(json.loads(cases))
        if distributed.is_first():
            np.savez(out, **found)
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
