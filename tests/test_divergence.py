"""A run that diverges: what ends it, what it leaves untouched, and the site that is named."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS, SHORT, command, read, snapshot

from bnresearch import __main__ as cli
from bnresearch import config as configs
from bnresearch import diverge, parallel
from bnresearch.errors import Diverged
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.state import State, empty_meter
from bnresearch.step import looped, make_train_step, single
from bnresearch.train import run

WIDTHS = (8,) * 11  # norm10 and norm11 come before norm2 in the alphabet


def planted(kind, scales, *overrides):
    """An experiment and its first state, with the kernels of some layers multiplied."""
    config = configs.load(
        DIGITS,
        ["parallel.devices=1", f"model.mlp.widths={WIDTHS}", f"norm.kind={kind}", *overrides],
    )
    experiment = prepare(config)
    state = jax.device_get(initial_state(experiment))
    for layer, scale in scales.items():
        state.params[layer]["kernel"] = state.params[layer]["kernel"] * np.float32(scale)
    return experiment, state


def first_site_by_hand(experiment, state):
    """The first site with a mean or variance beyond float32, by a forward pass in float64."""
    dataset = experiment.program.dataset
    feed = dataset.feed(experiment.seed, 0, 1)
    batch = dataset.train_batch(feed, jnp.int32(experiment.seed), jnp.int32(0), jnp.arange(60))
    x = np.asarray(batch["image"], np.float64).reshape(60, -1)
    for index in range(1, len(WIDTHS) + 1):
        x = x @ state.params[f"dense{index}"]["kernel"].astype(np.float64)
        mean, var = x.mean(0), x.var(0)
        if max(np.abs(mean).max(), var.max()) > np.finfo(np.float32).max:
            return f"norm{index}"
        if experiment.config.norm.kind == "batch":
            x = (x - mean) / np.sqrt(var + 1e-5)
        x = np.maximum(x, 0)
    return None


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(
    ("scales", "site"),
    [
        ({"dense1": 1e30}, "norm1"),
        ({"dense2": 1e30}, "norm2"),
        ({"dense10": 1e30}, "norm10"),
        ({"dense2": 1e30, "dense10": 1e30}, "norm2"),
        ({"dense11": 1e30, "dense9": 1e30}, "norm9"),
    ],
)
def test_the_first_site_in_order_of_execution_is_named(kind, scales, site):
    experiment, state = planted(kind, scales)
    assert first_site_by_hand(experiment, state) == site
    assert diverge.explain(experiment, state) == f"the statistics of site {site} are not finite"


def test_sites_are_in_order_of_execution():
    experiment, state = planted("batch", {})
    sites = [site for site, _ in diverge.site_moments(experiment, state)]
    assert sites == [f"norm{index}" for index in range(1, 12)]


@pytest.mark.parametrize("mode", parallel.MODES)
def test_the_refused_step_is_replayed_as_it_was(mode):
    """On its devices, microbatch by microbatch: the moments of the first site, against numpy."""
    overrides = [
        f"parallel.mode={mode}",
        "parallel.devices=8",
        "norm.scope=group:4",
        "data.batch_size=64",
        "train.accumulate=2",
        "train.duration=50st",
        "model.mlp.dropout=0.5",
    ]
    experiment = prepare(configs.load(DIGITS, overrides))
    state = jax.device_get(initial_state(experiment))
    dataset = experiment.program.dataset
    batch = dataset.train_batch(dataset.feed(0, 0), 0, 0, jnp.arange(64))
    x = np.asarray(batch["image"], np.float64).reshape(64, -1) @ state.params["dense1"]["kernel"]
    found = [
        moments for site, moments in diverge.site_moments(experiment, state) if site == "norm1"
    ]
    assert len(found) == 2
    for moments, rows in zip(found, (x[:32], x[32:]), strict=True):
        np.testing.assert_allclose(moments["mean"], rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(moments["var"], rows.var(0), rtol=1e-5)
        assert moments["count"] == 32


def test_a_head_that_overflows_is_no_site():
    experiment, state = planted("batch", {"head": 1e38})
    reason = "the statistics of all sites are finite, but the loss or its gradient is not"
    assert first_site_by_hand(experiment, state) is None
    assert diverge.explain(experiment, state) == reason


@pytest.mark.parametrize("kind", ["batch", "none"])
def test_a_diverged_run_exits_3_and_says_where(kind, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    overrides = ["optim.learning_rate=1e30", f"norm.kind={kind}"]
    monkeypatch.setattr(sys, "argv", ["bnresearch", *command(workdir, *overrides)])
    assert cli.main() == 3
    printed = capsys.readouterr()
    # The first step is sound, and its update throws the weights of the first layer out.
    message = "the statistics of site norm1 are not finite"
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == f"diverged at step 1: {message}"
    status, result = read(workdir / "status.json"), read(workdir / "result.json")
    assert (status["status"], status["step"], status["message"]) == ("diverged", 1, message)
    assert {k: v for k, v in result.items() if k != "seconds"} == {
        "schema": 1,
        "status": "diverged",
        "step": 1,
        "message": message,
    }
    before = snapshot(workdir)
    assert cli.main() == 3
    assert capsys.readouterr().err == f"diverged at step 1: {message}\n"
    assert snapshot(workdir) == before
    with pytest.raises(Diverged, match="diverged at step 1") as raised:
        run(configs.load(DIGITS, [*SHORT, *overrides]), workdir, show="off")
    assert (raised.value.step, raised.value.reason) == (1, message)


def assert_untouched_but_bad(after, before):
    assert bool(after.meter["bad"])
    after = after.replace(meter=after.meter | {"bad": before.meter["bad"]})
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("layer", ["dense2", "head"])
def test_a_step_that_is_refused_restores_everything(kind, layer):
    experiment, state = planted(kind, {layer: 1e38})
    program = experiment.program
    # Statistics and momentum that a step would move: those before the damage are finite.
    ones = lambda tree: jax.tree.map(lambda x: np.full_like(x, 0.5), tree)  # noqa: E731
    state = state.replace(batch_stats=ones(state.batch_stats), step=np.int32(3))
    before = jax.tree.map(np.array, state)
    after = program.train(
        program.layout.put(state), train_feed(experiment, 3, 2), experiment.numbers, jnp.int32(2)
    )
    assert_untouched_but_bad(program.layout.get(after), before)


@pytest.mark.parametrize("kind", ["batch", "none"])
def test_a_sound_step_moves_what_the_last_test_wants_unmoved(kind):
    experiment, state = planted(kind, {})
    program = experiment.program
    before = jax.tree.map(np.array, state)
    after = program.train(
        program.layout.put(state), train_feed(experiment, 0, 2), experiment.numbers, jnp.int32(2)
    )
    assert (int(after.step), bool(after.meter["bad"])) == (2, False)
    for name in ("params", "batch_stats", "opt_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(after, name)),
            jax.tree.leaves(getattr(before, name)),
            strict=True,
        ):
            assert np.any(a != b)


def test_after_a_refused_step_no_other_batch_is_taken():
    """Steps that are dispatched one by one go on until somebody looks: they must change nothing,
    or the wrong step is named and the refused batch is skipped."""
    experiment, state = planted("batch", {})
    program = experiment.program
    step = jax.jit(
        single(
            make_train_step(experiment.config, program.dataset, program.layout, program.schedule)
        )
    )
    state = state.replace(meter=state.meter | {"bad": np.bool_(True)})
    after = step(state, train_feed(experiment, 0, 1), experiment.numbers, jnp.int32(1))
    assert_untouched_but_bad(after, state.replace(meter=state.meter | {"bad": np.bool_(True)}))


def test_a_last_step_that_throws_the_parameters_out_is_a_divergence(tmp_path):
    """The next step would have shown it, but there is none."""
    config = configs.load(
        DIGITS, ["parallel.devices=1", "train.duration=1st", "optim.learning_rate=1e30"]
    )
    with pytest.raises(Diverged, match="step 1: the norm of the parameters is not finite"):
        run(config, tmp_path / "run", show="off")
    assert read(tmp_path / "run" / "result.json")["status"] == "diverged"


def counting(bad_at):
    """A step that adds one to a parameter, and is not finite at step ``bad_at``."""

    def step(state, feed, numbers):
        bad = state.step == bad_at
        return state.replace(
            step=state.step + 1,
            params=jnp.where(bad, jnp.nan, state.params + 1),
            meter=state.meter | {"bad": state.meter["bad"] | bad},
        )

    return step


@pytest.mark.parametrize(
    ("start", "count", "end", "bad"),
    [(0, 4, 4, False), (0, 5, 5, False), (0, 6, 5, True), (0, 40, 5, True), (5, 3, 5, True)],
)
def test_a_looped_call_ends_before_a_step_that_is_not_finite(start, count, end, bad):
    state = State(jnp.int32(start), jnp.float32(start), {}, (), empty_meter())
    run_steps = jax.jit(looped(counting(5)))
    after = run_steps(state, {}, {}, jnp.int32(count))
    assert (int(after.step), float(after.params), bool(after.meter["bad"])) == (end, end, bad)
    if bad:
        assert_untouched_but_bad(run_steps(after, {}, {}, jnp.int32(3)), after)
