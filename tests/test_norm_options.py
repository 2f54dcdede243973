"""What may be said about a norm: conventions, rules on sites, and the module around a kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from norm_tools import options, random, site_call, start_params

from bnresearch.conventions import complete
from bnresearch.errors import UserError
from bnresearch.layers import make_norm, site_inputs
from bnresearch.norm import NORMS, PRESETS, Kind, Stats
from bnresearch.sites import Choice, check_rules, choose, make_rules, parse, standard

# ---- Conventions


def completed(**given):
    return complete("batch", NORMS["batch"].options, given)


@pytest.mark.parametrize(
    ("preset", "momentum", "wanted"),
    [
        ("torch", 0.1, dict(decay=0.9, epsilon=1e-5, correction=1, average="ema")),
        ("flax", 0.98, dict(decay=0.98, variance="fast", on_single="beta", correction=0)),
        ("keras", 0.98, dict(decay=0.98, epsilon=1e-3, variance="two_pass", correction=0)),
        ("haiku", 0.98, dict(decay=0.98, average="debiased", stat_dtype="input")),
        ("onnx", 0.98, dict(decay=0.98, epsilon=1e-5, correction=0, on_single="beta")),
    ],
)
def test_presets_set_every_convention_and_momentum_as_the_library_means_it(
    preset, momentum, wanted
):
    found = completed(preset=preset, momentum=momentum)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found.keys() == NORMS["batch"].options.keys()
    assert completed(preset=preset, momentum=momentum, epsilon=0.5)["epsilon"] == 0.5  # given wins


def test_presets_without_momentum_have_the_decay_of_the_library():
    decays = {name: completed(preset=name)["decay"] for name in PRESETS if name != "haiku"}
    assert decays == dict(bnresearch=0.9, torch=0.9, flax=0.99, keras=0.99, onnx=0.9)
    with pytest.raises(UserError, match="haiku has no default decay"):
        completed(preset="haiku")
    assert completed(preset="haiku", decay=0.5)["decay"] == 0.5


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("batch", dict(momentum=0.1), r"decay=0\.1 for what flax.*decay=0\.9 for what torch"),
        ("batch", dict(preset="torch", momentum=0.1, decay=0.9), "the same thing twice"),
        ("batch", dict(preset="jax"), "bnresearch, flax, haiku, keras, onnx, torch"),
        ("batch", dict(eps=1e-3), r"no option 'eps'; it has: decay, epsilon, correction"),
        ("group", dict(momentum=0.1), "'group' has no option 'momentum'"),
        ("group", dict(preset="torch"), r"no option 'preset'; it has: epsilon, groups"),
        ("none", dict(epsilon=0.1), "it has: none"),
    ],
)
def test_options_that_cannot_be_are_refused(kind, given, message):
    with pytest.raises(UserError, match=message):
        standard(kind, given)


# ---- Rules


def test_a_rule_is_a_pattern_a_kind_and_options():
    rule = parse("stage1/(a|b)->c.* -> group groups=2 epsilon=1e-3 scale=false")
    assert rule.pattern.pattern == "stage1/(a|b)->c.*"
    assert (rule.kind, rule.options) == ("group", dict(groups=2, epsilon=1e-3, scale=False))
    rule = parse(".* -> average=last decay=1")
    assert (rule.kind, rule.options) == ("", dict(average="last", decay=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm1 group", "is no rule"),
        ("-> group", "is no rule"),
        ("norm1 ->", "is no rule"),
        ("norm( -> group", "no regular expression"),
        ("norm1 -> gruppe", "unknown norm kind.*batch"),
        ("norm1 -> group groups", "'groups' .* is no option"),
        ("norm1 -> group groups=", "'groups=' .* is no option"),
        ("norm1 -> group layer", "'layer' .* is no option"),
    ],
)
def test_what_is_no_rule(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def rules_of(*texts):
    return make_rules(texts, "batch", standard)


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = rules_of("a/.* -> none", ".*/norm1 -> decay=0.5", "b -> group groups=2")
    default = Choice("batch", standard("batch", {}))
    kinds = {path: choose(path, default, rules) for path in ("a/norm1", "b/norm1", "b", "b/norm2")}
    assert [choice.kind for choice in kinds.values()] == ["none", "batch", "group", "batch"]
    assert [kinds[path].options["decay"] for path in ("b/norm1", "b/norm2")] == [0.5, 0.9]


def test_rules_without_effect_and_of_the_wrong_type_are_refused():
    check_rules(rules_of("a -> none", ".* -> layer"), ["a", "b"])
    with pytest.raises(UserError, match="it matches no site; the sites are: a, b"):
        check_rules(rules_of("c -> none"), ["a", "b"])
    with pytest.raises(UserError, match="earlier rules take all sites that it matches \\(a\\)"):
        check_rules(rules_of(".* -> layer", "a -> none"), ["a", "b"])
    for text in ("a -> group groups=2.0", "a -> decay=fast", "a -> scale=1"):
        with pytest.raises(UserError, match="is of type"):
            rules_of(text)


# ---- The linen module


class Net(nn.Module):
    """One site with a dense layer before it."""

    norm: object

    @nn.compact
    def __call__(self, x, **inputs):
        x = nn.Dense(4, use_bias=False, name="dense")(x)
        return self.norm(name="norm")(x, **inputs)


def net(kind, **switches):
    return Net(make_norm(kind, options(kind), **switches))


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_linear_maps_start_alike_and_keep_their_bias_where_a_norm_needs_it(kind):
    (x,), given = site_call(kind, jnp.asarray(random((8, 5, 3))))
    given = {name: value for name, value in given.items() if name != "rngs"}
    variables = net(kind).init(jax.random.key(3), x, **given)
    reference = net("batch").init(jax.random.key(3), x)
    np.testing.assert_array_equal(
        variables["params"]["dense"]["kernel"], reference["params"]["dense"]["kernel"]
    )
    wanted = set(start_params(kind)) | ({"bias"} if NORMS[kind].linear_bias else set())
    assert set(variables["params"].get("norm", {})) == wanted


def test_a_site_that_follows_no_linear_map_adds_no_bias():
    bare = make_norm("none")(name="norm", after_linear=False)
    assert not bare.init(jax.random.key(0), jnp.ones((6, 4)))


@pytest.mark.parametrize("kind", ["batch", "layer", "none"])
def test_moments_of_the_input_are_observed_for_every_kind(kind):
    x = random((6, 3, 3))
    variables = net(kind).init(jax.random.key(0), x)
    mask = np.arange(6) < 4
    inside = np.asarray(x @ variables["params"]["dense"]["kernel"], np.float64)
    for given, seen in (({}, inside), ({"mask": mask}, inside[mask])):
        _, out = net(kind).apply(variables, x, mutable=["moments", "batch_stats"], **given)
        moments = out["moments"]["norm"]
        np.testing.assert_allclose(moments["mean"], seen.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(moments["var"], seen.var((0, 1)), rtol=1e-5)
        np.testing.assert_array_equal(moments["count"], 3 * len(seen))


def test_side_inputs_reach_the_sites_and_those_of_the_call_win():
    x, mask = random((6, 3)), np.arange(6) < 4
    variables = net("batch").init(jax.random.key(0), x)

    def output(**inputs):
        return net("batch").apply(variables, x, mutable=["batch_stats"], **inputs)[0]

    with site_inputs(mask=np.ones(6, bool)):
        with site_inputs(mask=mask, domain=None):
            np.testing.assert_array_equal(output(), output(mask=mask))
        np.testing.assert_allclose(output(), net("batch").apply(variables, x), atol=1e-6)
        assert np.abs(output(mask=mask) - output()).max() > 0.1
    with pytest.raises(UserError, match="unknown side input of a norm 'masks'"):
        output(masks=mask)


def test_penalties_are_collected_and_random_keys_asked_for(monkeypatch):
    def shaky(x, running, *, rng, use):
        """y = x + N(0, 1), with the mean square as penalty."""
        noise = 0 if use == "running" else jax.random.normal(rng, x.shape)
        return x + noise, running, jnp.square(x).mean()

    start = Stats(jnp.zeros(4), jnp.ones(4))
    monkeypatch.setitem(NORMS, "shaky", Kind(shaky, state=lambda features, options: start))
    site = make_norm("shaky")(name="norm")
    x = jnp.asarray(random((6, 4)))
    variables = site.init(jax.random.key(0), x)
    with pytest.raises(UserError, match="rngs="):
        site.apply(variables, x)
    rngs = {"norm": jax.random.key(1)}
    y, out = site.apply(variables, x, rngs=rngs, mutable=["penalties", "batch_stats"])
    assert float(out["penalties"]["norm"]) == pytest.approx(float(np.square(x).mean()))
    assert float(np.abs(y - x).mean()) == pytest.approx((2 / np.pi) ** 0.5, abs=0.3)
