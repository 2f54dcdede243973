"""Configs: their resolved form, hash, and the numbers that enter a compiled step as data."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import average, initialise, models, norm_config, optim
from bnresearch import config as configs
from bnresearch.errors import UserError
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.norm import NORMS
from bnresearch.step import build_model

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits_mlp.py")
FILES = sorted((ROOT / "configs").glob("*.py"))
BATCH, CLASSES = 60, 10

# Every choice that can be made in a table, as an override.
CHOICES = [
    *(f"norm.kind={name}" for name in NORMS),
    *(f"model.name={name}" for name in models.MODELS),
    *(f"init.name={name}" for name in initialise.INITS),
    *(f"optim.name={name}" for name in optim.OPTIMIZERS),
    *(f"optim.schedule.name={name}" for name in optim.SCHEDULES),
    *(f"train.average.name={name}" for name in average.AVERAGES),
]


def at(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


def with_value(resolved, key, value):
    """A copy of a resolved config with another value at a dotted key."""
    copy = json.loads(json.dumps(resolved))
    *path, last = key.split(".")
    node = at(copy, ".".join(path)) if path else copy
    node[last] = value
    return copy


def another(value):
    """A value of the same type that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + type(value)(1)
        case str():
            return value + "x"
        case list():
            return value + (value[-1:] or [".* -> none"])


# ---- The resolved form


def assert_round_trip(config):
    resolved = configs.resolve(config)
    read = json.loads(json.dumps(resolved))
    back = configs.unresolve(read)
    assert configs.resolve(back) == resolved
    configs.validate(back)
    # What was not chosen is forgotten; the rest has the values and types it had.
    used = configs.flatten(resolved).keys() - {"schema"}
    before, after = configs.flatten(config), configs.flatten(back)
    # What was left open is decided.
    decided = norm_config.typical()
    before = {k: decided[k] if v is None else v for k, v in before.items()}
    assert {k: after[k] for k in used} == {k: before[k] for k in used}
    assert {k: type(after[k]) for k in used} == {k: type(before[k]) for k in used}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_file_survives_being_written_and_read(path):
    config = configs.load(path)
    configs.validate(config)
    assert_round_trip(config)


# Choices that are refused without another one.
NEEDS = dict.fromkeys(
    ("init.name=matched", "model.name=fixup", "model.name=skipinit", "model.name=nf_resnet"),
    ("norm.kind=none",),
)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_survives_being_written_and_read(choice):
    others = [choice, *NEEDS.get(choice, ()), "seed=3", "model.mlp.widths=(7, 5)"]
    assert_round_trip(configs.load(DIGITS, others))


def test_the_resolved_form_has_the_options_of_the_choices_made_and_no_others():
    config = configs.load(DIGITS, ["norm.kind=group", "optim.name=adamw"])
    resolved = configs.resolve(config)
    assert resolved["norm"] == {
        "kind": "group",
        "scope": "global",
        "rules": [],
        "weights": "auto",
        "group": {"epsilon": 1e-5, "groups": 32, "scale": True, "bias": True},
    }
    assert resolved["optim"]["adamw"] == {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    assert resolved["model"].keys() == {"name", "mlp"}
    assert not {"sgd", "lars", "lamb"} & resolved["optim"].keys()
    assert resolved["optim"]["schedule"].keys() == {"name", "warmup", "cosine"}


def test_every_default_is_in_the_resolved_form_of_some_choice():
    seen = set()
    for choice in [*CHOICES, "data.name=synthetic"]:
        seen |= configs.flatten(configs.resolve(configs.load(DIGITS, [choice]))).keys()
    every = configs.flatten(configs.default_config()).keys() | {"schema"}
    # A preset and its momentum are ways to say other options, which stand in their place; how a run
    # was started is not part of it.
    left_out = r"norm\.\w+\.(preset|momentum)|distributed\.\w+"
    assert seen == {key for key in every if not re.fullmatch(left_out, key)}


def test_a_run_of_another_schema_or_with_lost_keys_is_refused():
    resolved = configs.resolve(configs.default_config())
    with pytest.raises(UserError, match=r"schema 0, the program has 4; use the version"):
        configs.unresolve(resolved | {"schema": 0})
    with pytest.raises(UserError, match=r"unknown config key 'optim.momentum'; did you mean"):
        configs.unresolve(with_value(resolved, "optim.momentum", 0.9))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optim.momentum", "did you mean optim.sgd.momentum or optim.lars.momentum?"),
        ("train.duraton", "did you mean train.duration?"),
        ("duration", "did you mean train.duration?"),
        ("train.steps", "known: train.accumulate, train.accumulate_statistics, train.average, "),
        ("nothing", "known: data, distributed, "),
    ],
)
def test_an_unknown_key_gets_a_hint(key, said):
    with pytest.raises(UserError, match=re.escape(f"unknown config key {key!r}; {said}")):
        configs.load(DIGITS, [f"{key}=1"])


