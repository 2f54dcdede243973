"""Norms through the config: presets, rules on sites, reparametrised kernels, refusals."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import config as configs
from bnresearch import norm_config
from bnresearch.errors import UserError
from bnresearch.experiment import initial_state, prepare
from bnresearch.layers import make_norm
from bnresearch.norm import NORMS
from bnresearch.step import build_model, site_paths

ROOT = Path(__file__).parent.parent
MLP, RESNET = str(ROOT / "configs/digits_mlp.py"), str(ROOT / "configs/digits_resnet.py")
SHAPE, CLASSES = (8, 8, 1), 10


def load(*overrides, path=MLP):
    return configs.load(path, ["parallel.devices=1", *overrides])


def options(*overrides):
    config = load(*overrides)
    configs.validate(config)
    return norm_config.choice(config).options


def variables_of(config):
    model = build_model(config, CLASSES, use="running")
    return model.init(jax.random.key(0), jnp.zeros((2, *SHAPE)), train=False)


# ---- Presets


def test_a_preset_sets_the_conventions_and_what_is_given_wins():
    torch = options("norm.batch.preset=torch")
    assert (torch["decay"], torch["correction"], torch["on_single"]) == (0.9, 1, "error")
    given = options("norm.batch.preset=torch", "norm.batch.momentum=0.01", "norm.batch.epsilon=0.1")
    assert given["decay"] == pytest.approx(0.99)
    assert given["epsilon"] == 0.1
    keras = options("norm.batch.preset=keras")
    assert (keras["decay"], keras["epsilon"], keras["correction"]) == (0.99, 1e-3, 0)
    # Equal to our own default, and given all the same.
    assert options("norm.batch.preset=keras", "norm.batch.decay=0.9")["decay"] == 0.9


def test_a_run_folder_has_the_conventions_and_no_preset():
    resolved = configs.resolve(load("norm.batch.preset=torch", "norm.batch.momentum=0.5"))
    assert resolved["norm"]["batch"]["decay"] == 0.5
    assert resolved["norm"]["batch"].keys() == norm_config.NORMS["batch"].options.keys()
    said = load("norm.batch.decay=0.5", "norm.batch.correction=1")
    assert configs.config_hash(configs.resolve(said)) == configs.config_hash(resolved)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("norm.batch.momentum=0.1",), r"decay=0\.9 for what torch\s+means"),
        (("norm.batch.preset=pytorch",), "torch"),
        (("norm.batch.preset=haiku",), "haiku has no default decay"),
        (
            ("norm.batch.preset=torch", "norm.batch.momentum=0.1", "norm.batch.decay=0.9"),
            "same thing twice",
        ),
        (("norm.batch.decay=1.5",), r"norm\.batch\.decay=1\.5 is out of range"),
        (("norm.batch.correction=2",), "norm.batch.correction 2"),
    ],
)
def test_refused_conventions(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.validate(load(*overrides))


# ---- Rules


@pytest.mark.parametrize(
    "overrides",
    [
        ("norm.rules=('norm1 -> preset=keras',)",),
        ("norm.rules=('norm1 -> ghost preset=haiku decay=0.5 size=20',)",),
        ("norm.batch.preset=torch", "norm.rules=('norm1 -> momentum=0.3',)"),
        ("norm.group.groups=4", "norm.rules=('norm1 -> group', 'norm2 -> epsilon=1')"),
        ("norm.batch.preset=flax", "norm.rules=('norm1 -> ghost size=20 decay=0.5',)"),
    ],
)
def test_a_run_folder_keeps_what_the_rules_meant(overrides):
    config = load(*overrides)
    back = configs.unresolve(configs.resolve(config))
    meant, read = norm_config.rules(config), norm_config.rules(back)
    assert [rule.choice for rule in read] == [rule.choice for rule in meant]
    assert norm_config.choice(back) == norm_config.choice(config)
    assert configs.resolve(back) == configs.resolve(config)


def test_what_a_rule_says_wins_over_the_config():
    given = ("norm.batch.decay=0.7", "norm.batch.epsilon=0.5")
    first, second = norm_config.rules(
        load(*given, "norm.rules=('norm1 -> preset=keras', 'norm2 -> decay=0.2')")
    )
    assert (first.choice.options["decay"], first.choice.options["epsilon"]) == (0.99, 1e-3)
    assert (second.choice.options["decay"], second.choice.options["epsilon"]) == (0.2, 0.5)


def test_rules_put_kinds_at_sites_and_leave_the_others_bitwise_alone():
    rules = "('stage3/.* -> none', 'stage1/block1/.* -> group groups=4', 'stem/.* -> layer')"
    plain = variables_of(load(path=RESNET))
    ruled = variables_of(load(f"norm.rules={rules}", path=RESNET))
    stats = {"/".join(str(k.key) for k in path) for path, _ in leaves(ruled["batch_stats"])}
    assert not any(name.startswith(("stage3", "stage1/block1", "stem")) for name in stats)
    assert any(name.startswith("stage2/block1/norm1") for name in stats)
    assert "scale" not in ruled["params"]["stage3"]["block1"]["norm1"]
    kernels = {str(p): v for p, v in leaves(plain["params"]) if "kernel" in str(p)}
    for path, value in leaves(ruled["params"]):
        if "kernel" in str(path):
            np.testing.assert_array_equal(value, kernels[str(path)])


def leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_the_first_rule_wins_and_a_rule_without_kind_keeps_it():
    config = load("norm.rules=('norm1 -> decay=0.5', 'norm[12] -> group groups=4')")
    first, second = norm_config.rules(config)
    assert (first.choice.kind, first.choice.options["decay"]) == ("batch", 0.5)
    assert (second.choice.kind, second.choice.options["groups"]) == ("group", 4)
    variables = variables_of(config)
    assert variables["batch_stats"].keys() == {"norm1", "norm3"}


def test_the_sites_of_a_model_in_order_of_execution():
    assert site_paths(load(), SHAPE, CLASSES) == ["norm1", "norm2", "norm3"]
    paths = site_paths(load(path=RESNET), SHAPE, CLASSES)
    assert paths[:3] == ["stem/norm1", "stage1/block1/norm1", "stage1/block1/norm2"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("norm9 -> group", "matches no site; the sites are: norm1, norm2, norm3"),
        ("norm1 > group", "is no rule"),
        ("norm( -> group", "no regular expression"),
        ("norm1 -> grup", "unknown norm kind"),
        ("norm1 -> group groups=7", "groups=7 on 100 features"),
        ("norm1 -> group size=7", "no option 'size'; it has: epsilon, groups"),
        ("norm1 -> group groups=4.5", "of type float, not int"),
        ("norm1 -> momentum=0.1", "can mean two things"),
        ("norm1 -> renorm momentum=0.1", r"norm\.renorm\.decay=0\.9 for what torch"),
        ("norm1 -> preset=torch momentum=x", "momentum='x' is out of range"),
        ("norm1 -> preset=torch momentum=7", "momentum=7 is out of range"),
        ("norm1 -> epsilon=-1", r"epsilon=-1\.0 is out of range"),
        ("norm1 -> epsilon=1e400", "epsilon=inf is out of range"),
        ("norm1 -> power backward_decay=3", r"backward_decay=3\.0 is out of range"),
        ("norm1 -> ghost size=20 size=30", "gives an option twice"),
        ("norm1 -> scale=no", "scale='no' is of type str, not bool"),
    ],
)
def test_refused_rules(rule, message):
    with pytest.raises(UserError, match=message):
        prepare(load(f'norm.rules=("{rule}",)'))


def test_a_rule_behind_one_that_takes_all_its_sites_is_refused():
    with pytest.raises(UserError, match="earlier rules take all sites that it matches"):
        prepare(load("norm.rules=('norm.* -> none', 'norm1 -> group groups=4')"))


# ---- Reparametrised kernels


def test_kernels_are_reparametrised_where_the_kind_asks_for_it():
    """Their length has no effect then, whereas it has at sites without a norm."""

    def logits(factor, *overrides):
        config = load("norm.kind=none", *overrides)
        variables = variables_of(config)
        params = variables["params"]
        for name in ("dense1", "dense2", "dense3"):
            params[name]["kernel"] = factor * params[name]["kernel"]
        model = build_model(config, CLASSES, use="running")
        image = jax.random.normal(jax.random.key(1), (4, *SHAPE))
        return model.apply({"params": params}, image, train=False)

    assert float(jnp.abs(logits(3.0) - logits(1.0)).max()) > 1
    for choice in ("norm.kind=weight_norm", "norm.weights=weight_norm"):
        np.testing.assert_allclose(logits(3.0, choice), logits(1.0, choice), rtol=1e-4, atol=1e-5)
    # A rule on a site means the linear map that belongs to it as well.
    rule = "norm.rules=('norm[123] -> weight_norm',)"
    np.testing.assert_allclose(logits(3.0, rule), logits(1.0, rule), rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_reparametrised_net_have_unit_length():
    config = load("norm.kind=none", "norm.weights=weight_norm", "model.mlp.widths=(7,)")
    variables = variables_of(config)
    kernel = np.asarray(variables["params"]["dense1"]["kernel"], np.float64)
    image = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    model = build_model(config, CLASSES, use="running")
    _, seen = model.apply(
        {"params": variables["params"]},
        image,
        train=False,
        capture_intermediates=True,
        mutable=True,
    )
    expected = np.asarray(image, np.float64).reshape(4, -1) @ (
        kernel / np.linalg.norm(kernel, axis=0)
    )
    found = seen["intermediates"]["dense1"]["__call__"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---- Combinations that cannot be


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("norm.scope=ghost:7",), "sets of 7 examples do not divide the 60"),
        (("norm.scope=ghost:1",), "one single value"),
        (("norm.kind=instance",), "one single value"),
        (("norm.kind=group", "norm.group.groups=33"), "groups=33 on 100 features"),
        (("norm.weights=spectral",), "unknown norm.weights"),
        (("norm.batch.variance=exact",), "fast, shifted, two_pass"),
        (("norm.batch.average=mean",), "cumulative"),
        (("norm.power.backward_decay=2.0", "norm.kind=power"), "give one in"),
        (("norm.kind=weight_norm", "norm.weights=none"), "takes from norm kind weight_norm"),
        (("norm.rules=('norm1 -> weight_norm',)", "norm.weights=centred"), "weight_norm"),
        (("init.name=lsuv", "norm.kind=weight_norm"), "init.name=lsuv sets the length"),
        (("init.name=lsuv", "norm.weights=standardise"), "init.name=lsuv sets the length"),
        (
            ("train.accumulate=2", "train.accumulate_statistics=batch", "norm.scope=ghost:6"),
            "ghost:6",
        ),
    ],
)
def test_refused_combinations(overrides, message):
    with pytest.raises(UserError, match=message):
        prepare(load(*overrides))


def test_ghost_sets_need_no_certain_number_of_devices():
    """Unlike sets of devices, they are the same statistics anywhere: devices stay open."""
    resolved = prepare(
        load("norm.scope=ghost:20", "parallel.devices=0", "data.batch_size=80")
    ).resolved
    assert resolved["parallel"]["devices"] == 0


def test_running_statistics_that_count_their_updates_start_at_none():
    config = load("norm.batch.average=last", "norm.batch.window=3", "model.mlp.widths=(5,)")
    state = initial_state(prepare(config))
    assert state.batch_stats["norm1"].keys() == {
        "mean",
        "var",
        "updates",
        "recent_mean",
        "recent_var",
    }
    assert state.batch_stats["norm1"]["recent_mean"].shape == (3, 5)


def test_a_program_gets_the_same_refusals_as_a_config():
    for given, message in [
        (dict(decay=2.0), "out of range"),
        (dict(epsilon=-1.0), "out of range"),
        (dict(correction=5), "0, 1"),
        (dict(scale="no"), "of type str, not bool"),
        (dict(decay="x"), "of type str, not float"),
        (dict(preset="torch", momentum=5.0), "out of range"),
    ]:
        with pytest.raises(UserError, match=message):
            make_norm("batch", given)


@pytest.mark.parametrize("kind", NORMS)
def test_what_no_kind_can_use_is_refused(kind):
    """Before the kind sees it: nothing, no batch axis, masks of another shape or of numbers."""
    site = make_norm(kind, {"compensation": "none"} if kind == "cross_iteration" else None)(
        name="x"
    )
    x = jnp.ones((32, 2, 2, 64))
    variables = site.init(jax.random.key(0), x)
    for bad, message in [(jnp.ones((0, 64)), "something in it"), (jnp.float32(1), "shape ()")]:
        with pytest.raises(UserError, match=re.escape(message)):
            site.apply(variables, bad)
    for mask, message in [(jnp.ones((3,), bool), "does not fit"), (jnp.ones((32,)), "is boolean")]:
        with pytest.raises(UserError, match=message):
            site.apply(variables, x, mask=mask)


def test_notes_say_what_will_not_happen():
    assert norm_config.notes(load(), 100) == []
    (note,) = norm_config.notes(load("norm.kind=renorm"), 100)
    assert "norm.renorm.warm_up=5000 is not shorter than this training of 100 steps" in note
    (note,) = norm_config.notes(load("norm.kind=conditional"), 100)
    assert "'condition'" in note
    config = load("norm.kind=none", "model.name=resnet", "model.resnet.zero_gamma=true")
    (note,) = norm_config.notes(config, 100)
    assert "zero_gamma does nothing at sites of kind none" in note


def test_a_model_can_be_a_static_argument_of_jit():
    model = build_model(load("norm.rules=('norm1 -> group groups=4',)"), CLASSES, use="running")
    assert hash(model) == hash(model)
    image = jnp.zeros((2, *SHAPE))
    variables = model.init(jax.random.key(0), image, train=False)

    def apply(model, variables, image):
        return model.apply(variables, image, train=False)

    assert jax.jit(apply, static_argnums=0)(model, variables, image).shape == (2, CLASSES)


def test_no_tracer_outlives_its_transformation():
    overrides = ["norm.cross_iteration.compensation=none", 'norm.rules=("norm -> layer",)']
    overrides += ["model.resnet.version=v2", "model.resnet.depth=8"]
    config = load("norm.kind=cross_iteration", *overrides, path=RESNET)
    variables = variables_of(config)
    model = build_model(config, CLASSES, use="batch")
    image = jax.random.normal(jax.random.key(0), (4, *SHAPE))

    def logits(variables, image):
        return model.apply(variables, image, train=True, mutable=["batch_stats"])[0]

    with jax.checking_leaks():
        assert jax.jit(logits)(variables, image).shape == (4, CLASSES)
