"""Where flax.linen.BatchNorm is silently wrong, bnresearch.BatchNorm is right or refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_tools import close, draw
from batchnorm_tools import TRAIN, eager, evaluation, pair, training

import bnresearch
from bnresearch.errors import UserError


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_mean_of_3000_deviations(fast, jit):
    x = draw((256, 64), offset=3000.0, spread=1.0)[0]
    theirs, ours = pair(use_fast_variance=fast)
    variables = ours.init(jax.random.key(0), x)

    def run(module):
        y, _ = (training if jit else eager)(module, x, variables)
        return np.asarray(y, np.float64).std(0)

    np.testing.assert_allclose(run(ours), 1, atol=1e-5)
    if fast:
        assert np.abs(run(theirs) - 1).max() > 0.1


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_an_all_masked_batch_moves_nothing(jit):
    x, weights = draw((8, 4))
    theirs, ours = pair()
    variables = ours.init(jax.random.key(0), x)
    warm = {**variables, "batch_stats": training(ours, x, variables)[1]}
    mask = np.zeros((8, 1), bool)

    def run(module, x):
        def loss(x):
            y, stats = eager(module, x, warm, mask=mask)
            return (y * weights).sum(), (y, stats)

        dx, rest = jax.grad(loss, has_aux=True)(x)
        return dx, *rest

    run = jax.jit(run, static_argnums=0) if jit else run
    dx, y, stats = run(ours, x)
    jax.tree.map(np.testing.assert_array_equal, stats, warm["batch_stats"])
    close(y, evaluation(ours, x, warm), 1e-6)
    assert np.isfinite(dx).all()
    assert np.isnan(run(theirs, x)[1]).all()


def test_an_empty_batch_moves_nothing():
    ours = bnresearch.BatchNorm(**TRAIN)
    variables = ours.init(jax.random.key(0), jnp.ones((2, 4)))
    y, stats = training(ours, jnp.ones((0, 4)), variables)
    assert y.shape == (0, 4)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 4), (4,)])
def test_one_value_per_feature_is_refused(shape):
    theirs, ours = pair()
    x = jnp.full(shape, 7.0)
    variables = ours.init(jax.random.key(0), x)  # a batch of one may initialise
    for call in (training, eager):
        with pytest.raises(UserError, match="one single value"):
            call(ours, x, variables)
    assert evaluation(ours, x, variables).shape == shape
    with pytest.warns(UserWarning, match="one single value"):
        training(ours.clone(on_single="warn"), x, variables)
    actual = training(ours.clone(on_single="beta"), x, variables)
    close(actual, training(theirs, x, variables), 1e-6)
    assert (actual[0] == 0).all()


def test_one_value_left_by_a_mask():
    ours = bnresearch.BatchNorm(**TRAIN)
    x, mask = draw((8, 4))[0], (np.arange(8) == 2)[:, None]
    variables = ours.init(jax.random.key(0), x)
    with pytest.raises(UserError, match="one single value"):
        eager(ours, x, variables, mask=mask)
    y, _ = training(ours, x, variables, mask=mask)
    assert np.isnan(y).all()  # the count is data there: loud, not silent


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((8,), "whole features"),
        ((1, 8), "whole features"),
        ((7, 1), "does not broadcast"),
        ((8, 8, 1), "does not broadcast"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(shape, part):
    ours = bnresearch.BatchNorm(**TRAIN)
    x = draw((8, 8))[0]  # as many examples as features: flax takes [batch] for a mask of features
    variables = ours.init(jax.random.key(0), x)
    with pytest.raises(UserError, match=part):
        training(ours, x, variables, mask=np.ones(shape, bool))


def test_statistics_keep_their_dtype():
    """Flax turns its bfloat16 statistics into float32 ones at the first step."""
    changed = dict(param_dtype=jnp.bfloat16, force_float32_reductions=False)
    x = draw((8, 4))[0]
    dtypes = []
    for module in pair(**changed):
        variables = module.init(jax.random.key(0), x)
        after = training(module, x, variables)[1]
        dtypes.append((variables["batch_stats"]["mean"].dtype, after["mean"].dtype))
    assert dtypes == [(jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]


def test_complex_input_is_refused():
    with pytest.raises(UserError, match="complex64"):
        bnresearch.BatchNorm(**TRAIN).init(jax.random.key(0), jnp.ones((4, 2), jnp.complex64))


@pytest.mark.parametrize(
    "field", [{"momentum": 2.0}, {"momentum": -0.1}, {"epsilon": -1.0}, {"on_single": "ignore"}]
)
def test_fields_out_of_range_are_refused_at_the_start(field):
    module = bnresearch.BatchNorm(use_running_average=False, **field)
    with pytest.raises(UserError, match="out of range|on_single of BatchNorm"):
        module.init(jax.random.key(0), jnp.ones((4, 2)))
