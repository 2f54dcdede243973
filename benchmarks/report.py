"""The report of a study with 2,000 runs: to read it, to build the pages, and how large they are.

The study is made up and lies on disk as a real one would: a folder for every run. Nothing of jax is
needed for it.
"""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, exact, in_turn, scaled, spread, text
from benchmarks.picture import Bars
from bnresearch import records
from bnresearch import report as reports
from bnresearch.claims import Difference

HEADER = ("runs", "seconds to read", "seconds to build the report", "MB", "files", "n")
TOOLS = Path(__file__).parent.parent / "tests" / "study_tools.py"
ARMS, RATES = ("batch", "group", "layer", "none"), (0.01, 0.03, 0.1, 0.3, 1.0)
CLAIM = Difference(treatment="batch", control="none", measure="accuracy", text="BN is ahead")


def run(quick: bool) -> dict[str, Any]:
    """A row per size of the study."""
    sizes, repeats = ((40,), 2) if quick else ((200, 2000), 5)
    return {"rows": [measured(runs, repeats) for runs in sizes]}


def measured(runs: int, repeats: int) -> dict[str, Any]:
    """Read and build in turn, again and again."""
    make_study = runpy.run_path(str(TOOLS))["make_study"]
    seeds = runs // len(ARMS) // len(RATES)
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "study", Path(name) / "report"
        make_study(folder, ARMS, {"rate": list(RATES)}, seeds, claims=[CLAIM])
        results = records.load_study(folder)
        work = {
            "read": lambda: records.load_study(folder),
            "build": lambda: reports.write([results], out),
        }
        seconds = in_turn(work, repeats)
        files = [path for path in out.rglob("*") if path.is_file()]
        return {
            "runs": runs,
            "seconds": {what: spread(values) for what, values in seconds.items()},
            "bytes": sum(path.stat().st_size for path in files),
            "files": len(files),
        }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per size."""
    return [
        (
            f"{row['runs']:,}",
            text(row["seconds"]["read"]),
            text(row["seconds"]["build"]),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['files']:,}",
            str(row["seconds"]["build"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Seconds, and bytes of a run."""
    seconds = {
        f"{row['runs']:,} runs": {what: row["seconds"][what] for what in ("read", "build")}
        for row in result["rows"]
    }
    sizes: dict[str, dict[str, Spread]] = {
        f"{row['runs']:,} runs": {"whole report": scaled(exact(row["bytes"]), 1e-6)}
        for row in result["rows"]
    }
    return [Bars("reading and building", "seconds", seconds), Bars("size", "MB", sizes)]
