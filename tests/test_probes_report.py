"""What probes found, in the report of a study: pictures, tables, and the frames behind them."""

import numpy as np
import pandas as pd
import pytest
from study_tools import make_study

from bnresearch.errors import UserError
from bnresearch.jsonl import Log
from bnresearch.records import load_study
from bnresearch.report import site
from bnresearch.report.pictures.design import Design
from bnresearch.report.pictures.inside import inside
from bnresearch.report.pictures.marks import Heat, Mean, Thin

RATES = {"rate": {"values": [0.1, 0.3], "keys": ["optim.learning_rate"], "label": "rate"}}
BLOCKS = [f"stage1/block{i}/norm1" for i in range(1, 9)]


def design(axes=None):
    arms = {"batch": {"label": "BatchNorm"}, "none": {"label": "no norm"}}
    return Design.of({"arms": arms, "axes": axes or {}, "tune": None})


def frame(sites, steps=(0, 10), points=({},), seeds=3, value=lambda arm, depth, step, seed: 1.0):
    """A row per arm, point, seed, step and site."""
    rows = [
        {"arm": arm, **point, "seed": seed, "step": step, "site": name, "depth": depth}
        | {"value": value(arm, depth, step, seed), "done": True}
        for arm in ("batch", "none")
        for point in points
        for seed in range(seeds)
        for step in steps
        for depth, name in enumerate(sites, start=1)
    ]
    return pd.DataFrame(rows)


def drawn(probe, quantity, rows, axes=None):
    (picture,) = inside(design(axes), probe, {quantity: rows})
    return picture


def test_a_few_sites_have_a_panel_each_with_seeds_and_means_of_every_arm():
    rows = frame(["norm2", "norm1"], value=lambda arm, depth, step, seed: depth + seed)
    picture = drawn("activations", "rank", rows)
    assert (picture.name, picture.title) == ("inside_activations_rank", "Activations: rank")
    assert [panel.title for panel in picture.panels] == ["norm2", "norm1"]
    assert [key.label for key in picture.keys] == ["BatchNorm", "no norm"]
    for depth, panel in enumerate(picture.panels, start=1):
        assert sum(isinstance(mark, Thin) for mark in panel.marks) == 2
        for mean in (mark for mark in panel.marks if isinstance(mark, Mean)):
            np.testing.assert_allclose(mean.y, depth + 1)  # seeds 0, 1, 2
            # t with two degrees of freedom, 4.3027, times 1 / sqrt(3).
            np.testing.assert_allclose(mean.high - mean.y, 2.4841, rtol=1e-4)


def test_many_sites_share_a_map_with_the_input_on_top():
    rows = frame(BLOCKS, steps=(0, 10, 20), value=lambda arm, depth, step, seed: 10.0**-depth)
    picture = drawn("gradients", "norm", rows)
    assert [panel.title for panel in picture.panels] == ["BatchNorm", "no norm"]
    for panel in picture.panels:
        (heat,) = panel.marks
        assert isinstance(heat, Heat)
        assert heat.label == "log10 of gradients: norm"
        np.testing.assert_allclose(heat.z, -np.arange(8, 0, -1)[:, None] * np.ones((1, 3)))
        assert (heat.low, heat.high) == (pytest.approx(-8), pytest.approx(-1))
        # Rows are counted from below.
        assert panel.y.ticks[-1] == (7.0, BLOCKS[0])
        assert heat.texts[-1][1] == f"{BLOCKS[0]}, step 10: 0.100"


def test_a_map_has_no_more_steps_than_it_has_room_for():
    rows = frame(BLOCKS, steps=range(100), seeds=1)
    (heat,) = drawn("gradients", "norm", rows).panels[0].marks
    assert heat.z.shape == (8, 24)
    assert heat.texts[0][-1].startswith(f"{BLOCKS[-1]}, step 99")


def test_runs_that_did_not_finish_are_not_in_means():
    rows = frame(BLOCKS, value=lambda arm, depth, step, seed: float(seed < 2))
    rows["done"] = rows["seed"] < 2
    (heat,) = drawn("activations", "dead", rows).panels[0].marks
    assert (heat.z == 1).all()
    rows["done"] = False  # then they are all that there is
    (heat,) = drawn("activations", "dead", rows).panels[0].marks
    np.testing.assert_allclose(heat.z, 2 / 3)


