"""The report: what its pages say, that they hold together, and what they are refused for."""

import csv
import html
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from study_tools import made_up_verdict, make_study

from bnresearch import records, report, rundir
from bnresearch.claims import Difference, Equivalence, Ordering, final, largest_usable, steps_to
from bnresearch.report import page

# The studies and their pages are made once, if one worker has all tests.
pytestmark = pytest.mark.xdist_group("report")

RATE = {"values": [0.1, 0.3, 1.0], "keys": ["optim.learning_rate"], "log": True, "label": "rate η"}
CLAIMS = [
    Difference(
        treatment="batch", control="none", measure="accuracy", sesoi=0.5, text="BN is ahead"
    ),
    Equivalence(treatment="batch", control="none", measure="accuracy", margin=9, text="the same"),
    Difference(treatment="none", control="batch", measure="accuracy", text="none is ahead"),
]
ARMS = {
    "batch": {"label": "BatchNorm", "overrides": {"norm.kind": "batch"}},
    "none": {"label": "no norm", "overrides": {"norm.kind": "none", "init.name": "matched"}},
}


def accuracy(arm, point, seed):
    """Best at the highest rate with norm, in the middle without; both sides scatter alike."""
    better = {"batch": {0.1: 0.90, 0.3: 0.93, 1.0: 0.95}, "none": {0.1: 0.85, 0.3: 0.87, 1.0: 0.8}}
    return better[arm][point["rate"]] + 0.01 * math.sin(9 * seed) + 0.002 * math.cos(5 * seed)


def status(arm, point, seed):
    if (arm, point["rate"]) == ("none", 1.0):
        return "diverged" if seed % 2 else "done"
    return "torn result" if (arm, point["rate"], seed) == ("batch", 0.1, 0) else "done"


def decided(folder):
    """Decides the claims of a study as the study command does."""
    definition = json.loads((folder / "study.json").read_text())
    verdicts = [verdict.to_json() for verdict in records.conclude(records.load_study(folder))]
    definition["verdicts"] = rundir.finite(verdicts)
    (folder / "study.json").write_text(json.dumps(definition))
    return records.load_study(folder)


def site(folder, *results):
    return report.write(list(results) or [records.load_study(folder)], folder / "report")


