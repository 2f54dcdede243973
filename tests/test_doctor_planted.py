"""The doctor finds what was planted, where it was planted, and calls nothing else serious."""

import pytest
from doctor_faults import FAULTS, LEFT_OUT, PAGE, PLANTED, cell, diagnosed, hit, how, others
from doctor_zoo import FAMILIES

from bnresearch import doctor


def rows():
    """The table of planted against found in the docs: {fault: {family: cell}}."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    found = {}
    for line in lines:
        fault, *rest = (part.strip() for part in line.strip("|").split("|"))
        if fault in FAULTS:
            how, check, *cells = rest
            found[fault] = {"how": how, "check": check} | dict(zip(FAMILIES, cells, strict=True))
    return found


# One process per family: it is trained, and compiled, once.
CASES = [pytest.param(*case, marks=pytest.mark.xdist_group(case[1])) for case in PLANTED]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "family"), CASES)
def test_found(fault, family):
    planted, report = diagnosed(fault, family)
    assert hit(planted, report), report.table()
    assert others(planted, report) == [], report.table()
    # After a change: python tests/doctor_faults.py writes the table anew.
    assert rows()[fault][family] == cell(planted, report)
    assert rows()[fault]["check"] == f"`{planted.check}`"


def test_the_table_has_every_fault_and_every_check():
    table = rows()
    assert list(table) == list(FAULTS)
    assert {row["check"].strip("`") for row in table.values()} == set(doctor.CHECKS)
    for fault, plant in FAULTS.items():
        assert table[fault]["how"] == how(plant)
    for (fault, family), why in LEFT_OUT.items():
        assert table[fault][family] == why
