"""Folders that are no study, or one that was changed, are refused in words; studies are found."""

import json

import pytest
from study_tools import made_up_verdict, make_study

from bnresearch import claims
from bnresearch.errors import UserError
from bnresearch.records import find_studies, load_study


@pytest.fixture
def folder(tmp_path):
    return make_study(tmp_path / "study", axes={"rate": [0.1, 0.3]})


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(UserError, match=r"is no study folder: it has no study\.json"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"arms": None}, "has no arms as it should"),
        ({"runs": {}}, "has no runs as it should"),
        ({"axes": {}}, "does not fit its arms and axes"),
        ({"arms": {"batch": {"overrides": {}, "label": ""}}}, "does not fit its arms and axes"),
        ({"arms": {"batch": {}}}, "arm 'batch' has no overrides, label as it should"),
        ({"runs": [{"id": "../../x", "arm": "batch", "point": {"rate": 0.1}, "seed": 0}]}, "fit"),
        ({"runs": ["abc"]}, "does not fit its arms and axes"),
    ],
)
def test_a_study_that_this_version_cannot_read(folder, change, says):
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=says) as caught:
        load_study(folder)
    assert "study.json" in str(caught.value)


CHANGES = {
    "measures accuracy factor": "100",
    "measures accuracy options": [],
    "measures accuracy how": "finally",
    "measures accuracy unit": None,
    "claims 0 measure": "speed",
    "claims 0 sesoi": "small",
    "claims 0 kind": "hope",
    "tune axis": "depth",
    "tune measure split": 3,
    "axes rate label": 5,
    "about": None,
    "verdicts 0": {},
    "verdicts 0 verdict": "true",
    "verdicts 0 estimate": "2",
    "verdicts 0 claim measure": [],
    "verdicts 0 same_rate": [{"value": 0.1}],
    "verdicts 0 pairs": [5],
    "verdicts 0 at": {"batch": []},
}


@pytest.mark.parametrize("place", CHANGES)
def test_a_study_changed_by_hand_is_refused_in_words(tmp_path, place):
    claim = claims.Difference(treatment="batch", control="none", measure="accuracy")
    tune = {"axis": "rate", "measure": claims.final("accuracy", "validation")}
    axes = {"rate": [0.1, 0.3]}
    made = {"claims": [claim], "verdicts": [made_up_verdict(claim)], "tune": tune, "axes": axes}
    path = make_study(tmp_path, **made) / "study.json"
    load_study(tmp_path)
    definition = json.loads(path.read_text())
    *parents, last = place.split()
    part = definition
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    part[int(last) if isinstance(part, list) else last] = CHANGES[place]
    path.write_text(json.dumps(definition))
    with pytest.raises(UserError):
        load_study(tmp_path)


def test_a_torn_study(folder):
    (folder / "study.json").write_text('{"schema": 1, "na')
    with pytest.raises(UserError, match=r"study\.json is not JSON"):
        load_study(folder)


def test_studies_are_found_three_folders_deep_and_not_inside_each_other(tmp_path):
    for place in ("a", "b/c/d", "b/c/d/e/f", ".hidden", "a/runs/x"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "study.json").touch()
    assert find_studies(tmp_path) == [tmp_path / "a", tmp_path / "b/c/d"]
    assert find_studies(tmp_path / "a") == [tmp_path / "a"]


def test_nowhere_a_study(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        find_studies(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        find_studies(tmp_path / "nowhere")