def words_of(path):
    """The text of a page as one line."""
    text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", path.read_text(), flags=re.S)
    return " ".join(html.unescape(text).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Ten seeds, three rates of which each arm has its best; one damaged and five diverged runs."""
    folder = tmp_path_factory.mktemp("report") / "study"
    measures = {
        "accuracy": final("accuracy"),
        "steps": steps_to(0.9, "accuracy"),
        "usable": largest_usable("rate", 0.84),
    }
    tune = {"axis": "rate", "measure": final("accuracy", "validation")}
    options = {"measures": measures, "tune": tune, "claims": CLAIMS, "question": "Does BN help?"}
    make_study(folder, ARMS, {"rate": RATE}, 10, accuracy=accuracy, status=status, **options)
    return decided(folder)


@pytest.fixture(scope="module")
def front(study):
    return site(study.folder, study)


@pytest.fixture(scope="module")
def home(front):
    return front.parent / "made_up"


# ---- What a reader sees


def test_the_front_page_has_question_verdict_effect_and_n(front):
    text = words_of(front)
    assert "Does BN help?" in text
    for part in ("✓ 2 supported", "✗ 1 refuted", "BN is ahead", "n = 10", "95 % interval"):
        assert part in text, part
    # 95 % against 87 %, with the same scatter on both sides: the effect is 8 points.
    assert "+8.00 points" in text


def test_the_verdict_comes_first_on_a_study_page(home):
    text = words_of(home / "index.html")
    places = [text.index(part) for part in ("Does BN help?", "✓ supported BN is ahead", "Arms")]
    assert places == sorted(places)
    assert text.index("Does BN help?", 20) < 200


def test_a_card_says_how_sure_it_is(study):
    first, second, third = page.cards(study)
    verdicts = study.definition["verdicts"]
    assert [card.verdict for card in (first, second, third)] == [v["verdict"] for v in verdicts]
    assert first.verdict == "supported"
    assert third.verdict == "refuted"
    facts = dict(first.facts)
    assert facts["seeds, n"] == "10"
    # All ten differences have the same sign: 2 / 2**10. The claim of equivalence has a smaller p,
    # so that Holm's factor for this one is 2.
    assert facts["p"] == "0.002; 0.004 by Holm's correction for 3 claims"
    assert facts["chosen rate η"] == "BatchNorm: 1, no norm: 0.3"
    assert first.warnings == [
        "BatchNorm: the chosen rate η 1 is the highest that was tried; there may be a better one "
        "beyond."
    ]


def test_an_inconclusive_card_says_what_would_have_been_enough(tmp_path):
    verdicts = [
        made_up_verdict(CLAIMS[0], "inconclusive", n_needed=33.2, missing={"diverged": 2}),
        made_up_verdict(CLAIMS[0], "inconclusive", n_needed=None),
        made_up_verdict(CLAIMS[0], "inconclusive", estimate=math.nan, low=math.nan, n=1),
    ]
    make_study(tmp_path, claims=[CLAIMS[0]] * 3, verdicts=verdicts)
    cards = page.cards(records.load_study(tmp_path))
    enough = [dict(card.facts)["enough would have been"] for card in cards]
    assert enough[0] == "about 34 seeds, if the effect is as it looks here"
    assert enough[1] == "more seeds than can be worked out from these"
    assert cards[0].warnings == ["Left out for want of a value: 2 diverged."]
    assert (cards[2].effect, cards[2].strip) == ("no number", None)
    assert "no number" in words_of(site(tmp_path))


def test_a_value_that_the_claim_fixes_was_not_chosen(tmp_path):
    claim = Difference(treatment="batch", control="none", measure="accuracy", at=0.1)
    tune = {"axis": "rate", "measure": final("accuracy", "validation")}
    make_study(tmp_path, ARMS, {"rate": RATE}, 4, claims=[claim], tune=tune)
    (card,) = page.cards(decided(tmp_path))
    assert dict(card.facts)["rate η"] == "0.1, fixed by the claim"
    assert not any("chosen" in name for name, _ in card.facts)
    assert card.warnings == []  # 0.1 is the lowest, but nobody chose it


def test_the_card_of_an_ordering_has_every_pair(tmp_path):
    claim = Ordering(arms=["a", "b", "c"], measure="accuracy")
    ends = {"a": 0.9, "b": 0.7, "c": 0.6}
    make_study(
        tmp_path,
        list("abc"),
        seeds=10,
        claims=[claim],
        accuracy=lambda arm, point, seed: ends[arm] + 0.001 * math.sin(9 * seed * ord(arm)),
    )
    (card,) = page.cards(decided(tmp_path))
    assert card.effect.startswith("+10.0") and card.interval.endswith("(b over c)")
    facts = dict(card.facts)
    assert facts["a over b"].startswith("+19.9") and facts["b over c"].startswith("+10.0")


def test_a_run_that_was_damaged_after_the_verdict_is_a_warning(tmp_path):
    make_study(tmp_path, seeds=6, claims=[CLAIMS[0]])
    results = decided(tmp_path)
    assert page.cards(results)[0].warnings == []
    (results.records[0].path / "result.json").write_text("{")
    (card,) = page.cards(records.load_study(tmp_path))
    assert card.warnings == [
        "Damaged since the verdict was given: 1 run behind it. Run the study again."
    ]


def test_a_docstring_is_paragraphs_and_code():
    about = "    run it\n    so\n\nProse that is\nbroken by hand.\n\nMore."
    assert page.paragraphs(about) == [
        (True, "run it\nso"),
        (False, "Prose that is broken by hand."),
        (False, "More."),
    ]


def test_numbers_of_a_measure_stand_on_the_page(home):
    text = words_of(home / "index.html")
    assert "Test accuracy (%) in numbers arm rate η n estimate 95 % interval" in text
    # One of BatchNorm's ten runs at 0.1 is damaged.
    assert "Claim 1 at the same rate η rate η of both n effect 95 % interval 0.1 9 " in text


def test_what_produced_a_page_stands_on_it(home):
    text = words_of(home / "index.html")
    for part in (
        "0123abc0123abc",
        "jax 0.10.2",
        "kind cpu",
        "python -m bnresearch study configs/studies/made_up.py",
        "2026-01-02 03:04 UTC",
        "10 min 0 s",
        "norm.kind=none init.name=matched",
        "scale: quick",
    ):
        assert part in text, part


def test_damaged_runs_are_named_and_counted(study, home):
    text = words_of(home / "index.html")
    (run,) = study.damaged
    assert "1 run folder is damaged and left out of all numbers" in text
    assert f"{run} : result.json is not JSON" in text
    assert "60: 54 done, 5 diverged, 1 damaged" in text


def test_a_smoke_study_gives_no_verdict(tmp_path):
    make_study(tmp_path, claims=CLAIMS[:1], scale="smoke", may_conclude=False)
    front = site(tmp_path)
    for path in (front, front.parent / "made_up" / "index.html"):
        text = words_of(path)
        assert "No verdict: this is the scale “smoke”" in text
        assert "supported " not in text.split("How to read this page")[0]
    assert "not decided BN is ahead" in text


def test_an_unfinished_study_says_how_far_it_is(tmp_path):
    make_study(
        tmp_path,
        claims=CLAIMS[:1],
        status=lambda arm, point, seed: "missing" if seed else "done",
    )
    assert "No verdict yet: 2 of 6 runs have ended." in words_of(site(tmp_path))


# ---- What a site holds


def test_every_link_leads_somewhere(front, home):
    for path in (front, home / "index.html"):
        links = re.findall(r'(?:href|src)="([^"#]+)', path.read_text())
        assert len(links) > 2
        gone = [link for link in links if not (path.parent / link).exists()]
        assert [link for link in gone if not link.startswith("data:")] == []


def test_nothing_points_to_a_network(front, home):
    for path in (front, home / "index.html", home / "data.js", front.parent / "assets/site.css"):
        assert not re.search(r"(https?:)?//[a-z]", path.read_text()), path


def test_every_picture_is_there_for_paper(home):
    names = set(re.findall(r'data-picture="([^"]+)"', (home / "index.html").read_text()))
    assert {"effects", "same_and_best", "accuracy_by_arm", "accuracy_by_rate", "tuning_by_rate",
            "usable_by_arm", "diverged_by_rate", "train_loss", "validation_accuracy",
            } <= names  # fmt: skip
    for name in names:
        with Image.open(home / f"figures/{name}.png") as image:
            assert image.width == 1400
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank
        assert (home / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF-")


def test_data_for_the_plots_is_json_with_every_panel(home):
    plots, runs = re.fullmatch(
        r"const PLOTS = (.*);\nconst RUNS = (.*);\n", (home / "data.js").read_text(), flags=re.S
    ).groups()
    plots, runs = json.loads(plots), json.loads(runs)
    text = (home / "index.html").read_text()
    wanted = re.findall(r'data-picture="([^"]+)" data-panel="(\d+)"', text)
    assert [(name, str(i)) for name in plots for i in range(len(plots[name]))] == wanted
    assert len(runs["rows"]) == 60
    assert runs["columns"][:4] == ["arm", "rate η", "seed", "status"]


def test_configs_are_those_of_the_runs(study, home):
    run = next(run for run in study.records if run.config)
    assert json.loads((home / f"configs/{run.id}.json").read_text()) == run.config
    assert len(list((home / "configs").iterdir())) == 59  # all but the damaged one


def test_tables_hold_the_numbers(home):
    def rows(name):
        with (home / "tables" / name).open() as file:
            return list(csv.DictReader(file))

    assert len(rows("runs.csv")) == 60
    means = {(row["arm"], row["rate"]): row for row in rows("means_accuracy.csv")}
    values = [100 * accuracy("batch", {"rate": 1.0}, seed) for seed in range(10)]
    best = means["batch", "1.0"]
    assert float(best["mean"]) == pytest.approx(np.mean(values))
    half = 2.262157 * np.std(values, ddof=1) / math.sqrt(10)  # t(0.975; 9)
    assert float(best["high"]) - float(best["mean"]) == pytest.approx(half, rel=1e-6)
    assert means["none", "1.0"]["diverged"] == "5"
    # Wilson for 5 of 10: (1/2 + z²/20) / (1 + z²/10) ± z sqrt(1/40 + z²/400) / (1 + z²/10).
    assert float(means["none", "1.0"]["diverged_low"]) == pytest.approx(0.236593, abs=1e-6)
    effects = [float(row["effect"]) for row in rows("effects.csv") if row["claim"] == "1"]
    assert np.mean(effects) == pytest.approx(float(rows("verdicts.csv")[0]["estimate"]))
    same = {(row["claim"], row["value"]): row for row in rows("same_rate.csv")}
    assert float(same["1", "0.3"]["estimate"]) == pytest.approx(6)  # 93 against 87 %
    usable = {row["arm"]: row for row in rows("means_usable.csv")}
    assert usable["batch"]["kind"] == "kaplan-meier" and usable["batch"]["censored"] == "10"
    assert usable["batch"]["mean"] == "inf"
    assert next(row["verdict"] for row in rows("verdicts.csv")) == "supported"
    assert len(rows("curves_validation_accuracy.csv")) > 200
    assert {row["chosen"] for row in rows("tuning.csv")} == {"True", "False"}


def test_one_site_for_several_studies(tmp_path):
    for name in ("a", "b"):
        make_study(tmp_path / name, seeds=1, name="same", question=f"Question {name}?")
    results = [records.load_study(path) for path in records.find_studies(tmp_path)]
    front = report.write(results, tmp_path / "site")
    assert "2 studies" in words_of(front)
    for folder, question in (("same", "Question a?"), ("same-2", "Question b?")):
        assert question in words_of(tmp_path / "site" / folder / "index.html")
    assert json.loads((tmp_path / "site/site.json").read_text())["studies"].keys() == {
        "same",
        "same-2",
    }


# ---- Odd studies

ODD = {
    "no run": {"status": lambda arm, point, seed: "missing"},
    "all diverged": {"status": lambda arm, point, seed: "diverged", "axes": {"rate": RATE}},
    "one arm": {"arms": ("batch",), "seeds": 1},
    "one seed": {"seeds": 1, "axes": {"rate": RATE}},
    "words on the axis": {"axes": {"net": {"values": ["mlp", "conv"], "keys": ["model.name"]}}},
    "no training": {"function": True},
    "NaN": {"accuracy": lambda arm, point, seed: math.nan},
    "damaged only": {"status": lambda arm, point, seed: "no config"},
    "zeros on a log axis": {"axes": {"rate": {**RATE, "values": [0.0, 0.1]}}},
}


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_odd_studies_have_a_page(options, tmp_path):
    options = {"arms": ("batch", "none"), "axes": None, "seeds": 2, **options}
    axes = options["axes"] or {}
    if "rate" in axes:
        options["tune"] = {"axis": "rate", "measure": final("accuracy", "validation")}
    make_study(tmp_path, **options)
    text = words_of(site(tmp_path).parent / "made_up" / "index.html")
    assert "Does the reader read what was written?" in text


def test_names_are_not_taken_for_html(tmp_path):
    evil = "<script>alert(1)</script> & \"quotes\" 'too'"
    make_study(
        tmp_path,
        {"a": {"label": evil, "overrides": {"norm.kind": "batch"}}, "b": {"norm.kind": evil}},
        {"x": {"values": [evil, "y"], "keys": ["data.name"], "label": evil}},
        2,
        question=evil,
        prediction=evil,
        claims=[Difference(treatment="a", control="b", measure="accuracy")],
        verdicts=[
            made_up_verdict(
                Difference(treatment="a", control="b", measure="accuracy"), text=evil, reason=evil
            )
        ],
    )
    front = site(tmp_path)
    for path in (front, front.parent / "made_up/index.html"):
        assert "<script>alert" not in path.read_text()
        assert evil in words_of(path)
    plots = (front.parent / "made_up/data.js").read_text().split("const RUNS")[0]
    assert "<script>alert" not in plots
