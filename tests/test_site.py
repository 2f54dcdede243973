"""Where a report may be written, and what becomes of what was there."""

import pytest
from study_tools import make_study

from bnresearch import records, report
from bnresearch.errors import UserError


def site(folder):
    return report.write([records.load_study(folder)], folder / "report")


def test_a_site_is_replaced_whole(tmp_path):
    make_study(tmp_path, seeds=1)
    front = site(tmp_path)
    (front.parent / "left.txt").write_text("over")
    site(tmp_path)
    assert not (front.parent / "left.txt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_site_is_kept(tmp_path):
    make_study(tmp_path, seeds=1)
    precious = tmp_path / "report" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("precious")
    with pytest.raises(UserError, match=r"report is neither empty nor a report .*--out"):
        site(tmp_path)
    assert precious.read_text() == "precious"
    with pytest.raises(UserError, match="notes.txt is neither empty nor a report"):
        report.write([records.load_study(tmp_path)], precious)


def test_a_site_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    make_study(tmp_path, seeds=1)
    front = site(tmp_path)
    before = front.read_text()

    def full(*args, **content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bnresearch.report.site.render", full)
    with pytest.raises(UserError, match="cannot write the report .*No space left on device"):
        site(tmp_path)
    assert front.read_text() == before
