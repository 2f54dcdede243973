"""The doctor's arithmetic against closed forms, its page, and the verb for runs."""

import json
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from run_tools import DIGITS, snapshot

from bnresearch import config as configs
from bnresearch import doctor
from bnresearch.doctor import damage, mends, scope, sites, statistics
from bnresearch.doctor.data import _label_share, spread_ratio
from bnresearch.doctor.examine import Kept, Site, padded, paddings
from bnresearch.doctor.run import diagnose_run
from bnresearch.doctor.structure import Made
from bnresearch.errors import UserError
from bnresearch.train import run

RNG = np.random.RandomState(0)
FEATURES = 12


def site(running=None, mean=None, var=None, batches=4, count=64, **made):
    """A site whose precise statistics are ``mean`` and ``var``, the same in every batch."""
    mean = RNG.normal(size=FEATURES) if mean is None else np.asarray(mean, float)
    var = RNG.uniform(0.5, 3, FEATURES) if var is None else np.asarray(var, float)
    look = {name: np.tile(value, (batches, 1)) for name, value in (("mean", mean), ("var", var))}
    look["count"] = np.full((batches, len(mean)), float(count))
    kept = None if running is None else Kept(*(np.asarray(x, float) for x in running))
    made = {"name": "BatchNorm", "keeps": True, "decay": 0.9, **made}
    return Site("norm", Made(**made), 0, running=kept, look=look)


# ---- What is computed


@pytest.mark.parametrize(("decay", "updates"), [(0.9, 5), (0.99, 100), (0.999, 30)])
def test_the_weight_of_the_start_is_the_decay_to_the_number_of_updates(decay, updates):
    mean, var = RNG.normal(size=FEATURES), RNG.uniform(0.5, 3, FEATURES)
    running = Kept(np.zeros(FEATURES), np.ones(FEATURES))
    for _ in range(updates):
        running = Kept(
            decay * running.mean + (1 - decay) * mean, decay * running.var + (1 - decay) * var
        )
    share, fits = statistics.start_share(site(running, mean, var))
    assert share == pytest.approx(decay**updates, rel=1e-3)  # but for epsilon
    assert fits == pytest.approx(1, abs=1e-6)


def test_statistics_of_other_weights_are_no_young_ones():
    mean, var = RNG.normal(size=FEATURES), RNG.uniform(0.5, 3, FEATURES)
    stale = Kept(1 + RNG.normal(size=FEATURES), RNG.uniform(0.5, 3, FEATURES))
    assert not statistics.is_young(site(stale, mean, var))
    assert statistics.deviates(site(stale, mean, var))


def test_the_distance_is_in_deviations_and_logarithms():
    z, log_ratio = site((np.full(4, 3.0), np.full(4, 8.0)), np.ones(4), np.full(4, 4.0)).apart()
    assert z == pytest.approx(1)  # two apart, deviation two
    assert log_ratio == pytest.approx(math.log(2), rel=1e-5)


def test_the_noise_of_a_short_memory_is_no_deviation():
    """Batch means scatter by s / sqrt(n); a running mean of decay 0.1 by nearly as much."""
    one = site((np.full(FEATURES, 0.3), np.ones(FEATURES)), np.zeros(FEATURES), np.ones(FEATURES))
    assert statistics.deviates(one)
    one.look["mean"] = RNG.normal(scale=0.3, size=(50, FEATURES))
    noisy = Site("norm", one.made._replace(decay=0.1), 0, one.running, look=one.look)
    noisy.look = {k: v if k == "mean" else np.tile(v[0], (50, 1)) for k, v in one.look.items()}
    assert not statistics.deviates(noisy)


@pytest.mark.parametrize("kinds", [1, 4])
def test_batch_means_scatter_as_chance_says_unless_batches_are_sorted(kinds):
    """With examples of several kinds, each batch of one kind: B times as much, nearly."""
    size, batches = 32, 60
    x = RNG.normal(size=(batches, size, FEATURES))
    x = x + 3 * RNG.normal(size=(kinds, FEATURES))[RNG.randint(kinds, size=(batches, 1))]
    one = Site("norm", Made("BatchNorm", True), 0)
    one.look = {"mean": x.mean(1), "between": x.var(1)}
    ratio = spread_ratio(one, size)
    assert 0.7 < ratio < 1.4 if kinds == 1 else ratio > 20


def test_an_optimizer_shows_what_it_decays_and_what_it_leaves_alone():
    params = {
        "conv": {"kernel": np.ones((2, 2))},
        "norm1": {"scale": np.ones(2), "bias": np.zeros(2)},
        "norm2": {"scale": np.ones(2), "bias": np.zeros(2)},
    }
    rate = optax.linear_schedule(0.0, 0.1, 2)  # the first step is of length 0
    everything = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, 0.9))
    assert doctor.treatment_of(everything, params).decayed == {"norm1", "norm2"}
    matrices = optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    found = doctor.treatment_of(matrices, params)
    assert (found.decayed, found.still) == (frozenset(), frozenset())
    labels = {"conv": "train", "norm1": "still", "norm2": "train"}
    frozen = optax.multi_transform({"train": optax.sgd(0.1), "still": optax.set_to_zero()}, labels)
    found = doctor.treatment_of(frozen, params)
    assert (found.decayed, found.still) == (frozenset(), {"norm1"})