def test_overrides_are_read_as_the_type_of_the_default():
    overrides = ["optim.learning_rate=1", "model.mlp.widths=(8,)", "optim.sgd.nesterov=true"]
    config = configs.load(DIGITS, [*overrides, "train.duration=7st"])
    values = (
        config.optim.learning_rate,
        config.model.mlp.widths,
        config.optim.sgd.nesterov,
        config.train.duration,
    )
    assert values == (1.0, (8,), True, "7st")
    assert isinstance(config.optim.learning_rate, float)


@pytest.mark.parametrize("override", ["--config.seed=1", "--seed=1", "seed", "=1", ""])
def test_an_override_in_a_program_is_a_key_and_a_value(override):
    with pytest.raises(UserError, match=r"is not of the form key=value; write it without dashes"):
        configs.load(DIGITS, [override])


# ---- The hash


def reversed_keys(tree):
    if not isinstance(tree, dict):
        return tree
    return {key: reversed_keys(tree[key]) for key in reversed(list(tree))}


def test_the_hash_does_not_depend_on_the_order_of_keys():
    resolved = configs.resolve(configs.load(DIGITS))
    turned = reversed_keys(resolved)
    assert list(turned) != list(resolved)
    assert configs.config_hash(turned) == configs.config_hash(resolved)
    assert len(configs.config_hash(resolved)) == 64


@pytest.mark.parametrize("choice", CHOICES)
def test_the_hash_changes_with_every_option_that_is_used(choice):
    resolved = configs.resolve(configs.load(DIGITS, [choice]))
    hashes = [configs.config_hash(resolved)]
    for key, value in configs.flatten(resolved).items():
        hashes.append(configs.config_hash(with_value(resolved, key, another(value))))
    assert len(set(hashes)) == 1 + len(configs.flatten(resolved))


@pytest.mark.parametrize(
    "unused",
    [
        "norm.group.groups=4",
        "norm.layer.over=features",
        "model.resnet.depth=32",
        "model.plain.activation=tanh",
        "optim.adamw.b1=0.8",
        "optim.schedule.step.factor=0.5",
    ],
)
def test_the_hash_does_not_change_with_an_option_that_is_not_used(unused):
    one, other = configs.load(DIGITS), configs.load(DIGITS, [unused])
    assert one.to_dict() != other.to_dict()
    hashes = [configs.config_hash(configs.resolve(config)) for config in (one, other)]
    assert hashes[0] == hashes[1]


# ---- Numbers are data


def small(*overrides):
    return configs.load(DIGITS, ["parallel.devices=1", "train.duration=20st", *overrides])


def train_steps(experiment, state, count):
    """The state after ``count`` steps from ``state``, which the compiled step consumes."""
    program = experiment.program
    step = int(state.step)
    carry = program.train(
        program.layout.put(jax.tree.map(np.array, state)),
        train_feed(experiment, step, count),
        experiment.numbers,
        jnp.int32(count),
    )
    return jax.device_get(program.layout.get(carry))


def batches(experiment, count):
    """Images as rows and labels as one-hot rows of the first batches, in float64."""
    dataset, result = experiment.program.dataset, []
    for step in range(count):
        feed = dataset.feed(experiment.seed, step, 1)
        batch = dataset.train_batch(
            feed, jnp.int32(experiment.seed), jnp.int32(step), jnp.arange(BATCH)
        )
        image = np.asarray(batch["image"], np.float64).reshape(BATCH, -1)
        result.append((image, np.eye(CLASSES)[np.asarray(batch["label"])]))
    return result


def softmax_regression_by_hand(experiment, state, steps):
    """SGD with momentum, weight decay, clipping and label smoothing, from their definitions.

    ``g = clip(gradient) + weight_decay * W``, ``v = momentum * v + g``, ``W = W - rate * v``.
    """
    flat = configs.flatten(experiment.config)
    smoothing = flat["task.classification.label_smoothing"]
    w = state.params["head"]["kernel"].astype(np.float64)
    b = state.params["head"]["bias"].astype(np.float64)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for x, onehot in batches(experiment, steps):
        logits = x @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = (p - (1 - smoothing) * onehot - smoothing / CLASSES) / BATCH
        gw, gb = x.T @ error, error.sum(0)
        norm = np.sqrt((gw**2).sum() + (gb**2).sum())
        clip = min(1.0, flat["optim.clip_norm"] / norm)
        vw = flat["optim.sgd.momentum"] * vw + clip * gw + flat["optim.weight_decay"] * w
        vb = flat["optim.sgd.momentum"] * vb + clip * gb
        w = w - flat["optim.learning_rate"] * vw
        b = b - flat["optim.learning_rate"] * vb
    return w, b


