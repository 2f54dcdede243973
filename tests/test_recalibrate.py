"""Running statistics taken anew: values against float64, whatever the batches, sites and norms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from norm_tools import options, random_params, start_state
from recalibrate_tools import EPSILON, WAYS, Mlp, X, assert_close, by_hand, cut, random_variables

import bnresearch
from bnresearch import norm
from bnresearch.batchnorm import BatchNorm
from bnresearch.errors import UserError
from bnresearch.layers import make_norm
from bnresearch.norm import NORMS, Stats


@pytest.fixture(scope="module")
def variables():
    return random_variables()


@pytest.mark.parametrize("size", [7, 60, 130])
@pytest.mark.parametrize("how", WAYS)
def test_both_ways_are_those_of_float64_for_batches_of_any_size(how, size, variables):
    """Also with a last batch that is smaller than the others: 130 = 18 * 7 + 4 = 2 * 60 + 10."""
    batches = cut(X, size)
    new = bnresearch.recalibrate(Mlp(), variables, batches, how=how)
    assert_close(new["batch_stats"], by_hand(variables, batches, how))
    assert new["params"] is variables["params"]


def test_layer_after_layer_does_not_depend_on_how_the_data_are_cut(variables):
    found = [
        bnresearch.recalibrate(Mlp(), variables, cut(X, size), how="layer_after_layer")
        for size in (7, 60, 130)
    ]
    for other in found[1:]:
        assert_close(other["batch_stats"], found[0]["batch_stats"], 1e-5)
    one = [bnresearch.recalibrate(Mlp(), variables, cut(X, size)) for size in (7, 130)]
    first, second = (tree["batch_stats"] for tree in one)
    assert_close(first["norm1"], second["norm1"], 1e-5)  # nothing stands before it
    assert np.abs(first["norm2"]["var"] - second["norm2"]["var"]).max() > 1e-3


def test_our_batch_norm_gives_the_same_and_dropout_is_off(variables):
    model = Mlp(norm=BatchNorm, dropout=0.5)
    new = bnresearch.recalibrate(model, variables, cut(X, 60))
    assert_close(new["batch_stats"], by_hand(variables, cut(X, 60), "one_pass"))


@pytest.mark.parametrize("how", WAYS)
def test_masked_rows_count_for_nothing(how, variables):
    masks = np.random.default_rng(1).random((3, 40)) < 0.6
    batches = [{"x": x, "mask": m} for x, m in zip(cut(X[:120], 40), masks, strict=True)]
    new = bnresearch.recalibrate(Mlp(norm=BatchNorm), variables, batches, how=how)
    kept = {id(batch["x"]): batch["mask"] for batch in batches}
    rows = [batch["x"] for batch in batches]
    assert_close(new["batch_stats"], by_hand(variables, rows, how, lambda x: kept[id(x)]))


def test_an_offset_of_thousands_of_deviations_costs_no_digits(variables):
    far = [batch + np.float32(5000) for batch in cut(X, 60)]
    new = bnresearch.recalibrate(Mlp(), variables, far)["batch_stats"]["norm1"]["var"]
    kernel = np.asarray(variables["params"]["dense1"]["kernel"], np.float64)
    wanted = (np.concatenate(far).astype(np.float64) @ kernel).var(0)
    np.testing.assert_allclose(new, wanted, rtol=2e-3)  # float32 has rounded the input itself


class Twice(nn.Module):
    """One norm that two branches share."""

    @nn.compact
    def __call__(self, x):
        shared = nn.BatchNorm(use_running_average=True, name="norm")
        return shared(x[:, :3]) + shared(x[:, 3:])


@pytest.mark.parametrize("how", WAYS)
def test_all_calls_of_a_site_are_pooled(how):
    variables = jax.jit(Twice().init)(jax.random.key(0), X)
    new = bnresearch.recalibrate(Twice(), variables, cut(X, 60), how=how)
    both = X.astype(np.float64).reshape(-1, 3)
    assert_close(new["batch_stats"], {"norm": {"mean": both.mean(0), "var": both.var(0)}})


class OnAxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, axis=(1, 2), name="norm")(x)


def test_statistics_over_several_feature_axes_keep_their_shape():
    x = np.random.default_rng(3).normal(size=(9, 2, 3, 4)).astype("f")
    variables = jax.jit(OnAxes().init)(jax.random.key(0), x)
    new = bnresearch.recalibrate(OnAxes(), variables, cut(x, 4))
    wanted = {"norm": {"mean": x.mean((0, 3)), "var": x.var((0, 3))}}
    assert_close(new["batch_stats"], wanted)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(6, name="dense")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class Scanned(nn.Module):
    """Three blocks in a loop, whose variables are stacked."""

    seen: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0} | ({"seen": 0} if self.seen else {})
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return blocks(name="blocks")(x, None)[0]


def test_sites_in_a_loop_have_rows_of_their_own_or_are_refused():
    variables = jax.device_get(jax.jit(Scanned(True).init)(jax.random.key(0), X))
    new = bnresearch.recalibrate(Scanned(True), variables, [X])["batch_stats"]["blocks"]["norm"]
    x = X.astype(np.float64)
    for row, kernel in enumerate(variables["params"]["blocks"]["dense"]["kernel"]):
        x = x @ kernel
        np.testing.assert_allclose(new["mean"][row], x.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new["var"][row], x.var(0), rtol=1e-5)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    with pytest.raises(UserError, match="at site blocks/norm does not come out.*'seen': 0"):
        bnresearch.recalibrate(Scanned(False), variables, [X])


# ---- Every kind of norm

KEEPS = [kind for kind, row in NORMS.items() if row.state is not None]
IMAGES = np.random.default_rng(4).normal(size=(24, 5, 4)).astype("f") * 3 + 2


class OneSite(nn.Module):
    maker: object

    @nn.compact
    def __call__(self, x):
        return self.maker(name="norm")(x)


@pytest.mark.parametrize("kind", KEEPS)
def test_every_kind_gets_what_it_would_converge_to(kind):
    """Those that follow from mean and variance are where their own update would lead at these
    weights; the others have had their own update, once per batch."""
    chosen = options(kind)
    row, batches = NORMS[kind], cut(IMAGES, 8)
    model = OneSite(make_norm(kind, chosen, use="batch"))
    start = {
        name: value for name, value in start_state(kind)._asdict().items() if value is not None
    }
    site = {"params": random_params(kind), "batch_stats": jax.device_get(start)}
    variables = {name: {"norm": values} for name, values in site.items()}
    if "use" not in row.context:  # its statistics are constants
        with pytest.raises(UserError, match="those of norm are constants"):
            bnresearch.recalibrate(model, variables, batches)
        return
    new = bnresearch.recalibrate(model, variables, batches)["batch_stats"]["norm"]
    old = variables["batch_stats"]["norm"]
    assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in old.items()}
    if row.update is None:
        step = jax.jit(lambda v, x: model.apply(v, x, mutable="batch_stats")[1])
        for x in batches:  # without a random key: none of these kinds draws
            variables = {**variables, **step(variables, x)}
        assert_close(new, variables["batch_stats"]["norm"], 1e-5)
        return
    flat = IMAGES.astype(np.float64).reshape(-1, 4)
    stats, state = Stats(*map(jnp.float32, (flat.mean(0), flat.var(0)))), row.state(4, chosen)
    for _ in range(3):  # some average in another unit than the variance, and round there
        state = norm.update(row, state, stats, len(flat), {**chosen, "decay": 0.0})
    for name in ("mean", "var"):
        np.testing.assert_allclose(new[name], getattr(state, name), rtol=3e-6, atol=3e-6)
    others = [name for name in new if name not in ("mean", "var")]
    assert_close({n: new[n] for n in others}, {n: old[n] for n in others}, 0)


def test_an_unbiased_variance_is_corrected_by_the_number_of_all_values():
    maker = make_norm("batch", {"preset": "torch"}, use="batch")
    model = OneSite(maker)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES[:8])
    new = bnresearch.recalibrate(model, variables, cut(IMAGES, 8))["batch_stats"]["norm"]
    flat = IMAGES.astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(new["var"], flat.var(0, ddof=1), rtol=2e-6)


# ---- Which sites, and what is refused


@pytest.mark.parametrize("how", WAYS)
def test_only_the_sites_asked_for_change(how, variables):
    batches = cut(X, 60)
    new = bnresearch.recalibrate(Mlp(), variables, batches, how=how, only=".*2")["batch_stats"]
    assert_close(new["norm1"], variables["batch_stats"]["norm1"], 0)
    if how == "one_pass":
        wanted = by_hand(variables, batches, how)["norm2"]
    else:  # the other normalises as it will at inference
        params, old = variables["params"], variables["batch_stats"]["norm1"]
        x = X.astype(np.float64) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
        z = (x - old["mean"]) / np.sqrt(old["var"] + EPSILON)
        z = np.maximum(z * params["norm1"]["scale"] + params["norm1"]["bias"], 0)
        z = z @ params["dense2"]["kernel"] + params["dense2"]["bias"]
        wanted = {"mean": z.mean(0), "var": z.var(0)}
    assert_close(new["norm2"], wanted)


def test_so_many_batches_are_taken_also_of_what_can_be_gone_through_once(variables):
    for how in WAYS:
        endless = (X[:40] for _ in itertools.count())
        new = bnresearch.recalibrate(Mlp(), variables, endless, count=2, how=how)
        assert_close(new["batch_stats"], by_hand(variables, [X[:40]] * 2, how))
    new = bnresearch.recalibrate(Mlp(), variables, [X], count=2, allow_fewer=True)
    assert_close(new["batch_stats"], by_hand(variables, [X], "one_pass"))


def test_a_model_can_be_called_as_it_wants_to_be(variables):
    def call(variables, batch, train, **rest):
        return Mlp().apply(variables, batch["rows"][0], train, **rest)

    batches = [{"rows": (x,)} for x in cut(X, 60)]
    new = bnresearch.recalibrate(Mlp(), variables, batches, call=call)
    assert_close(new["batch_stats"], by_hand(variables, cut(X, 60), "one_pass"))
    other = without(variables, "params", "head", "bias")
    with pytest.raises(UserError, match=r"params/head/bias: given nothing, wanted float32\[3\]"):
        bnresearch.recalibrate(Mlp(), other, batches, call=call)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(4)(x))


def without(tree, *path):
    *above, last = path
    node = tree = jax.tree.map(lambda a: a, tree)
    for name in above:
        node = node[name]
    del node[last]
    return tree


def changed(tree, path, value):
    *above, last = path
    node = tree = jax.tree.map(lambda a: a, tree)
    for name in above:
        node = node[name]
    node[last] = value
    return tree


def test_a_model_without_running_statistics_is_refused():
    variables = jax.jit(Plain().init)(jax.random.key(0), X)
    with pytest.raises(UserError, match="no running statistics.*none of its norms keeps any"):
        bnresearch.recalibrate(Plain(), variables, [X])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda v: without(v, "batch_stats", "norm2", "var"),
            ["batch_stats/norm2/var: given nothing, wanted float32[5]"],
        ),
        (
            lambda v: changed(v, ("batch_stats", "norm9"), {"mean": np.zeros(5, "f")}),
            ["batch_stats/norm9/mean: given float32[5], wanted nothing"],
        ),
        (
            lambda v: changed(v, ("params", "dense1", "kernel"), np.zeros((7, 5), "f")),
            ["params/dense1/kernel: given float32[7, 5], wanted float32[6, 5]", "[60, 6]"],
        ),
        (lambda v: v["params"], ["the variables are", "dense1, dense2"]),
    ],
)
def test_variables_of_another_model_are_refused_with_the_difference(change, parts, variables):
    with pytest.raises(UserError) as error:
        bnresearch.recalibrate(Mlp(), change(variables), cut(X, 60))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("batches", "more", "parts"),
    [
        ([], {}, ["no batch was given"]),
        ([X, X], {"count": 3}, ["2 batches were given", "count=3", "allow_fewer=True"]),
        ([X[:, :4]], {}, ["[130, 4]", "dense1/kernel", "wanted float32[4, 5]"]),
        ([X, X[:, :4]], {}, ["batch 1", "[130, 4]", "does not go through the model"]),
        ([X[:1], X], {"call": "ours"}, ["one single value"]),
        ([X, np.full_like(X, np.nan)], {}, ["norm1 is not finite in batch 1"]),
        ([X], {"only": "norm3"}, ["'norm3' matches no site", "norm1, norm2"]),
        ([X], {"only": "("}, ["'('", "no regular expression"]),
        ([X], {"how": "two_pass"}, ["'two_pass'", "one_pass", "layer_after_layer"]),
        ([{"picture": X}], {}, ["picture", "image"]),
    ],
)
def test_what_cannot_be_is_refused_in_words(batches, more, parts, variables):
    model = Mlp(norm=BatchNorm) if more.pop("call", None) else Mlp()
    with pytest.raises(UserError) as error:
        bnresearch.recalibrate(model, variables, batches, **more)
    for part in parts:
        assert part in str(error.value)