def test_what_is_about_the_whole_net_shares_a_picture():
    whole = {name: frame([""]).assign(depth=0) for name in ("trace", "eigenvalue")}
    (picture,) = inside(design(), "hessian", whole)
    assert (picture.name, picture.title) == ("inside_hessian", "Hessian: the whole net")
    assert [panel.y.label for panel in picture.panels] == ["trace", "eigenvalue"]


def test_places_on_axes_have_panels_of_their_own():
    points = [{"rate": rate} for rate in (0.1, 0.3)]
    picture = drawn("activations", "rank", frame(["norm1"], points=points), RATES)
    assert [panel.title for panel in picture.panels] == ["rate 0.1, norm1", "rate 0.3, norm1"]
    picture = drawn("activations", "rank", frame(BLOCKS, points=points), RATES)
    assert [panel.title for panel in picture.panels] == [
        f"{arm}, rate {rate}" for arm in ("BatchNorm", "no norm") for rate in (0.1, 0.3)
    ]


def test_what_is_not_finite_is_left_out():
    rows = frame(["norm1"], value=lambda *place: np.nan)
    assert list(inside(design(), "hessian", {"trace": rows})) == []


# ---- A study


def write_probes(folder):
    """What two probes would have found in the runs of a made-up study."""
    for index, run in enumerate(load_study(folder).records):
        log = Log(run.path / "probes.jsonl")
        for step in (0, 500):
            first = {"step": step, "probe": "gradients"}
            log.write(first | {"site": "", "depth": 0, "growth": 1.5})
            log.write(first | {"site": "norm1", "depth": 1, "norm": 1.0 + index, "params": 0.5})
        log.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = make_study(tmp_path_factory.mktemp("study") / "s", seeds=2)
    write_probes(folder)
    return load_study(folder)


def test_a_study_gives_what_its_runs_kept(results):
    assert results.probes == [
        ("gradients", "growth"),
        ("gradients", "norm"),
        ("gradients", "params"),
    ]
    rows = results.probe("gradients", "norm")
    assert list(rows.columns) == ["arm", "seed", "step", "site", "depth", "value"]
    assert rows["value"].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    assert rows[["arm", "seed", "step"]].iloc[3].tolist() == ["batch", 1, 500]


def test_what_nobody_kept_is_an_empty_frame(results):
    rows = results.probe("hessian", "trace")
    assert list(rows.columns) == ["arm", "seed", "step", "site", "depth", "value"]
    assert rows.empty
    run = results.records[0]
    assert run.probe("hessian", "trace").empty
    with pytest.raises(UserError, match=r"unknown quantity of probe 'gradients' 'nrom'.*norm\?"):
        run.probe("gradients", "nrom")


def test_the_report_has_a_section_with_pictures_and_tables(results, tmp_path):
    home = site.write([results], tmp_path / "site").parent / "made_up"
    page = (home / "index.html").read_text()
    assert '<section id="inside">\n<h2>Inside the layers</h2>' in page
    for name in ("inside_gradients", "inside_gradients_norm", "inside_gradients_params"):
        assert f'data-picture="{name}"' in page
        assert (home / "figures" / f"{name}.png").stat().st_size > 5000
    table = pd.read_csv(home / "tables" / "inside_gradients_norm.csv")
    assert table["value"].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]


def test_runs_without_probes_have_no_pictures_of_them(tmp_path):
    study = load_study(make_study(tmp_path / "s", seeds=1))
    assert study.probes == []
    assert list(site._inside(study, design())) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "is not a record of probes"),
        ('{"step": 1, "probe": "a", "site": "", "depth": 0, "x": "y"}', "something else than a"),
        ('{"step": 1, "probe": "a", "x": 1}', "something else than a number"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, line, message):
    folder = make_study(tmp_path / "s", seeds=1)
    first = load_study(folder).records[0]
    (first.path / "probes.jsonl").write_text(f"{line}\n")
    assert message in load_study(folder).damaged[first.id]
