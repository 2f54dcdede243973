"""Pictures: what is drawn, worked out by hand; and both pens draw the same."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from study_tools import made_up_verdict

from bnresearch.claims import Difference, Equivalence, Value, final, steps_to, to_json
from bnresearch.report.pictures import curves, effects, marks, measured, paper
from bnresearch.report.pictures.design import Design, file_name, means_of
from bnresearch.report.pictures.marks import Axis, Dots, Heat, Mean, Note, Rule, Thin, Zone

ACCURACY = to_json(final("accuracy"))
RATES = {"rate": {"values": [0.1, 0.3, 1.0], "log": True, "label": "learning rate"}}
NETS = {"net": {"values": ["mlp", "conv"], "log": False, "label": "network"}}


def design(arms=("batch", "none"), axes=RATES, tune=None, chosen=None):
    definition = {"arms": {name: {"label": name.upper()} for name in arms}, "axes": axes}
    return Design.of(definition | {"tune": tune}, chosen)


def frame(arms=("batch", "none"), axes=RATES, seeds=3, value=lambda arm, point, seed: 90.0 + seed):
    rows = [
        {"arm": arm, **point, "seed": seed, "value": value(arm, point, seed), "censored": 0}
        for arm in arms
        for values in itertools.product(*(axis["values"] for axis in axes.values()))
        for point in [dict(zip(axes, values, strict=True))]
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).assign(status="done")


def of(panel, kind, group=None):
    return [m for m in panel.marks if isinstance(m, kind) and (group is None or m.group == group)]


# ---- Looks and axes


def test_looks_differ_for_eighty_four_arms():
    looks = [marks.look(index) for index in range(84)]
    assert len(set(looks)) == 84
    assert looks[0] == marks.Look("#0072B2", "solid", "circle")
    assert all(a.colour != b.colour and a.dash != b.dash for a, b in itertools.pairwise(looks[:7]))


@pytest.mark.parametrize(
    ("values", "scale", "ends"),
    [
        ([92, 96], "linear", (91.76, 96.24)),  # a margin of 6 % on both sides
        ([50, 99], "stretch", (46, 100)),
        ([50, 91], "stretch", (46, 95)),
        ([100, 100], "linear", (95, 101)),  # never far beyond 100
        ([math.nan, math.inf], "linear", (0, 1)),
        ([], "linear", (0, 1)),
    ],
)
def test_accuracy_axis(values, scale, ends):
    axis = marks.axis("accuracy (%)", [values], percent=True)
    assert axis.scale == scale
    np.testing.assert_allclose(axis.range, ends)


def test_stretched_axis_has_98_and_99_as_far_apart_as_its_formula_says():
    axis = Axis("", "stretch", (0, 100))
    # -log10(101 - x): 100 -> 0, 91 -> -1, 1 -> -2
    np.testing.assert_allclose(axis.place([100, 91, 1]), [0, -1, -2], atol=1e-12)


def test_ticks_of_a_stretched_axis_do_not_touch():
    axis = marks.axis("accuracy (%)", [[10, 99]], percent=True)
    texts = [text for _, text in axis.ticks]
    assert texts == ["30", "50", "70", "80", "90", "95", "98", "99", "100"]


def test_log_axis_has_round_ticks():
    axis = marks.axis("loss", [[0.02, 3.0]], "log")
    assert [text for _, text in axis.ticks] == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert len(marks.axis("loss", [[1e-12, 1e12]], "log").ticks) <= 9
    assert len(marks.axis("steps", [[250, 270]], "log").ticks) >= 2


def test_log_axis_leaves_out_what_has_no_logarithm():
    assert marks.axis("loss", [[-1.0, 0.0, 2.0]], "log").range[0] == pytest.approx(2 / 1.05)


# ---- Measures


def test_means_and_intervals_are_those_of_the_tables():
    values = pd.DataFrame({"arm": ["a"] * 5 + ["b"], "value": [1.0, 2, 3, 4, 5, 7]})
    table = means_of(values, ["arm"], log=False).set_index("arm")
    half = 2.776445 * math.sqrt(0.5)  # t(0.975; 4) by the tables, s = sqrt(2.5)
    np.testing.assert_allclose(table.loc["a"], [3, 3 - half, 3 + half, 5], rtol=1e-6)
    assert table.loc["b", "mean"] == 7
    assert math.isnan(table.loc["b", "low"])


def test_means_of_losses_are_geometric():
    values = pd.DataFrame({"arm": ["a", "a"], "value": [0.1, 10.0]})
    assert means_of(values, ["arm"], log=True)["mean"].item() == pytest.approx(1.0)


def test_along_an_axis_every_seed_and_every_mean_is_there():
    (picture,) = measured.measured(design(), "accuracy", ACCURACY, frame())
    (panel,) = picture.panels
    assert picture.name == "accuracy_by_rate"
    assert [key.label for key in picture.keys] == ["BATCH", "NONE"]
    (dots,), (mean,) = of(panel, Dots, "batch"), of(panel, Mean, "batch")
    assert sorted(dots.y) == [90, 90, 90, 91, 91, 91, 92, 92, 92]
    np.testing.assert_allclose(mean.y, [91, 91, 91])
    half = 4.302653 / math.sqrt(3)  # t(0.975; 2), s = 1
    np.testing.assert_allclose(mean.low, 91 - half, rtol=1e-6)
    # Two arms stand beside each other, by less than a tenth of the way to the next rate.
    np.testing.assert_allclose(mean.x, [0.1, 0.3, 1.0], rtol=0.1)
    assert (mean.x < of(panel, Mean, "none")[0].x).all()
    assert dots.texts[0] == "BATCH, seed 0: 90.0 %"


def test_words_on_an_axis_are_categories_and_not_joined():
    (picture,) = measured.measured(design(axes=NETS), "a", ACCURACY, frame(axes=NETS))
    (panel,) = picture.panels
    assert [text for _, text in panel.x.ticks] == ["mlp", "conv"]
    assert {mean.draw for mean in of(panel, Mean)} == {"apart"}


def test_without_axes_arms_stand_side_by_side():
    (picture,) = measured.measured(design(axes={}), "a", ACCURACY, frame(axes={}))
    assert [text for _, text in picture.panels[0].x.ticks] == ["BATCH", "NONE"]
    assert [mean.x.item() for mean in of(picture.panels[0], Mean)] == [0, 1]


def test_two_axes_give_two_views_and_a_heat_map():
    axes = RATES | NETS
    values = frame(axes=axes, value=lambda arm, point, seed: 10 * point["rate"])
    pictures = measured.measured(design(axes=axes), "a", ACCURACY, values)
    assert [p.name for p in pictures] == ["a_by_rate", "a_by_net", "a_over_rate_and_net"]
    assert [panel.title for panel in pictures[0].panels] == ["network mlp", "network conv"]
    heat = of(pictures[2].panels[0], Heat)[0]
    np.testing.assert_allclose(heat.z, [[1, 3, 10], [1, 3, 10]])
    assert heat.cells[0] == ["1.00", "3.00", "10.0"]
    assert heat.texts[1][2] == "network conv, learning rate 1: 10.0 %"
    assert (heat.low, heat.high) == (1, 10)


def test_a_cell_without_runs_stays_blank():
    axes = RATES | NETS
    values = frame(axes=axes)
    values = values[~((values["rate"] == 0.3) & (values["net"] == "conv"))]
    picture = measured.measured(design(axes=axes), "a", ACCURACY, values)[2]
    assert np.isnan(of(picture.panels[0], Heat)[0].z[1, 1])
    assert paper.paper(picture)


def test_tuned_axis_is_shown_and_other_pictures_are_at_the_chosen_values():
    axes = RATES | NETS
    chosen = pd.DataFrame(
        [
            ("batch", 1.0, "mlp"),
            ("batch", 0.3, "conv"),
            ("none", 0.1, "mlp"),
            ("none", 0.1, "conv"),
        ],
        columns=["arm", "rate", "net"],
    )
    values = frame(axes=axes, value=lambda arm, point, seed: 10 * point["rate"])
    tuned = design(axes=axes, tune={"axis": "rate"}, chosen=chosen)
    by_net, by_rate, _ = measured.measured(tuned, "a", ACCURACY, values)
    assert by_net.name == "a_by_net"
    assert "chosen for it on validation" in by_net.caption
    np.testing.assert_allclose(of(by_net.panels[0], Mean, "batch")[0].y, [10, 3])
    np.testing.assert_allclose(of(by_net.panels[0], Mean, "none")[0].y, [1, 1])
    assert [len(mean.y) for mean in of(by_rate.panels[0], Mean)] == [3, 3]


def test_rings_mark_what_was_chosen():
    chosen = pd.DataFrame([("batch", 0.3), ("none", 0.1)], columns=["arm", "rate"])
    tuned = design(tune={"axis": "rate"}, chosen=chosen)
    picture = measured.along(tuned, "tuning", ACCURACY, frame(), "rate", rings=chosen)
    rings = [dots for dots in of(picture.panels[0], Dots) if dots.shape == "ring"]
    np.testing.assert_allclose([ring.x.item() for ring in rings], [0.3, 0.1], rtol=0.1)


def test_bounds_are_open_dots_and_said_to_be():
    values = frame()
    values.loc[0, "censored"] = 1
    (picture,) = measured.measured(design(), "s", to_json(steps_to(0.9, "accuracy")), values)
    (opened,) = (dots for dots in of(picture.panels[0], Dots) if dots.shape == "open")
    assert opened.texts == ["BATCH, seed 0: at least 90.0 steps"]
    assert "only a bound is known" in picture.caption
    assert picture.panels[0].y.scale == "log"


def test_medians_stand_for_means_where_some_are_bounds():
    values = frame(arms=("batch",), seeds=8, value=lambda arm, point, seed: 10.0 + seed)
    values.loc[values["rate"].eq(0.1) & (values["seed"] > 4), "censored"] = 1
    values.loc[values["rate"].eq(0.3), "censored"] = 1
    picture = measured.measured(
        design(("batch",)), "s", to_json(steps_to(0.9, "accuracy")), values
    )[0]
    (mean,) = of(picture.panels[0], Mean)
    # S falls below 1/2 at the fifth of eight; never, if all are bounds; else geometric means.
    np.testing.assert_allclose(mean.y, [14, math.nan, math.exp(np.log(np.arange(10, 18)).mean())])
    assert mean.high[1] == picture.panels[0].y.range[1]
    assert mean.texts[0].startswith("BATCH, learning rate 0.1\nmedian 14")
    assert "median ∞ steps" in mean.texts[1]


def test_an_arm_that_has_no_value_is_not_there():
    values = frame(value=lambda arm, point, seed: math.nan if arm == "none" else 90.0)
    (picture,) = measured.measured(design(), "a", ACCURACY, values)
    assert [key.group for key in picture.keys] == ["batch"]


def test_shares_of_diverged_runs_have_wilson_intervals():
    values = frame(seeds=10)
    values["status"] = ["diverged" if s < 4 and r == 1 else "done"
                        for s, r in zip(values["seed"], values["rate"], strict=True)]  # fmt: skip
    panel = measured.diverged(design(), values, "rate", []).panels[0]
    mean = of(panel, Mean, "batch")[0]
    np.testing.assert_allclose(mean.y, [0, 0, 40])
    # Wilson for 4 of 10 at z = 1.959964: (0.4 + z^2/20 -+ z sqrt(0.024 + z^2/400)) / (1 + z^2/10)
    np.testing.assert_allclose([mean.low[2], mean.high[2]], [16.818, 68.733], atol=2e-3)


def test_many_places_are_thinned_and_the_caption_says_so():
    axes = {"depth": {"values": list(range(30)), "log": False, "label": "depth"}, **NETS}
    picture = measured.measured(design(axes=axes), "a", ACCURACY, frame(axes=axes))[1]
    assert len(picture.panels) == 12
    assert [p.title for p in picture.panels][::11] == ["depth 0", "depth 29"]
    assert "18 further settings" in picture.caption


# ---- Learning curves


def curve_frame(last=2.0):
    rows = [
        ("batch", 0, 10, 1.0), ("batch", 0, 20, 0.5), ("batch", 1, 10, 2.0), ("batch", 1, 20, 1.0),
        ("none", 0, 10, last), ("none", 1, 10, math.nan),
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=["arm", "seed", "step", "value"])
    return found.assign(done=found["arm"] == "batch")


def test_curves_have_gaps_between_seeds_and_geometric_means_of_finished_runs():
    picture = curves.curves(design(axes={}), curve_frame(), "train", "loss")
    (panel,) = picture.panels
    (thin,), (mean,) = of(panel, Thin, "batch"), of(panel, Mean, "batch")
    np.testing.assert_array_equal(thin.x, [10, 20, math.nan, 10, 20])
    np.testing.assert_array_equal(thin.y, [1, 0.5, math.nan, 2, 1])
    np.testing.assert_allclose(mean.y, [math.sqrt(2), math.sqrt(0.5)])
    assert len(of(panel, Thin, "none")) == 1  # diverged: a thin line, and no mean
    assert not of(panel, Mean, "none")
    assert panel.y.scale == "log"


def test_a_diverged_loss_does_not_stretch_the_axis():
    picture = curves.curves(design(axes={}), curve_frame(last=1e30), "train", "loss")
    assert picture.panels[0].y.range[1] < 3


def test_a_loss_that_leaps_for_a_moment_does_not_either():
    found = curve_frame()
    found.loc[0, "value"] = 1e12
    picture = curves.curves(design(axes={}), found, "train", "loss")
    assert picture.panels[0].y.range[1] < 3
    assert "Some losses leap beyond what is shown." in picture.caption
    assert "leap" not in curves.curves(design(axes={}), curve_frame(), "train", "loss").caption


def test_no_curve_is_no_picture():
    assert curves.curves(design(axes={}), curve_frame().iloc[:0], "train", "loss") is None


def test_long_curves_are_thinned_to_their_ends():
    steps = np.arange(1, 5001)
    found = pd.DataFrame({"arm": "batch", "seed": 0, "step": steps, "value": 0.5, "done": True})
    thin = of(curves.curves(design(axes={}), found, "train", "loss").panels[0], Thin)[0]
    assert len(thin.x) == curves.CURVE_POINTS
    assert (thin.x[0], thin.x[-1]) == (1, 5000)


def test_accuracy_curves_are_in_percent():
    found = curve_frame().assign(value=0.5)
    panel = curves.curves(design(axes={}), found, "validation", "accuracy").panels[0]
    assert set(of(panel, Mean)[0].y) == {50}
    assert panel.y.label == "validation accuracy (%)"


# ---- Effects

DIFFERENCE = Difference(treatment="batch", control="none", measure="accuracy", sesoi=0.5)
MEASURES = {"accuracy": ACCURACY, "steps": to_json(steps_to(0.9, "accuracy"))}


@pytest.mark.parametrize(
    ("claim", "fields", "small"),
    [
        (DIFFERENCE, {"boundary": 0.5}, (-0.5, 0.5)),
        (DIFFERENCE, {"boundary": 0.0}, None),
        (
            Equivalence(treatment="a", control="b", measure="steps", margin=1.25),
            {"boundary": 1.25, "null": 1.0, "unit": "times", "log": True},
            (0.8, 1.25),
        ),
        (
            Value(arm="a", measure="accuracy", expected=90, tolerance=2),
            {"boundary": 2.0, "null": 90.0},
            (88, 92),
        ),
    ],
    ids=["difference", "no sesoi", "ratio", "value"],
)
def test_what_is_too_small_to_matter(claim, fields, small):
    found = effects.effect(made_up_verdict(claim, **fields), MEASURES)
    assert found.small == small if small is None else np.allclose(found.small, small)


def test_effect_plot_has_a_row_per_claim_and_a_panel_per_unit():
    ratio = Equivalence(treatment="a", control="b", measure="steps", margin=1.25)
    verdicts = [
        made_up_verdict(DIFFERENCE, boundary=0.5),
        made_up_verdict(ratio, "refuted", unit="times", log=True, boundary=1.25, null=1.0, low=0.0),
        made_up_verdict(DIFFERENCE, "inconclusive", estimate=math.nan),
    ]
    picture = effects.effect_plot(effects.effects(verdicts, MEASURES))
    first, second = picture.panels
    assert of(first, Zone)[0].x == (-0.5, 0.5)
    assert of(first, Rule)[0].at == 0
    assert of(first, Mean)[0].draw == "lying"
    assert len(of(first, Dots)[0].x) == 10
    assert of(first, Note)[0].text.startswith("1. ")
    assert second.x.scale == "log"
    # The open end of a ratio reaches to the end of what is shown.
    assert of(second, Mean)[0].low.item() == second.x.range[0]
    assert effects.effect_plot([]) is None


def test_same_and_best_stand_beside_each_other():
    rows = [{"value": rate, "estimate": rate, "low": 0.0, "high": 2.0} for rate in (0.1, 0.3)]
    verdict = made_up_verdict(DIFFERENCE, same_rate=rows, estimate=3.0)
    tuned = design(tune={"axis": "rate"})
    (panel,) = effects.same_rate(tuned, [verdict], MEASURES).panels
    assert [text for _, text in panel.x.ticks] == ["0.1", "0.3", "each at\nits best"]
    assert [mean.y.tolist() for mean in of(panel, Mean)] == [[0.1, 0.3], [3.0]]
    assert effects.same_rate(tuned, [made_up_verdict(DIFFERENCE)], MEASURES) is None


def test_strip_is_in_percent_of_its_width():
    verdict = made_up_verdict(DIFFERENCE, estimate=2.0, low=0.0, high=4.0, points={"0": 4.0})
    strip = effects.strip(effects.effect(verdict, MEASURES))
    # From 0 to 4 with 6 % of margin on either side.
    places = [strip.null, strip.low, strip.estimate, strip.high, *strip.seeds]
    np.testing.assert_allclose(places, [6 / 1.12, 6 / 1.12, 50, 106 / 1.12, 106 / 1.12])
    open_end = effects.effect(made_up_verdict(DIFFERENCE, high=math.inf), MEASURES)
    assert effects.strip(open_end).high == 100
    unknown = effects.strip(effects.effect(made_up_verdict(DIFFERENCE, low=math.nan), MEASURES))
    assert unknown.low == unknown.estimate


def test_file_names_are_plain():
    assert file_name("a/b <c>", "by", "learning rate") == "a_b_c_by_learning_rate"