REGRESSION = (
    "model.mlp.widths=()",
    "optim.schedule.name=constant",
    "optim.weight_decay=0.05",
    "optim.clip_norm=0.5",
    "task.classification.label_smoothing=0.1",
)
SWEEP = [
    "seed=5",
    "optim.learning_rate=0.3",
    "optim.weight_decay=0.2",
    "optim.clip_norm=2.0",
    "optim.sgd.momentum=0.5",
    "task.classification.label_smoothing=0.3",
]


def test_a_sweep_of_numbers_compiles_once_and_gives_what_the_formulae_give(compiled):
    first = prepare(small(*REGRESSION))
    results = [train_steps(first, jax.device_get(initial_state(first)), 4).params["head"]]
    assert "jit(run)" in compiled
    compiled.clear()
    for override in [None, *SWEEP]:
        experiment = prepare(small(*REGRESSION, *([override] if override else [])))
        assert experiment.program is first.program
        before = jax.device_get(initial_state(experiment))
        assert compiled == []
        after = train_steps(experiment, before, 4)
        assert compiled == []
        w, b = softmax_regression_by_hand(experiment, before, 4)
        compiled.clear()  # of the numbers by hand
        np.testing.assert_allclose(after.params["head"]["kernel"], w, atol=2e-6)
        np.testing.assert_allclose(after.params["head"]["bias"], b, atol=2e-6)
        results.append(after.params["head"])
    # The formulae tell the settings apart by far more than they are compared with.
    kernels = [result["kernel"] for result in results[1:]]
    for i, kernel in enumerate(kernels):
        for other in kernels[:i]:
            assert np.abs(kernel - other).max() > 1e-3


def test_the_seed_makes_the_state_that_the_model_makes():
    for seed in (0, 5):
        experiment = prepare(small(*REGRESSION, f"seed={seed}"))
        model = build_model(experiment.config, CLASSES, use="running")
        key = jax.random.fold_in(jax.random.key(seed), 1)
        wanted = model.init(key, jnp.zeros((1, 8, 8, 1)), train=False)["params"]
        params = initial_state(experiment).params
        np.testing.assert_array_equal(params["head"]["kernel"], wanted["head"]["kernel"])


def test_the_decay_reaches_the_running_statistics_without_compiling_again(compiled):
    overrides = ("model.mlp.widths=(6,)", "optim.learning_rate=0.0")  # frozen: two equal layers
    first = prepare(small(*overrides, "norm.batch.decay=0.9"))
    state = jax.device_get(initial_state(first))
    train_steps(first, state, 1)
    found = {}
    for decay in (0.9, 0.5, 0.99):
        experiment = prepare(small(*overrides, f"norm.batch.decay={decay}"))
        assert experiment.program is first.program
        compiled.clear()
        found[decay] = train_steps(experiment, state, 2).batch_stats["norm1"]
        assert compiled == []
    kernel = state.params["dense1"]["kernel"].astype(np.float64)
    (x1, _), (x2, _) = batches(first, 2)
    for decay, stats in found.items():
        mean, var = np.zeros(6), np.ones(6)
        for x in (x1 @ kernel, x2 @ kernel):
            mean = decay * mean + (1 - decay) * x.mean(0)
            var = decay * var + (1 - decay) * x.var(0)
        np.testing.assert_allclose(stats["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


def test_zero_leaves_a_part_out_and_is_another_program():
    base = configs.resolve(small(*REGRESSION))
    for key in ("optim.weight_decay", "optim.clip_norm", "optim.sgd.momentum"):
        assert configs.program_key(base) != configs.program_key(with_value(base, key, 0.0))
        changed = with_value(base, key, at(base, key) / 2)
        assert configs.program_key(base) == configs.program_key(changed)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_program_is_another_one_for_all_that_is_no_number(choice):
    resolved = configs.resolve(small(choice))
    for key, value in configs.flatten(resolved).items():
        changed = with_value(resolved, key, another(value))
        same = configs.program_key(resolved) == configs.program_key(changed)
        switched = isinstance(value, float) and bool(value) != bool(another(value))
        number = key in configs.NUMBERS and not switched
        assert same == (number or key in configs.LOOP), key


def test_the_numbers_are_those_of_the_choices_made():
    lars = configs.numbers(configs.resolve(small("optim.name=lars", "norm.kind=none")))
    assert lars == {
        "seed": 0,
        "optim.learning_rate": 0.1,
        "optim.weight_decay": 0.0,
        "optim.clip_norm": 0.0,
        "optim.agc": 0.0,
        "optim.lars.momentum": 0.9,
        "optim.lars.trust_coefficient": 0.001,
        "task.classification.label_smoothing": 0.0,
    }
