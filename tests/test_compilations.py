"""What is compiled, and how often: each step once per shape and mode, and nothing in a loop."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS, After
from sweep_tools import training, trainings

from bnresearch import config as configs
from bnresearch.errors import Stopped
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.parallel import MODES
from bnresearch.sweep import sweep
from bnresearch.train import run

# A run that comes by everything that may be due, in calls of several lengths.
COMING_BY_ALL = (
    "train.duration=12st",
    "train.log_every=5st",
    "train.eval_every=4st",
    "train.checkpoint_every=6st",
)
OTHERS = (  # numbers, and what only the loop looks at
    "seed=3",
    "optim.learning_rate=0.01",
    "optim.sgd.momentum=0.5",
    "norm.batch.decay=0.8",
    "train.log_every=1st",
    "train.eval_every=12st",
)
WAYS = {
    "jit": ("parallel.devices=1",),
    "jit on two devices": ("parallel.devices=2",),
    "shard_map": ("parallel.mode=shard_map", "parallel.devices=2"),
    "pmap": ("parallel.mode=pmap", "parallel.devices=2"),
    "accumulated": ("parallel.devices=1", "train.accumulate=2"),
    "convolutions": ("parallel.devices=1", "model.name=plain"),
}
NETS = ("model.plain.widths=(4,)", "model.plain.convs=(1,)")


def load(way, *overrides, width=7):
    """A width that no other test has, so that nothing is compiled yet."""
    width = f"model.mlp.widths=({width},)"
    return configs.load(DIGITS, [*COMING_BY_ALL, *WAYS[way], *NETS, width, *overrides])


def steps_of(names):
    """How often the training and the evaluation step are among what was compiled."""
    counts = Counter(name.removeprefix("jit(").removeprefix("pmap(").rstrip(")") for name in names)
    return counts["run"] + counts["_fun"], counts["eval_step"]  # pmap calls its step _fun


@pytest.mark.parametrize("way", WAYS)
def test_a_run_compiles_each_step_once_and_the_next_one_nothing(tmp_path, compiled, way):
    run(load(way), tmp_path / "a", show="off")
    assert steps_of(compiled) == (1, 2)  # validation and test differ in the number of pictures
    compiled.clear()
    run(load(way, *OTHERS), tmp_path / "b", show="off")
    assert compiled == []


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_compiles_nothing_either(tmp_path, compiled, way):
    run(load(way, width=6), tmp_path / "a", show="off")
    with pytest.raises(Stopped):
        run(load(way, "seed=1", width=6), tmp_path / "b", show="off", stop=After(4))
    compiled.clear()
    run(load(way, "seed=1", width=6), tmp_path / "b", show="off")
    assert compiled == []


def test_another_shape_is_another_step(tmp_path, compiled):
    for index, batch in enumerate((60, 30)):
        run(load("jit", f"data.batch_size={batch}", width=5), tmp_path / str(index), show="off")
    assert steps_of(compiled)[0] == 2


def test_a_population_compiles_each_step_once_for_all_members(tmp_path, compiled):
    width = "model.mlp.widths=(11,)"
    jobs = [*trainings(5, width), training(width, "train.log_every=4st", "seed=6")]
    assert sweep(jobs, tmp_path, launcher="population", workers=4, show="off").done == 6
    assert Counter(compiled)["jit(stacked)"] == 3  # training, validation, test
    assert steps_of(compiled) == (0, 0)
    compiled.clear()
    more = trainings(3, width, "optim.learning_rate=0.02")
    assert sweep(more, tmp_path, launcher="population", workers=4, show="off").done == 3
    assert compiled == []


@pytest.mark.parametrize("mode", MODES)
def test_the_step_takes_the_memory_of_its_input(mode):
    """Otherwise a state would be there twice."""
    experiment = prepare(load("jit", f"parallel.mode={mode}", "parallel.devices=2"))
    program = experiment.program
    before = program.layout.put(initial_state(experiment))
    feed = train_feed(experiment, 0, 1)
    after = program.train(before, feed, experiment.numbers, np.int32(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(jnp.ravel(after.step)[0]) == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, feed)))
