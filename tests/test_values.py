"""Over how many values each site of a run normalises, by hand and as the traced step has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS, ROOT, read

from bnresearch import config as configs
from bnresearch import values
from bnresearch.doctor.run import diagnose_run
from bnresearch.experiment import prepare
from bnresearch.parallel import MODES, make_layout
from bnresearch.sets import Sets
from bnresearch.train import run

# Examples of a set in a batch of 64 on 8 devices.
EXAMPLES = {"global": 64, "group:4": 32, "group:2": 16, "device": 8, "ghost:16": 16, "ghost:4": 4}
SHORT = ("train.duration=2st", "train.log_every=2st", "train.checkpoint_every=2st")
MLP = ("parallel.devices=8", "data.batch_size=64", "model.mlp.widths=(12, 10)", *SHORT)
RESNET = str(ROOT / "configs" / "digits_resnet.py")


@pytest.mark.parametrize("scope", EXAMPLES)
@pytest.mark.parametrize("mode", MODES)
def test_examples_of_a_set_are_those_that_the_traced_step_counts(mode, scope):
    layout = make_layout(mode, scope, 8, 64)
    counted = []

    def step(state, feed, numbers, count):
        counted.append(Sets(layout.constrain(feed[layout.rows()]), layout.scope).count)
        return layout.mean_over_devices(jnp.zeros(()))

    compiled = layout.compile(step, sharded_feed=False, donate=False)
    feed = layout.like(jax.ShapeDtypeStruct((64, 7, 3), jnp.float32))
    state = layout.like(jax.ShapeDtypeStruct((), jnp.float32))
    jax.eval_shape(compiled, state, feed, {}, np.int32(1))
    assert counted[0] == 7 * EXAMPLES[scope]
    assert values.examples_per_set(layout) == EXAMPLES[scope]


def by_site(config, *overrides):
    return values.record(values.of_run(prepare(configs.load(config, overrides))))["by_site"]


@pytest.mark.parametrize(
    ("overrides", "n"),
    [
        (("norm.scope=group:4", "parallel.mode=shard_map"), (32, 32)),
        (("norm.scope=device", "parallel.mode=pmap", "train.accumulate=2"), (4, 4)),
        (("train.accumulate=2", "train.accumulate_statistics=batch"), (64, 64)),
        (("norm.kind=ghost", "norm.ghost.size=4", "norm.rules=('norm2 -> dyt',)"), (4, None)),
        (("norm.rules=('norm1 -> split splits=4', 'norm2 -> virtual')",), (16, 32)),
    ],
)
def test_a_run_without_positions(overrides, n):
    assert by_site(DIGITS, *MLP, *overrides) == dict(zip(("norm1", "norm2"), n, strict=True))


def test_batches_times_positions_in_a_resnet():
    """Batches of 60 at 8x8, 4x4 and 2x2 positions; one site on two features of one example, one
    on those of 4 neighbouring examples, one on none."""
    rules = (
        "stem/norm1 -> group groups=8",
        "stage1/block1/norm1 -> batch_group examples_per_group=4 features_per_group=2",
        "stage1/block1/norm2 -> none",
        "stage2/block1/norm1 -> layer over=features",
        "stage2/block1/norm2 -> instance",
    )
    assert by_site(RESNET, "parallel.devices=1", f"norm.rules={rules}") == {
        "stem/norm1": 2 * 64,  # of 16 features
        "stage1/block1/norm1": 4 * 64 * 2,
        "stage1/block1/norm2": None,
        "stage2/block1/norm1": 32,
        "stage2/block1/norm2": 16,
        "stage3/block1/norm1": 60 * 4,
        "stage3/block1/norm2": 60 * 4,
    }


def test_a_run_says_it_and_warns_under_16(tmp_path, capsys):
    config = configs.load(DIGITS, [*MLP, "parallel.devices=1", "norm.scope=ghost:8"])
    run(config, tmp_path, show="lines")
    lines = capsys.readouterr().err.splitlines()
    assert "note: norms take statistics over 8 values, as at norm1: 8 examples" in lines
    (warning,) = (line for line in lines if line.startswith("warning: "))
    assert warning.startswith("warning: fewer than 16 values at norm1 (8), norm2 (8): ")
    assert "a wider norm.scope (it is ghost:8)" in warning
    recorded = {"fewest": 8, "at": "norm1", "by_site": {"norm1": 8, "norm2": 8}}
    assert read(tmp_path / "status.json")["values"] == recorded


def test_lines_name_the_fewest_and_not_too_many():
    sites = {
        f"norm{i}": values.Site("batch", True, values.Over(4, positions))
        for i, positions in enumerate((300, 3, 3, 3, 3, 3, 3))
    }
    note, warning = values.lines(sites, "ghost:4")
    assert note == (
        "note: norms take statistics over 12 to 1,200 values, the fewest at norm1: "
        "4 examples x 3 positions"
    )
    assert "norm1 (12), norm2 (12), norm3 (12), norm4 (12) and 2 more: " in warning
    (note,) = values.lines({"norm1": values.Site("batch", True, values.Over(16))}, "global")
    assert note == "note: norms take statistics over 16 values, as at norm1: 16 examples"
    assert values.lines({"norm1": values.Site("none", False, None)}, "global") == []


def test_group_norm_of_few_values_is_told_otherwise():
    sites = {"norm1": values.Site("group", False, values.Over(features=2))}
    _, warning = values.lines(sites, "global")
    assert warning == (
        "warning: fewer than 16 values at norm1 (2): that is little of what is normalised; choose "
        "fewer groups, or another norm.kind"
    )


@pytest.mark.slow
def test_the_doctor_says_the_same(tmp_path):
    config = configs.load(DIGITS, [*MLP, "norm.scope=group:2", "train.accumulate=2"])
    run(config, tmp_path, show="off")
    (found,) = (f for f in diagnose_run(tmp_path, batches=2).findings if f.check == "few_values")
    assert found.numbers["values"] == read(tmp_path / "status.json")["values"]["by_site"]
    assert found.numbers["values"] == {"norm1": 8, "norm2": 8}
