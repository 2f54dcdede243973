"""docs/own_norm.md does what it says: its functions and rows work as they are printed there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import config as configs
from bnresearch import handbook, norm
from bnresearch.kinds import starts
from bnresearch.norm import NORMS, Kind, Scope
from bnresearch.train import run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(monkeypatch):
    """The kinds of the page, in the table NORMS for the time of a test."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_norm.md").read_text(), re.DOTALL)
    names = {"Kind": Kind, "starts": starts}
    table = {}
    for block in blocks:
        if block.startswith('"'):
            table |= eval("{" + block + "}", names)
        else:
            exec(block, names)
    for name, kind in table.items():
        monkeypatch.setitem(NORMS, name, kind)
    return table


def test_they_are_listed_and_described(rows):
    for kind in rows:
        assert handbook.row(kind).title.endswith("(Nobody, 2026)")
        assert f"## `{kind}`" in handbook.norms_page()
    assert handbook.row("deviation").state == ("mean", "var")
    assert rows["deviation"].batch_dependent and not rows["peak"].batch_dependent


def test_the_norm_of_one_example(rows):
    x = jnp.array([[1.0, -4.0], [0.5, 0.25]])
    kind = rows["peak"]
    params = kind.params(2, kind.options)
    y = norm.apply(kind, x, params, None, {}, {"epsilon": 0.0}).y
    np.testing.assert_allclose(y, [[0.25, -1.0], [1.0, 0.5]])


def test_the_norm_of_the_batch(rows):
    x = jax.random.normal(jax.random.key(0), (8, 3)) * 2 + 1
    kind = rows["deviation"]
    params, running = kind.params(3, kind.options), kind.state(3, kind.options)
    context = {"use": "batch", "scope": Scope(splits=2), "mask": None}
    y, new, _ = norm.apply(kind, x, params, running, context, {"decay": 0.0, "epsilon": 0.0})
    sets = np.split(np.asarray(x, np.float64), 2)
    centred = [s - s.mean(0) for s in sets]
    expected = np.concatenate([c / np.abs(c).mean(0) for c in centred])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    means = np.stack([s.mean(0) for s in sets])
    squares = np.stack([np.square(np.abs(c).mean(0)) for c in centred])
    np.testing.assert_allclose(new.mean, means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, squares.mean(0) + means.var(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peak", "deviation"])
def test_both_train_from_a_config(rows, kind, tmp_path):
    overrides = [f"norm.kind={kind}", f"norm.{kind}.epsilon=0.001", "train.duration=10ep"]
    config = configs.load(ROOT / "configs/digits_mlp.py", [*overrides, "parallel.devices=1"])
    assert run(config, tmp_path / kind, show="off")["metrics"]["test"]["accuracy"] > 0.9
