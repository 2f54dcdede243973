"""Batch norm in branches and with a learned part; the whole family on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from kinds_tools import (
    AFFINE,
    BIAS,
    EPSILON,
    KINDS,
    LATE,
    RUNNING,
    SCALE,
    assert_all_close,
    assert_close,
    random,
)
from scipy import special

from bnresearch.errors import UserError
from bnresearch.kinds import ablations, branches, modulated, starts, variants
from bnresearch.kinds.batch import batch_norm
from bnresearch.sets import Scope, Stats

SPLIT = {"splits": 2, "shared": False}


def stacked(count, seed=3):
    """Scale, bias and running statistics, another row for each branch."""
    rows = jnp.float32(np.abs(random((4, count, 4), seed)) + 0.1)
    return {"scale": rows[0], "bias": rows[1], "running": Stats(rows[2], rows[3])}


def branch(arrays, k):
    return {n: Stats(*(a[k] for a in v)) if n == "running" else v[k] for n, v in arrays.items()}


@pytest.mark.parametrize("masked", [False, True])
def test_split_is_batch_norm_of_each_part(masked):
    x, arrays = np.float32(random((8, 3, 4))), stacked(2)
    mask = np.arange(8) % 4 != 1 if masked else None
    y, new = branches.split_norm(x, **arrays, use="batch", correction=1, mask=mask)
    for k, rows in enumerate(np.split(np.arange(8), 2)):
        part = None if mask is None else mask[rows]
        wanted, running = batch_norm(
            x[rows], **branch(arrays, k), use="batch", correction=1, mask=part
        )
        assert_close(y[rows], wanted)
        assert_all_close(Stats(*(a[k] for a in new)), running)
    main, same = branches.split_norm(x, **arrays, use="running")
    assert_close(main, batch_norm(x, **branch(arrays, 0), use="running")[0], 0)
    assert same is arrays["running"]


def test_split_starts_and_sharing():
    options = SPLIT | {"average": "last", "window": 3}
    assert branches.split_start(4, SPLIT)["scale"].shape == (2, 4)
    assert branches.split_start(4, SPLIT | {"shared": True})["scale"].shape == (4,)
    state = branches.split_state(4, options)
    assert state.mean.shape == (2, 4) and state.recent_mean.shape == (2, 3, 4)
    x = np.float32(random((8, 4)))
    _, state = branches.split_norm(x, **AFFINE, running=state, use="batch", average="last")
    np.testing.assert_allclose(state.mean, [x[:4].mean(0), x[4:].mean(0)], rtol=1e-5)
    np.testing.assert_array_equal(state.updates, [1, 1])


def domain_norm(x, domain, arrays, **changes):
    options = {"use": "batch", "domain": domain, "domains": 3, **changes}
    return branches.domain_norm(x, **arrays, **options)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_a_batch_may_mix_domains(jit, use):
    x, arrays = np.float32(random((8, 3, 4))), stacked(3)
    domain = np.array([2, 0, 0, 2, 2, 0, 2, 0])  # 1 is empty
    function = partial(domain_norm, use=use, arrays=arrays)
    y, new = (jax.jit(function) if jit else function)(x, domain)
    for k in range(3):
        rows = domain == k
        if not rows.any():
            assert_all_close(
                branch({"running": new}, k), branch({"running": arrays["running"]}, k), 0
            )
            continue
        wanted, running = batch_norm(x[rows], **branch(arrays, k), use=use)
        assert_close(y[rows], wanted)
        assert_all_close(Stats(*(a[k] for a in new)), running)


@pytest.mark.parametrize("domain", [None, 0, 2, np.int32(1)])
def test_one_domain_for_all(domain):
    x, arrays, k = np.float32(random((8, 4))), stacked(3), domain or 0
    wanted, running = batch_norm(x, **branch(arrays, k), use="batch")
    y, new = domain_norm(x, domain, arrays)
    assert_close(y, wanted, 0)
    assert_all_close(
        new, Stats(*(a.at[k].set(b) for a, b in zip(arrays["running"], running, strict=True))), 0
    )
    assert_all_close(jax.jit(partial(domain_norm, arrays=arrays))(x, domain), (y, new), 1e-6)


def test_domains_out_of_range_are_refused_or_not_a_number():
    x, arrays = np.float32(random((4, 4))), stacked(3)
    for domain in (3, -1, [0, 0, 1, 3], np.array([0, -1, 0, 0])):
        with pytest.raises(UserError, match=r"domains are 0 to 2"):
            domain_norm(x, domain, arrays)
    for domain in (0.5, [0, 1], np.zeros((4, 1), int)):
        with pytest.raises(UserError, match="the norm's domain is"):
            domain_norm(x, domain, arrays)
    traced = jax.jit(partial(domain_norm, arrays=arrays))
    y, new = traced(x, 3)
    assert np.isnan(y).all()
    assert_all_close(new, arrays["running"], 0)
    y, _ = traced(x, np.array([0, 0, 0, -1]))
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, False, False, True])
    with pytest.raises(UserError, match="one single value"):
        domain_norm(x, [0, 0, 0, 1], arrays)
    with pytest.raises(UserError, match=r"norm.domain.domains=0"):
        branches.domain_state(4, {"domains": 0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("domain", [1, np.array([0, 1] * 4)])
def test_what_is_kept_stays_float32_for_float64_input(domain):
    with jax.enable_x64(True):
        _, new = domain_norm(jnp.asarray(random((8, 4))), domain, stacked(3))
    assert {a.dtype for a in new} == {np.dtype("float32")}


def recurrent(x, time, arrays, **changes):
    return branches.recurrent_norm(
        x, **arrays, **{"use": "batch", "time": time, "steps": 3} | changes
    )


@pytest.mark.parametrize(("time", "slot"), [(None, 0), (1, 1), (2, 2), (7, 2)])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_every_time_step_has_its_statistics(time, slot, use):
    x, arrays = np.float32(random((8, 4))), AFFINE | {"running": stacked(3)["running"]}
    wanted, running = batch_norm(
        x, **arrays | branch({"running": arrays["running"]}, slot), use=use
    )
    y, new = recurrent(x, time, arrays, use=use)
    rows = zip(arrays["running"], running, strict=True)
    assert_close(y, wanted, 0)
    assert_all_close(new, Stats(*(a.at[slot].set(b) for a, b in rows)), 0)
    traced = jax.jit(partial(recurrent, arrays=arrays, use=use))
    assert_all_close(traced(x, time), (y, new), 1e-6)


def test_recurrent_starts_small_and_refuses_negative_times():
    options = {"steps": 3, "scale_start": 0.1}
    np.testing.assert_array_equal(branches.recurrent_start(4, options)["scale"], np.float32(0.1))
    assert branches.recurrent_state(4, options).var.shape == (3, 4)
    x, arrays = np.float32(random((8, 4))), AFFINE | {"running": stacked(3)["running"]}
    with pytest.raises(UserError, match="time step -1"):
        recurrent(x, -1, arrays)
    with pytest.raises(UserError, match="the norm's time is"):
        recurrent(x, [0, 1], arrays)
    y, new = jax.jit(partial(recurrent, arrays=arrays))(x, -1)
    assert np.isnan(y).all()
    assert_all_close(new, arrays["running"], 0)


# With a learned part around it.


@pytest.mark.parametrize("use", ["batch", "running"])
def test_condition_adds_to_scale_and_bias(use):
    x, condition = np.float32(random((8, 3, 4))), np.float32(random((8, 5), 1))
    maps = np.float32(random((2, 5, 4), 2))
    call = partial(
        modulated.conditional_norm, x, **AFFINE, condition_scale=maps[0], condition_bias=maps[1]
    )
    call = partial(call, running=RUNNING, use=use, conditions=5)
    bare, new = batch_norm(x, None, None, RUNNING, use=use)
    scale, bias = (condition.astype(np.float64) @ m for m in maps)
    y, moved = call(condition=condition)
    assert_close(y, bare * (SCALE + scale)[:, None] + (BIAS + bias)[:, None])
    assert_all_close(moved, new, 0)
    assert_close(call()[0], bare * SCALE + BIAS)
    classes = np.arange(8) % 5
    y, _ = call(condition=np.eye(5, dtype=int)[classes])
    assert_close(y, bare * (SCALE + maps[0][classes])[:, None] + (BIAS + maps[1][classes])[:, None])
    for wrong in (condition[:, :4], condition[:4], condition[0]):
        with pytest.raises(UserError, match="the norm's condition has shape"):
            call(condition=wrong)


def test_condition_starts_without_effect_and_follows_the_affine():
    start = modulated.conditional_start(4, {"conditions": 5, "bias": False})
    assert {name: a.shape for name, a in start.items()} == {
        "scale": (4,),
        "condition_scale": (5, 4),
    }
    assert not start["condition_scale"].any()


def batch_instance(x, gate, use="batch", **changes):
    gate = jnp.broadcast_to(jnp.asarray(gate, jnp.float32), 4)
    return modulated.batch_instance_norm(
        x, **AFFINE, gate=gate, running=RUNNING, use=use, **changes
    )


@pytest.mark.parametrize("use", ["batch", "running"])
def test_batch_instance_mixes_the_two(use):
    x = np.float32(random((8, 3, 4)))
    batch, new = batch_norm(x, None, None, RUNNING, use=use)
    z = x.astype(np.float64)
    instance = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + EPSILON)
    for gate, share in ((0.3, 0.3), (0.0, 0.0), (1.0, 1.0), (1.4, 0.6), (-0.2, 0.2)):
        y, moved = batch_instance(x, gate, use)
        assert_close(y, (share * batch + (1 - share) * instance) * SCALE + BIAS)
        assert_all_close(moved, new, 0)
    with pytest.raises(UserError, match="norm.kind=batch_instance over one single value"):
        batch_instance(x[:, 0], 0.3, use)


def test_a_gate_is_reflected_at_its_ends_and_keeps_its_gradient():
    x, weights = np.float32(random((8, 3, 4))), np.float32(random((8, 3, 4), 1))
    slope = jax.grad(lambda gate: (batch_instance(x, gate)[0] * weights).sum())
    inside = slope(jnp.full(4, 0.5))  # linear in the gate: the same everywhere inside
    for gate, sign in ((0.0, 1), (1.0, 1), (1.1, -1), (-0.1, -1)):
        assert_close(slope(jnp.full(4, gate)), sign * inside, 1e-5)


@pytest.mark.parametrize("use", ["batch", "running"])
def test_representative_norm_calibrates_before_and_after(use):
    x, weights = np.float32(random((8, 3, 4))), np.float32(random((3, 4), 1))
    names = ("centre_weight", "gate_weight", "gate_bias")
    y, new = modulated.representative_norm(
        x, **AFFINE, **dict(zip(names, weights, strict=True)), running=RUNNING, use=use
    )
    z = x.astype(np.float64)
    z, moved = batch_norm(
        np.float32(z + weights[0] * z.mean(1, keepdims=True)), None, None, RUNNING, use=use
    )
    z = np.asarray(z, np.float64)
    gate = special.expit(weights[1] * z.mean(1, keepdims=True) + weights[2])
    assert_close(y, z * gate * SCALE + BIAS)
    assert_all_close(new, moved, 1e-6)
    start = modulated.representative_start(4, {})
    y, _ = modulated.representative_norm(x, **start, running=RUNNING, use=use)
    assert_close(y, special.expit(1) * batch_norm(x, None, None, RUNNING, use=use)[0])


# All of them on several devices.

AXES = ("group", "replica")
DOMAIN = np.array([0, 1, 1, 0, 0, 1, 0, 1] * 2)
CONDITION = np.float32(random((16, 5), 4))
MAPS = dict(zip(("condition_scale", "condition_bias"), np.float32(random((2, 5, 4))), strict=True))
CALIBRATED = {n: jnp.full(4, 0.3) for n in ("centre_weight", "gate_weight", "gate_bias")}
RECURRENT = {"running": stacked(3)["running"]}
SPREAD = {
    name: (function, AFFINE | {"running": LATE if name == "renorm" else RUNNING}, options, None)
    for name, (function, options, _, _) in KINDS.items()
} | {
    "ghost": (variants.ghost_norm, AFFINE | {"running": RUNNING}, {"size": 2}, None),
    "split": (branches.split_norm, stacked(2), {}, None),
    "split across devices": (branches.split_norm, stacked(4), {"splits": 4}, None),
    "domain": (branches.domain_norm, stacked(2), {}, ("domain", DOMAIN)),
    "recurrent": (branches.recurrent_norm, AFFINE | RECURRENT, {"time": 1, "steps": 3}, None),
    "conditional": (
        modulated.conditional_norm,
        AFFINE | MAPS | {"running": RUNNING},
        {"conditions": 5},
        ("condition", CONDITION),
    ),
    "batch_instance": (
        modulated.batch_instance_norm,
        AFFINE | {"gate": jnp.full(4, 0.3), "running": RUNNING},
        {},
        None,
    ),
    "representative": (
        modulated.representative_norm,
        AFFINE | CALIBRATED | {"running": RUNNING},
        {},
        None,
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", SPREAD)
def test_devices_share_statistics_as_one_device_does(kind, masked):
    """Two groups of two devices against two sets on one device, with a penalty and the gradient."""
    function, arrays, options, side = SPREAD[kind]
    x, weights = np.float32(random((16, 3, 4))), np.float32(random((16, 3, 4), 1))
    mask = np.arange(16) % 5 != 1
    given = {side[0]: side[1]} if side else {}
    if masked:
        given["mask"] = mask

    def value(devices, scope, x, weights, given):
        def loss(x):
            y, *rest = function(x, **arrays, **options, **given, use="batch", scope=scope)
            penalty = sum(rest[1:]) / devices  # the gradient is that of the devices' sum
            return (y * weights).sum() + penalty, (y, rest)

        (_, (y, rest)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, rest, dx

    wanted = jax.jit(partial(value, 1, Scope(splits=2)))(x, weights, given)
    mapped = jax.shard_map(
        partial(value, 4, Scope(merge="replica", pool="group")),
        mesh=Mesh(np.array(jax.devices()[:4]).reshape(2, 2), AXES),
        in_specs=(P(AXES), P(AXES), P(AXES)),
        out_specs=(P(AXES), P(), P(AXES)),
    )
    y, rest, dx = jax.jit(mapped)(x, weights, given)
    assert_close(y, wanted[0])
    assert_all_close(rest, wanted[1])
    assert_close(dx, wanted[2], 1e-5)


def test_noise_is_one_distribution_on_all_devices_but_no_value_is_drawn_twice():
    x = np.float32(np.tile(random((2, 4)), (4, 1)))

    def noisy(x, key, **options):
        options |= {"use": "batch", "rng": key, "scope": Scope(pool="device")}
        return ablations.noisy_norm(x, None, None, RUNNING, **options)[0]

    key = jax.random.key(0)
    spread = partial(jax.pmap, axis_name="device", in_axes=(0, None), devices=jax.devices()[:4])
    same = spread(partial(noisy, shift_jitter=0.0, stretch_jitter=0.0))(x.reshape(4, 2, 4), key)
    assert np.ptp(same, 0).max() == 0
    assert np.ptp(spread(noisy)(x.reshape(4, 2, 4), key), 0).min() > 0


SITE = dict(**AFFINE, running=LATE, use="batch")


@pytest.mark.parametrize(
    ("part", "refused"),
    [
        ("norm.lp.p=0", lambda x: ablations.lp_norm(x, **SITE, p=0)),
        ("norm.renorm.r_max=0.5", lambda x: variants.batch_renorm(x, **SITE, r_max=0.5)),
        ("norm.renorm.d_max=-1", lambda x: variants.batch_renorm(x, **SITE, d_max=-1)),
        ("rngs={'norm'", lambda x: ablations.noisy_norm(x, **SITE)),
        ("norm.split.splits=3", lambda x: branches.split_norm(x, **SITE, splits=3)),
        ("one single value", lambda x: branches.split_norm(x[:2], **SITE)),
        ("norm.split.splits=0", lambda x: branches.split_state(4, {"splits": 0})),
        ("norm.recurrent.steps=0", lambda x: branches.recurrent_state(4, {"steps": 0})),
        ("conditions=0", lambda x: modulated.conditional_start(4, {"conditions": 0})),
    ],
)
def test_refusals(part, refused):
    with pytest.raises(UserError, match=part.replace("{", r"\{")):
        refused(np.ones((8, 4), np.float32))


def test_starts():
    assert_all_close(variants.renorm_state(4, {})[:2], tuple(starts.stats(4, {})), 0)
    assert set(modulated.batch_instance_start(4, {"scale": False})) == {"bias", "gate"}
