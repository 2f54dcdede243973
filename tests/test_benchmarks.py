"""The benchmarks: what they count and compare, and that every part runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import devices, hlo, layer, measure, peers, picture, step
from bnresearch import config as configs
from bnresearch.step import make_init

ROOT = Path(__file__).parent.parent
SPREAD = {"median": 2.0, "low": 1.5, "high": 3.0, "n": 4}


def test_every_other_round_goes_backwards_after_one_untimed_call_each():
    calls = []
    seconds = measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round():
    assert measure.ratios([2, 9, 8], [1, 3, 2]) == {"median": 3, "low": 2.5, "high": 3.5, "n": 3}
    assert measure.scaled(SPREAD, 2.0) == {"median": 4.0, "low": 3.0, "high": 6.0, "n": 4}


def test_collectives_are_counted_with_the_bytes_of_their_results():
    text = """
  %a = f32[100]{0} all-reduce(%x), replica_groups={{0,1}}
  ROOT %b = (f32[100]{0}, bf16[8,2]{1,0}) all-reduce-start(%x, %y), to_apply=%sum
  %c = f32[100]{0} all-reduce-done(%b)
  %d = s32[] add(%e, %f)
"""
    assert hlo.collectives(text) == {"operations": 2, "bytes": 400 + 400 + 32}


def test_one_device_under_jit_needs_no_collective_and_two_need_some():
    counted = [devices.added("jit", "global", count) for count in (1, 2)]
    assert counted[0] == {part: {} for part in devices.PARTS}
    # Mean and variance of 100 features, however many operations that takes.
    assert counted[1]["forward"]["bytes"] >= 2 * 4 * devices.FEATURES
    assert counted[1]["statistics"] == {}


def test_kept_buffers_are_counted_once():
    x, scale = jnp.ones((8, 4)), jnp.ones(4)

    def bytes_of(function):
        return layer.kept(peers.Layer(lambda p, s, x: (function(p, x), s), scale, {}), x, [])

    assert bytes_of(lambda scale, x: scale + x) == 0
    assert bytes_of(lambda scale, x: x * x + scale) == x.nbytes
    assert bytes_of(lambda scale, x: scale * (x * x)) == 2 * x.nbytes + scale.nbytes


@pytest.mark.parametrize("what", peers.BEHIND)
@pytest.mark.parametrize("name", [*peers.JAX, peers.TORCH])
def test_all_libraries_compute_the_same_layer(name, what):
    if name in layer.LAZY:
        pytest.importorskip(name)
    x, t, other = (jax.random.normal(key, (6, 5, 5, 3)) for key in jax.random.split(KEY, 3))
    x, added = 3 * x + 1, [other] if "add" in what else []
    expected = np.asarray(x, np.float64)
    expected -= expected.mean((0, 1, 2))
    expected /= np.sqrt((expected**2).mean((0, 1, 2)) + 1e-5)
    expected += np.asarray(other) if added else 0
    expected = np.maximum(expected, 0) if "ReLU" in what else expected
    if name == peers.TORCH:
        y = peers.Torch(what, x, t, added)().detach().numpy()
    else:
        one = peers.JAX[name](x, what)
        if one.features_first:
            x, *added = (jnp.moveaxis(array, -1, 1) for array in (x, *added))
        y = np.asarray(jax.jit(one.apply)(one.params, one.stats, x, *added)[0])
    features_first = name in ("equinox", peers.TORCH)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1) if features_first else y, expected, atol=1e-5)


KEY = jax.random.key(0)


@pytest.mark.parametrize("name", step.CASES)
def test_the_nets_of_all_sides_have_equally_many_parameters(name):
    case = step.CASES[name]
    config = configs.load(ROOT / f"configs/{case.config}.py", case.overrides)
    shape, classes = {"digits": ((8, 8, 1), 10)}.get(
        config.data.name, (config.data.synthetic.shape, config.data.synthetic.classes)
    )
    found = configs.numbers(configs.resolve(config)).items()
    numbers = {key: jnp.float32(value) for key, value in found}
    ours = jax.eval_shape(make_init(config, shape, classes), numbers | {"seed": jnp.int32(0)})
    flax = jax.eval_shape(case.flax.init, KEY, jnp.zeros((2, *shape)))
    assert size(flax["params"]) == size(ours.params)
    pytest.importorskip("torch")
    from benchmarks import plain_torch

    torch = plain_torch.NETS[case.torch]()
    assert sum(parameter.numel() for parameter in torch.parameters()) == size(ours.params)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_plain_torch_trains(monkeypatch):
    """On two classes that are told apart by their brightness the loss goes down."""
    torch = pytest.importorskip("torch")
    from benchmarks import plain_torch

    torch.manual_seed(0)
    label = np.arange(64) % 2
    image = np.where(label, 200, 50)[:, None, None, None] * np.ones((1, 8, 8, 1))
    nets = []
    make = plain_torch.NETS["resnet8"]
    monkeypatch.setitem(plain_torch.NETS, "resnet8", lambda: nets.append(make()) or nets[-1])
    work = plain_torch.make_steps(
        "resnet8",
        image.astype(np.uint8),
        label,
        np.array([125.0]),
        np.array([75.0]),
        batch=16,
        rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        compiled=False,
        autocast=False,
    )
    work(12)
    (net,) = nets
    x = torch.tensor((image - 125) / 75, dtype=torch.float32).permute(0, 3, 1, 2)
    loss = torch.nn.functional.cross_entropy(net(x), torch.tensor(label))
    assert loss.item() < 0.1  # log(10) = 2.3 at the start


def test_a_picture_is_a_png_of_the_width_of_a_page(tmp_path):
    bars = picture.Bars("title", "seconds", {"a": {"x": SPREAD}, "b": {"x": SPREAD, "y": SPREAD}})
    picture.draw("name", [bars, bars._replace(log=True, rule=1.0)], tmp_path / "deep" / "a.png")
    from PIL import Image

    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == 910


def test_the_page_shows_results_between_its_marks(tmp_path, monkeypatch):
    result = {"rows": [{"runs": 40, "seconds": {"read": SPREAD, "build": SPREAD}}]}
    result["rows"][0] |= {"bytes": 6_100_000, "files": 61}
    result["left_out"] = ["what: why"]
    measure.write("report", result, tmp_path / "report.json")
    (tmp_path / "performance_report.png").touch()
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- report -->\nold\n<!-- end -->\nafter\n<!-- gpu -->\n<!-- end -->")
    paths = {"PAGE": page, "SCALING": page, "RESULTS": tmp_path, "IMAGES": tmp_path}
    for name, value in paths.items():
        monkeypatch.setattr(command, name, value)
    command.update_page()
    text = page.read_text()
    assert "| 40 | 2.00 (1.50 to 3.00) | 2.00 (1.50 to 3.00) | 6.1 | 61 | 4 |" in text
    assert "](images/performance_report.png)" in text
    assert "Left out: what: why." in text
    assert text.startswith("before\n<!-- report -->\n")
    assert text.endswith("<!-- end -->\nafter\n<!-- gpu -->\n<!-- end -->")
    assert "old" not in text


def test_an_unknown_part_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["steps"])
    assert "['layer', 'step', 'norms'" in capsys.readouterr().err


# The others take minutes even so: `python -m benchmarks --quick` runs them all.
PARTS = [
    pytest.param(part, marks=() if part == "gpu" else pytest.mark.slow)
    for part in ("input", "decode", "devices", "recalibration", "probes", "report", "gpu")
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs(part, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", part, "--quick", f"--out={tmp_path}"],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{part}-quick.json").read_text())
    assert result["part"] == part
    if part == "gpu":
        assert "no GPU" in done.stdout
        return
    assert result["rows"]
    assert (tmp_path / f"performance_{part}-quick.png").stat().st_size > 5000
    assert all(len(line) == len(command.module(part).HEADER) for line in rows_of(part, result))
    for _, header, rows in command.further(command.module(part), result).values():
        assert rows
        assert all(len(row) == len(header) for row in rows)


def rows_of(part, result):
    return command.module(part).table(result)
