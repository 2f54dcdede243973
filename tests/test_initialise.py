"""Initialisers: orthogonal kernels, unit variance layer by layer, the start of a BatchNorm twin;
alone and by the config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bnresearch import initialise, reparam
from bnresearch.config import default_config
from bnresearch.errors import UserError
from bnresearch.experiment import initial_state, prepare
from bnresearch.layers import make_norm
from bnresearch.models import MODELS

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def start(name, **changed):
    """A model without norms, its parameters at the start, and these by path."""
    return start_on(IMAGES, name, **changed)


def start_on(images, name, **changed):
    model = MODELS[name].module(10, make_norm("none"), **changed)
    params = jax.jit(lambda x: model.init(jax.random.key(0), x, False))(images)["params"]
    return model, params, flatten_dict(params, sep="/")


def digits(*overrides):
    config = default_config()
    config.data.name, config.data.batch_size = "digits", 100
    config.norm.kind, config.parallel.devices = "none", 1
    config.update_from_flattened_dict(dict(overrides))
    return config


def test_orthogonal_kernels_are_orthogonal_and_nothing_else_changes():
    _, params, flat = start("plain", widths=(4, 48), convs=(1, 2))
    drawn = flatten_dict(initialise.orthogonal(params, jax.random.key(1)), sep="/")
    for path in ("stage1/conv1/kernel", "stage2/conv1/kernel", "stage2/conv2/kernel"):
        w = np.asarray(drawn[path], np.float64).reshape(-1, drawn[path].shape[-1])
        w = w if w.shape[0] >= w.shape[1] else w.T  # 36 inputs, 48 outputs: the rows are orthogonal
        np.testing.assert_allclose(w.T @ w, 2 * np.eye(w.shape[1]), atol=1e-5)
    same = {path for path in flat if np.array_equal(flat[path], drawn[path])}
    assert same == {path for path in flat if not path.endswith("kernel")} | {"head/kernel"}


def test_orthogonal_draws_depend_on_the_path_and_the_key_alone():
    _, params, _ = start("mlp", widths=(8, 8))
    draw = initialise.orthogonal
    first = draw(params, jax.random.key(1))
    fewer = draw({"dense2": params["dense2"], "head": params["head"]}, jax.random.key(1))
    np.testing.assert_array_equal(first["dense2"]["kernel"], fewer["dense2"]["kernel"])
    other = draw(params, jax.random.key(2))
    assert np.abs(first["dense2"]["kernel"] - other["dense2"]["kernel"]).max() > 0.1


LSUV = [("init.name", "lsuv")]


@pytest.mark.parametrize(
    "changed",
    [
        [("model.name", "mlp"), ("model.mlp.activation", "tanh")],
        [("model.name", "plain"), ("norm.kind", "batch")],
        [("model.name", "skipinit"), ("model.skipinit.depth", 8), ("model.skipinit.alpha", 0.5)],
    ],
    ids=["mlp", "plain with batch norm", "skipinit"],
)
def test_lsuv_gives_every_layer_unit_variance_on_the_first_batch(changed):
    config = digits(*LSUV, *changed)
    experiment = prepare(config)
    params = initial_state(experiment).params
    config.init.name = "orthogonal"
    plain = initial_state(prepare(config))
    dataset = experiment.program.dataset
    image = dataset.train_batch(dataset.feed(0, 0), 0, 0, jnp.arange(100))["image"]
    stds = {}

    def record(following, arguments, keywords, context):
        y = following(*arguments, **keywords)
        if isinstance(context.module, nn.Conv | nn.Dense):
            stds["/".join(context.module.path)] = float(np.std(y))
        return y

    def look(params):
        with nn.intercept_methods(record):
            experiment.program.forward(params, plain.batch_stats, image, experiment.numbers)
        return dict(stds)

    assert look(params).values() == pytest.approx([1.0] * len(stds), abs=0.01)
    assert len(stds) >= 4
    assert max(abs(std - 1) for std in look(plain.params).values()) > 0.2
    for path, kernel in flatten_dict(params, sep="/").items():
        before = np.asarray(flatten_dict(plain.params, sep="/")[path])
        if path.endswith("kernel"):  # only their length has changed
            ratio = np.vdot(kernel, before) / np.linalg.norm(kernel) / np.linalg.norm(before)
            assert ratio == pytest.approx(1, abs=1e-5)
        else:
            np.testing.assert_array_equal(kernel, before)


def test_lsuv_reports_layers_in_the_order_of_execution():
    model, params, _ = start("plain", widths=(8, 8, 8), convs=(1, 2, 1))

    def apply(params, x):
        return model.apply({"params": params}, x, False)

    report = initialise.lsuv(apply, params, IMAGES)
    order = ["stage1/conv1", "stage2/conv1", "stage2/conv2", "stage3/conv1", "head"]
    assert list(report.before) == list(report.after) == order
    assert report.passes == 2
    assert all(abs(std - 1) < 1e-3 for std in report.after.values())


def test_lsuv_takes_a_few_more_passes_with_biases():
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)])
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    params["layers_0"]["bias"] = 0.5 * jax.random.normal(jax.random.key(1), (32,))
    report = initialise.lsuv(lambda p, x: model.apply({"params": p}, x), params, x)
    assert report.passes > 2
    assert all(abs(std - 1) <= 0.01 for std in report.after.values())


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_lsuv_begins_anywhere(size):
    dense = nn.Dense(8)
    params = {"kernel": size * jax.random.normal(jax.random.key(0), (3, 8)), "bias": jnp.zeros(8)}
    report = initialise.lsuv(lambda p, x: dense.apply({"params": p}, x), params, IMAGES)
    assert report.passes == 2


def test_lsuv_refuses_what_it_cannot_rescale():
    used = reparam.hooks(reparam.weight_norm)
    dense = nn.Dense(8, dot_general=used.dense)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    params = dense.init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="after 2 passes.*not 1.*weight norm"):
        initialise.lsuv(lambda p, x: dense.apply({"params": p}, x), params, x)
    model, params, _ = start("fixup", depth=8)
    with pytest.raises(UserError, match="stage1/block1/conv2 still.*deviation 0, .*of zeros"):
        initialise.lsuv(lambda p, x: model.apply({"params": p}, x, False), params, IMAGES)


def test_initialisers_of_the_config():
    first = initial_state(prepare(digits())).params
    he = initial_state(prepare(digits(("init.name", "he")))).params
    jax.tree.map(np.testing.assert_array_equal, first, he)
    orthogonal = initial_state(prepare(digits(("init.name", "orthogonal")))).params
    w = np.asarray(orthogonal["dense2"]["kernel"])
    np.testing.assert_allclose(w.T @ w, 2 * np.eye(100), atol=1e-5)
    np.testing.assert_array_equal(orthogonal["head"]["kernel"], he["head"]["kernel"])
    again = initial_state(prepare(digits(*LSUV))).params
    jax.tree.map(np.testing.assert_array_equal, again, initial_state(prepare(digits(*LSUV))).params)
    other = initial_state(prepare(digits(*LSUV, ("seed", 1)))).params
    assert np.abs(other["dense1"]["kernel"] - again["dense1"]["kernel"]).max() > 0.1


MATCHED = [("init.name", "matched")]
RESNET = [("model.name", "resnet"), ("model.resnet.depth", 8)]
SMALL = [("model.plain.widths", (6, 8)), ("model.plain.convs", (2, 1))]
NETS = {
    "mlp": [("model.name", "mlp"), ("model.mlp.activation", "tanh")],
    "plain": [("model.name", "plain"), *SMALL],
    "resnet": [*RESNET, ("model.resnet.shortcut", "projection")],
    "resnet with zero-gamma": [*RESNET, ("model.resnet.zero_gamma", True)],
    "half its norms by a rule": [("norm.kind", "batch"), ("norm.rules", ("norm1 -> none",))],
}


def first_logits(config):
    """The parameters at the start, and the logits of the first batch in training mode."""
    experiment = prepare(config)
    state, dataset = initial_state(experiment), experiment.program.dataset
    image = dataset.train_batch(dataset.feed(0, 0), 0, 0, jnp.arange(100))["image"]
    given = (state.params, state.batch_stats, image, experiment.numbers)
    return flatten_dict(state.params, sep="/"), jax.jit(experiment.program.forward)(*given)


SLOW = ("resnet", "resnet with zero-gamma")


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(changed, marks=[pytest.mark.slow] * (name in SLOW), id=name)
        for name, changed in NETS.items()
    ],
)
def test_matched_starts_as_the_function_of_its_batch_norm_twin(changed):
    params, logits = first_logits(digits(*changed, *MATCHED))
    twin, wanted = first_logits(digits(*changed, ("norm.kind", "batch"), ("norm.rules", ())))
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
    for path, kernel in params.items():  # the same draw, up to the length of each feature
        if path.endswith("kernel") and np.any(kernel):
            units = [np.reshape(k, (-1, k.shape[-1])) for k in (kernel, twin[path])]
            a, b = (unit / np.linalg.norm(unit, axis=0) for unit in units)
            np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(params["head/kernel"], twin["head/kernel"])


def test_matched_kernels_and_biases_by_hand():
    x = np.random.default_rng(3).normal(2.0, 3.0, (50, 8, 8, 1)).astype(np.float32)
    model, params, _ = start_on(x, "mlp", widths=(5, 4))
    fitted = initialise.matched(lambda p, x: model.apply({"params": p}, x, True), params, x)
    h = np.asarray(x, np.float64).reshape(50, -1)
    for layer in (1, 2):
        h = h @ np.asarray(params[f"dense{layer}"]["kernel"], np.float64)
        mean, std = h.mean(0), np.sqrt(h.var(0) + 1e-5)
        wanted = np.asarray(params[f"dense{layer}"]["kernel"]) / std
        np.testing.assert_allclose(fitted.params[f"dense{layer}"]["kernel"], wanted, rtol=1e-5)
        np.testing.assert_allclose(fitted.params[f"norm{layer}"]["bias"], -mean / std, atol=1e-5)
        np.testing.assert_allclose(fitted.std[f"norm{layer}"], std, rtol=1e-5)
        np.testing.assert_allclose(fitted.mean[f"norm{layer}"], mean, rtol=1e-4, atol=1e-5)
        h = np.maximum((h - mean) / std, 0)
    assert list(fitted.std) == ["norm1", "norm2"]
    np.testing.assert_array_equal(fitted.params["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([("norm.kind", "batch")], "starts sites of norm.kind=none.*none here"),
        ([("model.mlp.placement", "after_act")], "an activation stands between.*before_act"),
        ([("model.name", "resnet"), ("model.resnet.version", "v2")], "read a residual trunk.*v1"),
        ([("model.name", "fixup")], "init.name=matched would replace the start"),
        ([("norm.weights", "weight_norm")], "weight_norm takes lengths away"),
    ],
)
def test_matched_refuses_before_anything_is_compiled(changed, message):
    with pytest.raises(UserError, match=message):
        prepare(digits(*MATCHED, *changed))


def test_matched_refuses_what_it_only_sees_in_the_net():
    with pytest.raises(UserError, match=r"stage2/block1/norm1 .* directly follow a linear"):
        match_flat("resnet", depth=8, version="v2")
    with pytest.raises(UserError, match="there is none here"):
        match_flat("skipinit", depth=8)
    with pytest.raises(UserError, match=r"8 of the 8 features that come to norm1 are the same"):
        match_flat("mlp", widths=(8,))


class Biased(nn.Module):
    """A linear layer that keeps its bias in front of a site."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense1")(x.reshape(len(x), -1))
        return make_norm("none")(name="norm1")(x)


def test_matched_refuses_a_linear_layer_with_a_bias_of_its_own():
    model = Biased()
    params = model.init(jax.random.key(0), IMAGES)["params"]
    with pytest.raises(UserError, match="norm1 .* without a bias of its own"):
        initialise.matched(lambda p, x: model.apply({"params": p}, x), params, IMAGES)


def match_flat(name, **changed):
    """`matched` for a model whose kernels are 0."""
    model = MODELS[name].module(10, make_norm("none"), **changed)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), IMAGES)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    return initialise.matched(lambda p, x: model.apply({"params": p}, x, True), params, IMAGES)
