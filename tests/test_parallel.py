"""Modes and scopes of statistics on eight fake devices, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnresearch import config as configs
from bnresearch import experiment as experiment_module
from bnresearch.errors import UserError
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.norm import Stats, batch_norm
from bnresearch.parallel import MODES, ShardMapLayout, make_layout, parse_scope
from bnresearch.rundir import open_run

# scope -> sets of statistics in a batch of 64 on 8 devices: several devices each, or part of one
SCOPES = {"global": 1, "group:4": 2, "group:2": 4, "device": 8, "ghost:16": 4, "ghost:4": 16}
BATCH, FEATURES, DECAY, EPSILON = 64, 5, 0.9, 1e-5


def numpy_batch_norm(x, scale, bias, groups):
    """Forward and running statistics from the definition, in float64."""
    y = np.empty_like(x)
    for rows in np.split(np.arange(len(x)), groups):
        mean, var = x[rows].mean(0), x[rows].var(0)
        y[rows] = (x[rows] - mean) / np.sqrt(var + EPSILON) * scale + bias
    running_mean = (1 - DECAY) * x.mean(0)
    running_var = DECAY * 1 + (1 - DECAY) * x.var(0)
    return y, running_mean, running_var


def numpy_gradient(x, scale, t, groups):
    """d/dx and d/dscale of mean((y - t)^2) by the closed form of each group."""
    dx, dscale = np.empty_like(x), np.zeros_like(scale)
    for rows in np.split(np.arange(len(x)), groups):
        std = np.sqrt(x[rows].var(0) + EPSILON)
        xhat = (x[rows] - x[rows].mean(0)) / std
        dy = 2 * (xhat * scale - t[rows]) / x.size
        dscale += (dy * xhat).sum(0)
        dx[rows] = scale / std * (dy - dy.mean(0) - xhat * (dy * xhat).mean(0))
    return dx, dscale


def example_arrays():
    rng = np.random.default_rng(0)
    # Rows drift along the batch, so that every scope has clearly different statistics.
    x = rng.normal(size=(BATCH, FEATURES)) + np.linspace(0, 3, BATCH)[:, None]
    return x, rng.normal(size=FEATURES), rng.normal(size=FEATURES), rng.normal(size=x.shape)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_forward_statistics_and_gradients_equal_numpy(mode, scope):
    x, scale, bias, t = example_arrays()
    layout = make_layout(mode, scope, 8, BATCH)
    axes = {"jit": None, "shard_map": ("group", "replica"), "pmap": "device"}[mode]

    def step(state, feed, numbers, count):
        rows = layout.rows()
        xs, ts = layout.constrain((feed["x"][rows], feed["t"][rows]))

        def loss_of(scale, shift):
            running = Stats(jnp.zeros(FEATURES), jnp.ones(FEATURES))
            y, new = batch_norm(
                xs + shift[rows],
                scale,
                state["bias"],
                running,
                use="batch",
                decay=DECAY,
                epsilon=EPSILON,
                scope=layout.scope,
            )
            return layout.mean_loss(jnp.square(y - ts).mean()), (y, new)

        # A shift of zero for every row of the batch: its gradient is dx.
        shift = jnp.zeros((BATCH, FEATURES))
        value = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (_, (y, new)), gradients = value(state["scale"], shift)
        dscale, dx = layout.mean_over_devices(gradients)
        # What comes out of the step is the same on every device: gather the rows of y by a sum.
        y = jnp.zeros((BATCH, FEATURES)).at[rows].set(y)
        y = y if axes is None else jax.lax.psum(y, axes)
        return {"y": y, "mean": new.mean, "var": new.var, "dscale": dscale, "dx": dx}

    feed = {"x": jnp.asarray(x, jnp.float32), "t": jnp.asarray(t, jnp.float32)}
    state = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    compiled = layout.compile(step, sharded_feed=False, donate=False)
    out = layout.get(compiled(layout.put(state), layout.put(feed), {}, jnp.int32(1)))

    groups = SCOPES[scope]
    y, mean, var = numpy_batch_norm(x, scale, bias, groups)
    dx, dscale = numpy_gradient(x, scale, t - bias, groups)
    np.testing.assert_allclose(out["y"], y, atol=2e-5)
    np.testing.assert_allclose(out["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(out["var"], var, atol=1e-5)
    np.testing.assert_allclose(out["dscale"], dscale, atol=1e-6)
    np.testing.assert_allclose(out["dx"], dx, atol=1e-6)


def digits_config(mode, scope, *overrides):
    return configs.load(
        "configs/digits_mlp.py",
        [
            f"parallel.mode={mode}",
            f"norm.scope={scope}",
            "parallel.devices=8",
            "data.batch_size=64",
            "model.mlp.widths=(16, 16)",
            "train.duration=50st",
            *overrides,
        ],
    )


def trained(config, steps=5):
    """The state after some steps, as the loop takes them."""
    experiment = prepare(config)
    layout = experiment.program.layout
    state = layout.put(initial_state(experiment))
    for step in range(steps):
        feed = train_feed(experiment, step, 1)
        state = experiment.program.train(state, feed, experiment.numbers, jnp.int32(1))
    return jax.device_get(layout.get(state))


def numpy_five_steps(groups, steps=5):
    """Five SGD steps of the same net, written out by hand in float64.

    Returns parameters and running statistics; the backward pass is the closed form of each layer.
    """
    config = digits_config("jit", "global")
    experiment = prepare(config)
    state = jax.device_get(initial_state(experiment))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), state.params)
    r = jax.tree.map(lambda a: np.asarray(a, np.float64), state.batch_stats)
    velocity = jax.tree.map(np.zeros_like, p)
    for step in range(steps):
        feed = experiment.program.dataset.feed(0, step, 1)
        batch = experiment.program.dataset.train_batch(feed, 0, step, jnp.arange(64))
        x = np.asarray(batch["image"], np.float64).reshape(64, -1)
        grads = numpy_mlp_gradient(p, r, x, np.asarray(batch["label"]), groups)
        rate = config.optim.learning_rate * float(experiment.program.schedule(step))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        p = jax.tree.map(lambda a, v, rate=rate: a - rate * v, p, velocity)
    return p, r


def numpy_mlp_gradient(p, r, x, label, groups):
    """Gradient of the mean cross-entropy; updates the running statistics ``r`` in place."""
    h, kept = x, []
    for i in (1, 2):
        z = h @ p[f"dense{i}"]["kernel"]
        n = p[f"norm{i}"]
        r[f"norm{i}"]["mean"] = DECAY * r[f"norm{i}"]["mean"] + (1 - DECAY) * z.mean(0)
        r[f"norm{i}"]["var"] = DECAY * r[f"norm{i}"]["var"] + (1 - DECAY) * z.var(0)
        y, _, _ = numpy_batch_norm(z, n["scale"], n["bias"], groups)
        kept.append((h, z, y))
        h = np.maximum(y, 0)
    logits = h @ p["head"]["kernel"] + p["head"]["bias"]
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    q[np.arange(len(q)), label] -= 1
    d = q / len(q)
    grads = {"head": {"kernel": h.T @ d, "bias": d.sum(0)}}
    d = d @ p["head"]["kernel"].T
    for i in (2, 1):
        below, z, y = kept[i - 1]
        dy = d * (y > 0)
        scale = p[f"norm{i}"]["scale"]
        dz, dscale = np.empty_like(z), np.zeros_like(scale)
        for rows in np.split(np.arange(len(z)), groups):
            std = np.sqrt(z[rows].var(0) + EPSILON)
            xhat = (z[rows] - z[rows].mean(0)) / std
            g = dy[rows]
            dscale += (g * xhat).sum(0)
            dz[rows] = scale / std * (g - g.mean(0) - xhat * (g * xhat).mean(0))
        grads[f"norm{i}"] = {"scale": dscale, "bias": dy.sum(0)}
        grads[f"dense{i}"] = {"kernel": below.T @ dz}
        d = dz @ p[f"dense{i}"]["kernel"].T
    return grads


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_five_optimizer_steps_equal_numpy(mode, scope):
    state = trained(digits_config(mode, scope))
    params, running = numpy_five_steps(SCOPES[scope])
    assert largest_difference(state.params, params) < 2e-5
    assert largest_difference(state.batch_stats, running) < 2e-5


def test_scopes_differ_so_that_the_comparison_means_something():
    results = [numpy_five_steps(groups)[0] for groups in SCOPES.values()]
    for other in results[1:]:
        assert largest_difference(results[0], other) > 1e-3


class WrongLoss(ShardMapLayout):
    """check_vma=True with the convention of pmap: averages gradients that are already summed."""

    def mean_loss(self, loss):
        return loss

    def mean_over_devices(self, tree):
        return jax.tree.map(lambda x: jax.lax.pmean(x, ("group", "replica")), tree)


class WrongGradient(ShardMapLayout):
    """check_vma=False with the convention of check_vma=True: pmean of the loss only."""

    def compile(self, step, *, sharded_feed):
        everywhere = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(everywhere,) * 4,
            out_specs=everywhere,
            check_vma=False,
        )
        return jax.jit(mapped)


@pytest.mark.parametrize("wrong", [WrongLoss, WrongGradient])
def test_mixed_up_conventions_are_silent_and_far_off(wrong, monkeypatch):
    """Both negative controls: no error, and parameters off by far more than rounding."""
    monkeypatch.setitem(MODES, "shard_map", wrong)
    monkeypatch.setattr(experiment_module, "_PROGRAMS", {})
    state = trained(digits_config("shard_map", "global"))
    params, _ = numpy_five_steps(1)
    assert largest_difference(state.params, params) > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_differ_between_devices_and_the_run_trains(mode):
    config = digits_config(mode, "global", "model.mlp.dropout=0.5")
    state = trained(config, steps=2)
    assert int(state.step) == 2 and np.isfinite(state.meter["loss"])


def test_one_device_needs_nothing_special():
    for mode in MODES:
        dropout = "model.mlp.dropout=0.5"
        config = digits_config(mode, "device", "parallel.devices=1", dropout)
        reference = digits_config("jit", "global", "parallel.devices=1", dropout)
        assert largest_difference(trained(config).params, trained(reference).params) < 1e-6


def test_the_number_of_devices_is_part_of_a_config_whose_statistics_depend_on_it(tmp_path):
    """A run must not go on with other statistics because it found other devices."""
    few = {"device": prepare(digits_config("jit", "device", "parallel.devices=2"))}
    few["global"] = prepare(digits_config("jit", "global", "parallel.devices=0"))
    assert few["device"].resolved["parallel"]["devices"] == 2
    assert few["global"].resolved["parallel"]["devices"] == 0
    everything = prepare(digits_config("jit", "device", "parallel.devices=0"))
    assert everything.resolved["parallel"]["devices"] == 8
    open_run(tmp_path / "run", few["device"].resolved, []).close()
    with pytest.raises(UserError, match=r"parallel.devices: there 2, now 8"):
        open_run(tmp_path / "run", everything.resolved, [])


@pytest.mark.parametrize("text", ["all", "group:", "group:0", "group:x", ""])
def test_unknown_scope(text):
    with pytest.raises(UserError, match="norm.scope"):
        parse_scope(text)


def test_what_does_not_divide():
    with pytest.raises(UserError, match="groups of 3"):
        make_layout("jit", "group:3", 8, 32)
    with pytest.raises(UserError, match="batch_size=30"):
        make_layout("jit", "global", 8, 30)
    with pytest.raises(UserError, match="microbatches"):
        make_layout("jit", "global", 8, 32, accumulate=8)
    with pytest.raises(UserError, match="has 8 cpu"):
        make_layout("jit", "global", 9, 36)


def test_optimizer_is_the_one_of_the_hand_written_steps():
    """sgd with momentum 0.9: v <- 0.9 v + g, p <- p - rate v, as numpy_five_steps has it."""
    optimizer = optax.sgd(0.5, 0.9)
    p, state = jnp.float32(1.0), optimizer.init(jnp.float32(1.0))
    for _ in range(2):
        update, state = optimizer.update(jnp.float32(1.0), state)
        p = p + update
    assert float(p) == pytest.approx(1 - 0.5 * 1 - 0.5 * 1.9)
