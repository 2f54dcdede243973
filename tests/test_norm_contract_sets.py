"""The contract of every kind of the table NORMS about sets: masks, examples, and eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import (
    BATCH,
    FEATURES,
    NEVER_MOVES,
    SHAPE,
    Step,
    assert_close,
    assert_same_bits,
    call,
    fixed_context,
    options,
    random,
    random_params,
    side_inputs,
    warm_state,
)

from bnresearch import norm
from bnresearch.errors import UserError
from bnresearch.norm import NORMS, Stats
from bnresearch.parallel import MODES, make_layout

masked_kinds = pytest.mark.parametrize(
    "kind", sorted(k for k in NORMS if "mask" in NORMS[k].context)
)
batch_kinds = pytest.mark.parametrize("kind", sorted(k for k in NORMS if NORMS[k].batch_dependent))
example_kinds = pytest.mark.parametrize(
    "kind", sorted(k for k in NORMS if not NORMS[k].batch_dependent)
)


# Of each pair of examples one stays. Sets that are given by their size are half as large then.
MASK = np.array([1, 0, 1, 0, 0, 1, 1, 0], bool)
HALVED = {
    "ghost": dict(size=1),
    "batch_group": dict(examples_per_group=1),
    "virtual": dict(reference=2),
}


@masked_kinds
def test_masked_examples_are_as_if_they_were_not_there(kind):
    x, weights = random() + 0.5, random(seed=1) * MASK[:, None, None]
    x[~MASK] = 1e3
    masked = call(kind, x, weights, mask=MASK)
    side = {name: value[MASK] for name, value in per_example(side_inputs(kind), BATCH).items()}
    halved = tuple(HALVED.get(kind, {}).items())
    alone = call(kind, x[MASK], weights[MASK], changed=halved, **side)
    assert_close(masked.y[MASK], alone.y, 2e-6)
    assert_close(masked.new, alone.new, 2e-6)
    assert_close(masked.dx[MASK], alone.dx, 1e-5)
    assert not masked.dx[~MASK].any()
    assert_close(masked.dparams, alone.dparams, 1e-5)
    assert_close(masked.drunning, alone.drunning, 1e-5)


def per_example(given, batch):
    """Those of the side inputs that differ between examples."""
    return {k: v for k, v in given.items() if getattr(v, "shape", ())[:1] == (batch,)}


@masked_kinds
def test_masks_that_do_not_fit_are_refused(kind):
    with pytest.raises(UserError, match="mask"):
        call(kind, random(), mask=np.ones(BATCH + 1, bool))


@example_kinds
def test_examples_do_not_see_each_other(kind):
    assert NORMS[kind].state is None or kind in NEVER_MOVES
    x, other = random(), random()
    other[3:] = 100 * random(seed=9)[3:]
    one, two = call(kind, x), call(kind, other)
    assert_same_bits((one.y[:3], one.dx[:3]), (two.y[:3], two.dx[:3]))


SEQUENTIAL = {"online": "goes through the examples one after the other"}
SETS = 2  # of 8 examples each, on 4 devices each


def both_sets():
    """Two sets with clearly different statistics."""
    x = np.concatenate([random(seed=3), random(seed=4) * 3 + 2])
    return x, np.concatenate([random(seed=5), random(seed=6)])


@functools.cache
def in_mode(kind, mode):
    """One step over 8 devices with statistics per 4 of them."""
    layout = make_layout(mode, "group:4", 8, SETS * BATCH)
    side = side_inputs(kind, SETS * BATCH)
    each = jax.tree.map(jnp.asarray, per_example(side, SETS * BATCH))

    def run(arrays, feed, numbers, count):
        rows = layout.rows()
        x, weights = layout.constrain((feed["x"][rows], feed["weights"][rows]))
        given = side | {name: value[rows] for name, value in each.items()}

        def loss_of(shift, params, running):
            context = fixed_context(kind, scope=layout.scope) | given
            result = norm.apply(
                NORMS[kind], x + shift[rows], params, running, context, options(kind)
            )
            # Of the whole batch: the sum over the sets of what `step` makes of each.
            loss = (result.y * weights).mean() * shift.size
            if result.penalty is not None:
                loss = loss + SETS * result.penalty
            return layout.mean_loss(loss), result

        shift = jnp.zeros((SETS * BATCH, *SHAPE[1:]))
        value = jax.value_and_grad(loss_of, (0, 1, 2), has_aux=True)
        (loss, result), (dx, dparams, drunning) = value(shift, *arrays)
        loss, dx, dparams = layout.mean_over_devices((loss, dx, dparams))
        y = jnp.zeros_like(shift).at[rows].set(result.y)
        axes = {"jit": None, "shard_map": ("group", "replica"), "pmap": "device"}[mode]
        y = y if axes is None else jax.lax.psum(y, axes)
        return Step(loss, y, result.running, dx, dparams, backward_steps(drunning))

    feed = dict(zip(("x", "weights"), both_sets(), strict=True))
    arrays = jax.tree.map(jnp.asarray, (random_params(kind), warm_state(kind)))
    whole = layout.compile(run, sharded_feed=False, donate=False)
    out = whole(layout.put(arrays), layout.put(feed), {}, jnp.int32(1))
    for leaf in jax.tree.leaves(out):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert_same_bits(copies, copies[:1] * len(copies))
    return jax.tree.map(np.asarray, layout.get(out))


def backward_steps(drunning):
    """What is learned in the backward pass: the one part of this gradient that anybody uses."""
    names = [] if drunning is None else drunning._asdict()
    return {name: getattr(drunning, name) for name in names if name.startswith("backward_")}


@pytest.mark.parametrize("mode", MODES)
@batch_kinds
def test_scopes_on_eight_devices(kind, mode):
    """Every set as if it were alone; running statistics those of the whole batch."""
    if kind in SEQUENTIAL:
        with pytest.raises(UserError, match="norm.scope"):
            in_mode(kind, mode)
        return
    out, first = in_mode(kind, mode), in_mode(kind, "jit")
    assert_close(out.new, first.new, 1e-6)
    assert_close(out.drunning, first.drunning, 1e-5)
    if NORMS[kind].update is not None:
        wide = np.float64(both_sets()[0])
        moments = Stats(wide.mean((0, 1)), wide.var((0, 1)))
        count = wide.size // FEATURES
        wanted = norm.update(NORMS[kind], warm_state(kind), moments, count, options(kind))
        assert_close(out.new, wanted, 1e-6)
    sets = [call(kind, x, w) for x, w in zip(*map(halves, both_sets()), strict=True)]
    assert_close(out.y, np.concatenate([s.y for s in sets]), 2e-6)
    assert_close(out.dx, np.concatenate([s.dx for s in sets]), 1e-5)
    dparams = jax.tree.map(lambda *parts: sum(parts), *(s.dparams for s in sets))
    assert_close(out.dparams, dparams, 1e-5)


def halves(array):
    return np.split(array, SETS)