class Dropped(nn.Module):
    """Dropout before a norm, by itself and behind a linear map."""

    rate: float
    linear: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        if self.linear:
            x = nn.Dense(16, use_bias=False, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)


@pytest.mark.parametrize("linear", [False, True])
def test_the_variance_shift_of_dropout_is_predicted(linear):
    """ReLU of a standard normal, kept with p = 0.5: (pi - 1) / (pi / p - 1) = 0.4054 (Li et al.,
    2019); behind weights w it is v / (v + (1 - p) / p * sum w^2 E[h^2]), E[h^2] = 1/2."""
    model = Dropped(0.5, linear)
    batches = [RNG.normal(size=(256, 64)).astype("f4") for _ in range(8)]
    variables = model.init(jax.random.key(0), batches[0], train=False)
    report = doctor.diagnose(model, variables, batches)
    found = next(f for f in report.findings if f.check == "dropout_before")
    expected = (math.pi - 1) / (math.pi / 0.5 - 1)
    if linear:
        weights = np.asarray(variables["params"]["dense"]["kernel"])
        covariance = 0.5 * (1 - 1 / math.pi)  # of independent inputs
        v = covariance * np.square(weights).sum(0)
        expected = np.exp(np.mean(np.log(v / (v + 0.5 * np.square(weights).sum(0)))))
    assert found.sites == ["norm"]
    assert found.numbers["predicted"]["norm"] == pytest.approx(expected, rel=0.03)
    assert found.numbers["measured"]["norm"] == pytest.approx(expected, rel=0.03)


def test_padding_is_seen_where_sequences_end_in_zeros():
    tokens = np.array([[3, 1, 0, 0], [2, 0, 5, 0], [1, 1, 1, 1]])
    inside = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(padded({"x": tokens}), inside)
    assert padded({"x": tokens.astype("f4")}) is None  # features, not positions
    # A picture whose last rows are black: only a mask says that there are no data.
    assert padded({"x": tokens[..., None] * np.ones(3, "f4")}) is None
    some, whole = paddings([{"x": tokens}, {"x": np.ones((3, 4), int)}])
    np.testing.assert_array_equal(some, inside)
    assert whole.all()
    assert padded(np.ones((2, 3, 4))) is None
    given = padded({"x": tokens, "mask": inside[:, ::-1].astype(int)})
    np.testing.assert_array_equal(given, inside[:, ::-1])


def test_parts_of_a_batch_fit_variances_within_them():
    x = RNG.normal(size=(40, 64, FEATURES))

    def within(parts):
        return x.reshape(40, parts, -1, FEATURES).var(2).mean((0, 1))

    def fit(var):
        one = site((np.zeros(FEATURES), var))
        parts = {number: {"norm": within(number)} for number in (1, 2, 4, 8)}
        return scope.parts_that_fit(SimpleNamespace(keepers=[one], parts=parts))[0]

    assert fit(x.reshape(-1, FEATURES).var(0)) == 1
    assert fit(x.reshape(40, 8, 8, FEATURES)[::2].var(2).mean((0, 1))) == 8


def test_sites_that_something_else_explains_say_nothing_of_the_scope():
    var = RNG.uniform(2, 3, FEATURES)
    mean = RNG.normal(size=FEATURES)
    kept = {
        "in parts": (mean, 0.875 * var),
        "untouched": (np.zeros(FEATURES), np.ones(FEATURES)),
        "broken": (mean, np.full(FEATURES, np.inf)),
        "young": (0.2 * mean, 0.8 + 0.2 * var),
        "frozen": (mean, 0.1 * var),
        "believed frozen": (mean, 0.1 * var),
    }
    ones = {}
    for path, running in kept.items():
        ones[path] = site(running, mean, var, frozen=path == "frozen")
        ones[path].path = path
    keepers = list(ones.values())
    frozen = frozenset({"believed frozen"})
    examined = SimpleNamespace(keepers=keepers, size=1, frozen=frozen, treatment=None)
    found = damage.in_parts(examined, [])
    assert found.keys() == {1}  # a single example cannot be cut
    assert found[1].keys() == {"in parts"}
    np.testing.assert_array_equal(found[1]["in parts"], var)
    examined.keepers = keepers[1:]
    assert damage.in_parts(examined, []) == {}


# ---- What is no fault


