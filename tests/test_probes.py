"""Probes of a run: what they record, that they only look, and what they refuse."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from probe_tools import check
from run_tools import DIGITS, ROOT, After, metrics, train

from bnresearch import config as configs
from bnresearch import experiment as experiments
from bnresearch.errors import Stopped, UserError
from bnresearch.experiment import initial_state, prepare
from bnresearch.metrics import PROBES as FILE
from bnresearch.metrics import Metrics, read_probes
from bnresearch.probes import PROBES, prober
from bnresearch.probes.inside import Inside
from bnresearch.runs import read_run
from bnresearch.together import Member
from bnresearch.train import run

STEPS = 12
SHORT = (
    "parallel.devices=1",
    "model.mlp.widths=(7,4)",
    "model.mlp.dropout=0.2",
    f"train.duration={STEPS}st",
    "train.log_every=5st",
    "train.eval_every=4st",
    "train.checkpoint_every=6st",
)
LOOKING = ("probes.names=('statistics','effective_rate')", "probes.every=5st", "probes.batches=2")


def load(*overrides):
    return configs.load(DIGITS, [*SHORT, *overrides])


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Compiled in less time, to something slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that nobody looks at: its folder and its result."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(load(), folder, show="off")


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked")
    return folder, run(load(*LOOKING), folder, show="off")


def lines(folder):
    return (folder / FILE).read_text().splitlines()


def test_a_run_without_probes_compiles_nothing_for_them_and_keeps_no_file(compiled, request):
    """The first test, so that everything is compiled here."""
    folder, _ = request.getfixturevalue("plain")
    assert "jit(run)" in compiled
    assert "jit(viewed)" not in compiled
    assert not (folder / FILE).exists()


# ---- Records


def test_it_looks_at_the_first_step_every_so_often_and_at_the_last(looked):
    records = read_probes(looked[0])
    counts = Counter((record["step"], record["probe"]) for record in records)
    assert counts == {
        (step, probe): 2 for step in (0, 5, 10, STEPS) for probe in ("statistics", "effective_rate")
    }


def test_a_record_names_step_probe_site_and_depth_first(looked):
    first = json.loads(lines(looked[0])[0])
    assert list(first.items())[:4] == [
        ("step", 0),
        ("probe", "statistics"),
        ("site", "norm1"),
        ("depth", 1),
    ]
    assert (first["running_mean"], first["running_var"]) == (0, 1)


def test_a_run_reads_what_its_probes_found(looked):
    folder, _ = looked
    config = json.loads((folder / "config.json").read_text())
    named = folder.with_name(configs.config_hash(config)[:16])
    named.symlink_to(folder)
    files = read_run(named)
    assert ("effective_rate", "angle") in files.probes
    frame = files.probes["statistics", "batch_var"]
    assert list(frame.columns) == ["step", "site", "depth", "value"]
    assert frame["step"].tolist() == [0, 0, 5, 5, 10, 10, 12, 12]
    assert frame["depth"].tolist() == [1, 2] * 4
    assert (frame["value"] > 0).all()


def test_events_of_tensorboard_are_named_by_probe_and_site(tmp_path):
    from test_metrics import events

    with Metrics(tmp_path) as writer:
        rows = [{"site": "", "depth": 0, "growth": 1.5}, {"site": "a/norm1", "depth": 1, "norm": 2}]
        writer.write_probe(3, "gradients", rows)
    assert events(tmp_path) == [
        (3, "probes/gradients/growth", 1.5),
        (3, "probes/gradients/a/norm1/norm", 2.0),
    ]


def test_what_is_not_finite_is_read_as_a_float(tmp_path):
    with Metrics(tmp_path) as writer:
        writer.write_probe(0, "hessian", [{"site": "", "depth": 0, "eigenvalue": np.nan}])
    assert '"eigenvalue": "NaN"' in lines(tmp_path)[0]
    assert np.isnan(read_probes(tmp_path)[0]["eigenvalue"])


# ---- They only look


def test_state_and_metrics_are_those_of_the_run_that_nobody_looks_at(plain, looked):
    assert looked[1]["digest"] == plain[1]["digest"]
    assert metrics(looked[0]) == metrics(plain[0])


def test_runs_that_differ_in_numbers_share_what_was_compiled(looked, tmp_path, compiled):
    others = ("seed=4", "optim.learning_rate=0.02", "norm.batch.decay=0.7", "probes.batches=3")
    run(load(*LOOKING, *others, "probes.sites=.*2"), tmp_path, show="off")
    assert compiled == []
    assert {record["site"] for record in read_probes(tmp_path)} == {"norm2"}


def test_probes_are_part_of_the_config_but_not_of_the_program():
    one, other = (configs.resolve(load(*more)) for more in ((), LOOKING))
    assert configs.program_key(one) == configs.program_key(other)
    assert configs.config_hash(one) != configs.config_hash(other)
    assert configs.unresolve(other).probes.names == ("statistics", "effective_rate")


# ---- Going on


@pytest.mark.parametrize("looks", [0, 3, 7, 10])
def test_a_resumed_run_records_what_an_untouched_one_does(looked, tmp_path, looks):
    with pytest.raises(Stopped):
        run(load(*LOOKING), tmp_path, show="off", stop=After(looks))
    run(load(*LOOKING), tmp_path, show="off")
    assert lines(tmp_path) == lines(looked[0])


@pytest.mark.parametrize(("resumed", "kept"), [(0, []), (3, [0, 3]), (9, [0, 3, 9])])
def test_a_run_that_goes_on_keeps_what_lies_before(tmp_path, resumed, kept):
    """One that begins anew looks at step 0 again."""
    with Metrics(tmp_path) as writer:
        for step in (0, 3, 9):
            writer.write_probe(step, "hessian", [{"site": "", "depth": 0, "trace": 1.0}])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 9, "pro')
    with Metrics(tmp_path, resumed):
        assert [record["step"] for record in read_probes(tmp_path)] == kept


# ---- Elsewhere

WAYS = {
    "jit on two devices": ("parallel.devices=2",),
    "shard_map": ("parallel.mode=shard_map", "parallel.devices=2"),
    "pmap": ("parallel.mode=pmap", "parallel.devices=2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_found_does_not_depend_on_the_mode(way):
    found = []
    for more in (("parallel.devices=1",), WAYS[way]):
        experiment = prepare(load("model.mlp.dropout=0.0", "probes.batches=1", *more))
        inside = Inside(experiment, initial_state(experiment))
        found.append(PROBES["statistics"](inside))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), *found)


def test_a_member_of_a_population_is_looked_at_by_itself(compiled):
    """Its training waits for that of others; looking inside does not, nor is it compiled anew."""
    found = []
    for make in (prepare, Member(lambda prepare: None, 2).prepare):
        experiment = make(load(*LOOKING))
        state = initial_state(experiment)
        compiled.clear()
        found.append(dict(prober.look(experiment, state)))
    assert experiment.members == 2
    assert found[0] == found[1]
    assert compiled == []


# ---- Residual nets

RESNET = ("parallel.devices=1", "model.resnet.width=0.25", "data.batch_size=12")
KINDS = ("norm.rules=('stage1/.* -> none','stage2/.* -> group groups=2')", "probes.batches=2")


def a_resnet(*overrides):
    """Its experiment, and a state of ones, which takes no compilation."""
    path = ROOT / "configs" / "digits_resnet.py"
    experiment = prepare(configs.load(path, (*RESNET, *overrides)))
    state = jax.eval_shape(experiment.program.init, experiment.numbers)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state)
    return experiment, ones.replace(step=np.int32(0))


@pytest.fixture(scope="module")
def resnet():
    """A net with no norm, group norm and batch norm in its stages."""
    experiment, _ = a_resnet(*KINDS)
    return Inside(experiment, initial_state(experiment))


# The Hessian is about no site, and takes ten seconds to compile.
@pytest.mark.parametrize("probe", [name for name in PROBES if name != "hessian"])
def test_every_probe_finds_finite_numbers_at_the_sites_of_a_resnet(probe, resnet):
    sites = [f"stage{i}/block1/norm{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert resnet.sites == ["stem/norm1", *sites]
    check(PROBES[probe](resnet), probe, resnet.sites, ["stem/norm1", *sites[4:]])


def test_layers_are_found_where_blocks_branch():
    """In v2 a shortcut is a layer without a site, and the first norm of a block reads a sum. The
    parameters of a split norm have two axes, and are no weights."""
    branching = ("model.resnet.version=v2", "model.resnet.shortcut=projection")
    found = Inside(*a_resnet(*branching, "norm.kind=split")).structure
    blocks = [("norm1", "norm2"), *[("norm1", "conv_shortcut", "norm2")] * 2]
    layers = [f"stage{i}/block1/{name}" for i, names in enumerate(blocks, 1) for name in names]
    assert found.layers == (*layers, "norm", "head")
    assert found.weights == {
        "stage1/block1/norm1": "stem/conv1/kernel",
        **{f"stage{i}/block1/norm2": f"stage{i}/block1/conv1/kernel" for i in (1, 2, 3)},
    }
    depths = [found.depths[f"stage2/block1/{n}"] for n in ("norm1", "conv_shortcut", "norm2")]
    assert depths == [3, 4, 4]


# ---- Bad input

BAD = {
    "probes.names=('gradient',)": ("probe in probes.names 'gradient'", "did you mean gradients?"),
    "probes.names=('hessian','hessian')": ("names a probe twice",),
    "probes.names=(3,)": ("probe in probes.names 3", "choose one of: activations"),
    "probes.every=often": ("probes.every='often' is no duration",),
    "probes.every=0st": ("longer than nothing",),
    "probes.batches=0": ("probes.batches=0 must be at least 1",),
    "probes.sites=norm(": ("probes.sites='norm('", "no regular expression", "'stage1/.*'"),
}


@pytest.mark.parametrize("override", BAD)
def test_what_cannot_be_is_refused(override, refused):
    refused(train(override), *BAD[override])


def test_sites_that_are_not_there_are_refused_before_anything_is_compiled(refused, compiled):
    overrides = ("probes.names=('statistics',)", "probes.sites=stage9/.*", *SHORT)
    message = "probes.sites='stage9/.*' matches no site; the sites are: norm1, norm2"
    refused(train(*overrides), message)
    with pytest.raises(UserError, match="matches no site"):
        experiments.check(load(*overrides))
    assert "jit(run)" not in compiled
