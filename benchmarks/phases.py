"""Where the seconds before the first step go: ``python -m benchmarks.phases CONFIG``.

Does what ``python -m bnresearch train`` does up to the end of the first step, without a run folder,
and prints the seconds of each phase as one JSON object. Run by ``benchmarks.start``.
"""

import itertools
import json
import sys
import time

START = time.monotonic()


def main(path: str) -> None:
    """Print the seconds of each phase."""
    marks = [("", START)]

    def mark(name: str) -> None:
        marks.append((name, time.monotonic()))

    import jax

    mark("import jax")
    from bnresearch import config as configs
    from bnresearch import train
    from bnresearch.experiment import initial_state, prepare, train_feed

    mark("other imports")
    train.enable_compilation_cache()
    experiment = prepare(configs.load(path))
    mark("config, data, tracing")
    program = experiment.program
    state = jax.block_until_ready(initial_state(experiment))
    mark("initial state")
    carry = program.layout.put(state)
    feed = jax.block_until_ready(train_feed(experiment, 0, 1))
    mark("first batch to the device")
    jax.block_until_ready(program.train(carry, feed, experiment.numbers, jax.numpy.int32(1)))
    mark("train step: trace, load or compile, run")
    seconds = {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
