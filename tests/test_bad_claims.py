"""Every claim that the runs of its study could not decide: refused in one message."""

import pytest
from bad_study_tools import GOOD, PLACE, claim, refused_study, replaced
from run_tools import assert_one_message

from bnresearch import study
from bnresearch.errors import UserError

# What replaces what in GOOD -> what the message has to name.
CHANGES = {
    "a claim without a list": (
        ("claims=[", "claims=3 if True else ["),
        ("claims must be a list, not a int",),
    ),
    "no place": ((PLACE, "where=16"), ("16 is no place", "{'axis': value}")),
    "a place of another type": (('control="none"', "control=('none', 16)"), ("is no place",)),
    "unknown arm": (
        ('control="none"', 'control="non"'),
        ("claim 1 (difference)", "'non'", "batch, none", "mean none?"),
    ),
    "unknown measure": (
        ('measure="accuracy"', 'measure="acuracy"'),
        ("claim 1 (difference)", "'acuracy'", "mean accuracy?"),
    ),
    "unknown axis": ((PLACE, 'where={"sise": 16}'), ("'sise'", "mean size?")),
    "unknown value": (
        (PLACE, 'where={"size": 17, "net": "deep"}'),
        ("claim 1 (difference)", "axis 'size' has no value 17", "16, 64"),
    ),
    "a value that a scale leaves out": (
        ("Scale(seeds=8)", 'Scale(seeds=8, axes={"size": grid("data.batch_size", [32])})'),
        ("at scale quick, claim 1", "axis 'size' has no value 16", "choose one of: 32"),
    ),
    "unknown value of a place": (
        ('control="none"', 'control={"arm": "none", "size": 17}'),
        ("size", "fixes size twice"),
    ),
    "an axis left open": (
        (PLACE, 'where={"size": 16}'),
        ("leaves open", "axis 'net'", "'wide', 'deep'"),
    ),
    "the tuned axis": (
        (PLACE, 'where={"size": 16, "net": "deep", "rate": 0.1}'),
        ("fixes axis 'rate'", "use at="),
    ),
    "a collapsed axis": (
        claim(f'Value(arm="batch", measure="limit", expected=1, tolerance=2, at=0.1, {PLACE})'),
        ("at=0.1", "takes all of its values together"),
    ),
    "an axis of tuned values": (
        claim(
            'Value(arm="batch", measure="sizes", expected=1, tolerance=2, where={"net": "deep"})'
        ),
        ("takes all values of axis 'size' together", "its own best 'rate'", "at=...", "0.1, 0.3"),
    ),
    "strata that are fixed": (
        (PLACE, PLACE + ', strata="size"'),
        ("fixes axis 'size'", "its values are strata"),
    ),
    "strata that are tuned": ((PLACE, PLACE + ', strata="rate"'), ("strata='rate'", "tunes it")),
    "unknown strata": ((PLACE, PLACE + ', strata="sizes"'), ("'sizes'", "did you mean size?")),
    "an unknown tuned value": (
        (PLACE, PLACE + ", at=0.2"),
        ("axis 'rate' has no value 0.2", "0.1, 0.3"),
    ),
    "at without tuning": (
        ('tune=Tune("rate"),', ""),
        ("leaves open", "axis 'rate'"),
    ),
    "a place without arm": (
        ('control="none"', 'control={"size": 16}'),
        ("names no arm", "'arm'"),
    ),
    "with itself": (('control="none"', 'control="batch"'), ("with itself",)),
    "direction": ((PLACE, PLACE + ', direction="up"'), ("direction='up'", "'greater', 'less'")),
    "interval": ((PLACE, PLACE + ', interval="z"'), ("interval='z'", "'bca'")),
    "t interval of iqm": ((PLACE, PLACE + ', estimator="iqm"'), ("interval='bca'",)),
    "negative sesoi": ((PLACE, PLACE + ", sesoi=-1"), ("sesoi=-1", "0 or more")),
    "sesoi in words": ((PLACE, PLACE + ', sesoi="1"'), ("sesoi='1'", "finite number")),
    "a factor below 1": (
        ('measure="accuracy"', 'sesoi=0.5, measure="speed"'),
        ("sesoi=0.5", "a factor of 1 or more", "log=True"),
    ),
    "no margin": (
        claim(
            f'Equivalence(treatment="batch", control="none", measure="accuracy", margin=0, {PLACE})'
        ),
        ("claim 1 (equivalence)", "margin=0", "above 0"),
    ),
    "no tolerance": (
        claim(f'Value(arm="batch", measure="speed", expected=9, tolerance=1, {PLACE})'),
        ("claim 1 (value)", "tolerance=1", "above 1"),
    ),
    "slope of names": (
        claim('Slope(arm="batch", axis="net", measure="accuracy", where={"size": 16})'),
        ("claim 1 (slope)", "numbers along axis 'net'", "'wide', 'deep'"),
    ),
    "slope of a number": (
        claim(
            'Slope(arm="batch", axis="size", measure="accuracy", where={"net": "deep"}, expected=1)'
        ),
        ("tolerance=0.0", "above 0"),
    ),
    "slope along what is fixed": (
        claim(f'Slope(arm="batch", axis="size", measure="accuracy", {PLACE})'),
        ("fixes axis 'size'", "the slope is along it"),
    ),
    "base of a logarithm": (
        claim(
            'Slope(arm="batch", axis="size", measure="accuracy", where={"net": "deep"}, log_x="3")'
        ),
        ("log_x='3'", "'e', '2', '10'"),
    ),
    "ordering of one": (
        claim(f'Ordering(arms=["batch"], measure="accuracy", {PLACE})'),
        ("two or more arms",),
    ),
    "claim of another type": (claim("('batch', 'none')"), ("claim 1 is a tuple", "Difference")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_claim_is_refused(name, tmp_path, refused, compiled):
    change, parts = CHANGES[name]
    refused_study(tmp_path, refused, replaced(GOOD, change), parts)
    assert compiled == []


def test_a_claim_over_strata_leaves_their_axis_open(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(replaced(GOOD, (PLACE, 'strata="size", where={"net": "deep"}')))
    assert study.plan(study.load(path), path, "quick").study.claims[0].strata == "size"


def test_claims_without_a_tuned_axis_take_no_value_of_one(tmp_path):
    path = tmp_path / "mine.py"
    text = replaced(GOOD, ('tune=Tune("rate"),', ""))
    where = 'where={"size": 16, "net": "deep", "rate": 0.1}'
    path.write_text(replaced(text, (PLACE, f"{where}, at=0.1")))
    with pytest.raises(UserError) as caught:
        study.plan(study.load(path), path, "quick")
    assert_one_message(f"error: {caught.value}\n", ("at=0.1", "tunes no axis", "where="))
    path.write_text(replaced(text, (PLACE, where)))
    study.plan(study.load(path), path, "quick")