class Switched(nn.Module):
    """A norm whose field says whether it trains, or an argument that nobody knows."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(x)


def rows(count, size=16, shift=0.0):
    return [(shift + RNG.normal(size=(size, 4))).astype("f4") for _ in range(count)]


@pytest.fixture(scope="module")
def switched():
    """Variables whose running statistics are those of the data."""
    variables = Switched().init(jax.random.key(0), rows(1)[0])

    def call(variables, batch, train, **rest):
        return Switched(train=train).apply(variables, batch, **rest)

    return variables, call


def test_a_model_that_cannot_be_told_whether_it_trains_is_refused(switched):
    variables, call = switched
    with pytest.raises(UserError, match="would tell it whether it trains; say how to call it"):
        doctor.diagnose(Switched(), variables, rows(2))
    report = doctor.diagnose(Switched(), variables, rows(4), call=call)
    assert "wrong_use" not in {f.check for f in report.findings}


def test_a_few_examples_of_evaluation_are_no_other_preprocessing(switched):
    variables, call = switched
    for size, shift, wanted in ((4, 0.0, False), (64, 0.0, False), (64, 3.0, True)):
        evaluated = rows(1, size, shift)
        report = doctor.diagnose(Switched(), variables, rows(12), eval_batches=evaluated, call=call)
        assert ("preprocessing" in {f.check for f in report.findings}) == wanted, size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=-1), "count=-1"),
        (dict(frozen=["("]), "no regular expression"),
        (dict(frozen="nor"), "'nor' matches no site"),
        (dict(optimizer="adam"), "the optimizer is a str"),
        (dict(eval_batches=[np.ones((4, 5), "f4")]), "evaluation batches have"),
        (dict(eval_batches=[]), "no evaluation batches"),
        (dict(eval_batches=3), "evaluation batches are a int"),
    ],
)
def test_wrong_arguments_are_refused_in_words(options, message, switched):
    variables, call = switched
    with pytest.raises(UserError, match=message):
        doctor.diagnose(Switched(), variables, rows(2), **{"call": call, **options})


def test_sorted_labels_are_told_from_the_labels_of_small_batches():
    labels = RNG.permutation(np.tile([0, 1], 16))
    assert _label_share(SimpleNamespace(labels=labels.reshape(8, 4))) > 0.5
    assert _label_share(SimpleNamespace(labels=np.sort(labels).reshape(8, 4))) < 0.5


# ---- The table, the page, the verb


def test_every_check_has_a_mend_and_is_described():
    assert mends.MENDS.keys() == doctor.CHECKS.keys()
    for check in doctor.CHECKS.values():
        assert check.__doc__.strip()
    assert sites.FEW == 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("doctor") / "run"
    overrides = (
        "parallel.devices=1",
        "model.mlp.widths=(16, 16)",
        "train.duration=60st",
        "norm.rules=('norm1 -> decay=0.999',)",
        "optim.weight_decay=0.001",
        "optim.decay_norms_and_biases=True",
    )
    run(configs.load(DIGITS, overrides), workdir, show="off")
    return workdir


def test_a_run_is_diagnosed_and_left_as_it_is(trained, tmp_path):
    before = snapshot(trained)
    report = diagnose_run(trained, batches=20)
    found = {finding.check: finding for finding in report.findings}
    assert found["young"].sites == ["norm1"]
    assert found["young"].numbers["weight of the start"]["norm1"] == pytest.approx(
        0.999**60, abs=0.03
    )
    assert found["scale_decay"].sites == ["norm1", "norm2"]
    assert f"--workdir={trained} --stats=precise" in found["young"].mend
    assert not {"scope", "few_values", "non_iid", "preprocessing", "wrong_use"} & found.keys()
    page = report.write(tmp_path / "page")
    assert snapshot(trained) == before
    text = page.read_text()
    for finding in report.findings:
        assert finding.title in text
    written = json.loads((tmp_path / "page" / "doctor.json").read_text())
    assert [f["check"] for f in written["findings"]] == [f.check for f in report.findings]
    assert written["sites"]["norm1"]["decay"] == pytest.approx(0.999)
    assert report.write(tmp_path / "page") == page  # replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="neither empty nor a doctor's page"):
        report.write(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_statistics_per_device_are_a_finding_where_global_ones_were_wanted(trained):
    report = diagnose_run(trained, batches=4, scope="device")
    assert [f.title for f in report.serious if f.check == "scope"] == ["Statistics are global"]
    found = next(f for f in report.serious if f.check == "scope")
    assert found.mend.endswith("--config.norm.scope=device")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ("--workdir is missing",)),
        (["--workdir=nowhere"], ("not a run folder",)),
        (["--workdir=nowhere", "--split=exam"], ("unknown --split 'exam'",)),
        (["--workdir=nowhere", "--scope=half"], ("unknown --scope 'half'", "global")),
        (["--workdir=nowhere", "--batches=1"], ("--batches=1", "at least 2")),
    ],
)
def test_a_wrong_question_is_refused(argv, parts, refused):
    refused(["doctor", *argv], *parts)


def test_a_run_without_norms_is_refused(tmp_path):
    overrides = ("parallel.devices=1", "norm.kind=none", "train.duration=2st")
    run(configs.load(DIGITS, overrides), tmp_path / "run", show="off")
    with pytest.raises(UserError, match="no norm"):
        diagnose_run(tmp_path / "run", batches=2)
