"""``python -m benchmarks [PART ...] [--quick]``: measure, print tables, and keep the results."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from benchmarks import checkpoint, norms, start, step, sweep
from benchmarks.measure import RESULTS, write

PARTS: dict[str, ModuleType] = {
    "step": step,
    "norms": norms,
    "start": start,
    "checkpoint": checkpoint,
    "sweep": sweep,
}
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts named in ``argv``, or all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Side-by-side measurements. Each part prints a table and writes "
        "benchmarks/results/PART.json (PART-gpu.json on a GPU); without --quick its table in "
        "docs/performance.md follows.",
    )
    summaries = "; ".join(f"{name}: {summary(part)}" for name, part in PARTS.items())
    parser.add_argument("part", nargs="*", help=f"{summaries} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few repeats: proves that it runs")
    options = parser.parse_args(argv)
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)}; choose among {list(PARTS)}")
    for name in options.part or PARTS:
        part = PARTS[name]
        path = write(name, part.run(options.quick), options.quick)
        show(part, json.loads(path.read_text()))
        if not options.quick:
            update_page()


def summary(part: ModuleType) -> str:
    """The first sentence of a part."""
    return (part.__doc__ or "").split(".")[0].replace("\n", " ")


def show(part: ModuleType, result: dict) -> None:
    """Print the table of a result."""
    table = Table(*part.HEADER, title=f"{summary(part)} ({about(result)})")
    for row in part.table(result):
        table.add_row(*row)
    Console().print(table)


def about(result: dict) -> str:
    """Where and when, for the head of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['device']}, {result['processor']}, {result['cores']} cores, python "
        f"{result['python']}, {versions}, {result['date']}"
    )


def update_page() -> None:
    """Put the results that there are between the marks of docs/performance.md."""
    page = PAGE.read_text()
    for name, part in PARTS.items():
        results = sorted(RESULTS.glob(f"{name}*.json"), key=lambda path: path.stem)
        if found := [path for path in results if "-quick" not in path.name]:
            body = "\n".join(markdown(part, json.loads(path.read_text())) for path in found)
            marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            page = re.sub(marks, lambda m, body=body: m[1] + body + m[2], page, flags=re.S)
    PAGE.write_text(page)


def markdown(part: ModuleType, result: dict) -> str:
    """A result as a markdown table."""
    rows = [part.HEADER, ("---",) * len(part.HEADER), *part.table(result)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"{about(result)}.", "", *lines, ""])


if __name__ == "__main__":
    main()
