"""``python -m benchmarks [PART ...] [--quick]``: measure, print tables, and keep the results."""

import argparse
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, name_of, say, write
from benchmarks.picture import draw

PARTS: dict[str, str] = {
    "layer": "BatchNorm with what stands behind it: six libraries, time and memory",
    "step": "the train step against plain flax and PyTorch",
    "norms": "every kind of norm by itself",
    "start": "from the command to the first step, and what imports take",
    "checkpoint": "what a checkpoint costs",
    "recalibration": "running statistics taken anew against forward passes",
    "probes": "what looking inside a run costs, in training steps",
    "sweep": "100 runs against the same loop in PyTorch",
    "input": "images/s of each way to the data",
    "decode": "JPEGs of ImageNet's sizes by several libraries, on one core",
    "devices": "collectives of a BatchNorm layer on several devices",
    "processes": "a step of two processes against two devices of one",
    "report": "the report of a study with 2,000 runs",
    "gpu": "ResNet-50 in bfloat16 and epochs of CIFAR-10; on a GPU only",
}
# Everything else is about the processor, or takes too long: all of these together end within 8
# minutes.
ON_GPU = ("layer", "gpu")
DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
SCALING = DOCS / "scaling.md"  # with the further tables of a part
IMAGES = DOCS / "images"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts named in ``argv``, or all of them."""
    import jax

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Side-by-side measurements. Each part prints a table and writes "
        "benchmarks/results/PART.json (PART-gpu.json on a GPU) and a picture; without --quick, "
        "table and picture in docs/performance.md (and docs/scaling.md) follow.",
    )
    parts = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    default = f"default: all; on a GPU {', '.join(ON_GPU)}"
    parser.add_argument("part", nargs="*", help=f"{parts} ({default})")
    parser.add_argument("--quick", action="store_true", help="few repeats: proves that it runs")
    parser.add_argument("--out", type=Path, help="write results and pictures here, and no page")
    options = parser.parse_args(argv)
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)}; choose among {list(PARTS)}")
    everything = list(PARTS) if jax.default_backend() == "cpu" else ON_GPU
    published = options.out is None and not options.quick
    results = options.out or RESULTS
    for name in options.part or everything:
        part, stem = module(name), name_of(name, options.quick)
        say(f"{name}: {PARTS[name]}")
        result = write(name, part.run(options.quick), results / f"{stem}.json")
        show(part, result)
        if result["rows"]:
            folder = IMAGES if published else results
            draw(name, part.panels(result), folder / picture_of(stem))
        if published:
            update_page()


def module(name: str) -> ModuleType:
    """A part; imported when it is run, for some start processes that must not find jax awake."""
    return importlib.import_module(f"benchmarks.{name}")


def picture_of(stem: str) -> str:
    """The file of a picture."""
    return f"performance_{stem}.png"


def summary(part: ModuleType) -> str:
    """The first sentence of a part."""
    return re.split(r"\.\s", part.__doc__ or "")[0].replace("\n", " ")


def show(part: ModuleType, result: dict[str, Any]) -> None:
    """Print the tables of a result, and what is not in it."""
    own = (f"{summary(part)},", part.HEADER, part.table(result))
    console = Console()
    for title, header, rows in (own, *further(part, result).values()):
        table = Table(*header, title=f"{title} {about(result)}")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
    for line in left_out(result):
        console.print(line, markup=False)


def further(part: ModuleType, result: dict[str, Any]) -> dict[str, Any]:
    """``{mark: (title, header, rows)}`` of the tables that a part has besides its own."""
    return part.further(result) if hasattr(part, "further") else {}


def left_out(result: dict[str, Any]) -> list[str]:
    """What could not be measured, and why."""
    return [f"Left out: {line}." for line in result.get("left_out", ())]


def about(result: dict[str, Any]) -> str:
    """Where and when, for the head of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['device']}, {result['processor']}, {result['cores']} cores, python "
        f"{result['python']}, {versions}, {result['date']}"
    )


def update_page() -> None:
    """Put the results that there are between the marks of the pages."""
    bodies = {}
    for name in PARTS:
        found = [path for stem in (name, f"{name}-gpu") for path in RESULTS.glob(f"{stem}.json")]
        if found:
            bodies[name] = "\n".join(markdown(module(name), path) for path in found)
        for path in found:
            result = json.loads(path.read_text())
            for mark, (title, header, rows) in further(module(name), result).items():
                head = f"{title} {about(result)}."
                bodies[mark] = "\n".join([head, "", *lines_of(header, rows), "", ""])
    for page in (PAGE, SCALING):
        text = page.read_text()
        for mark, body in bodies.items():
            marks = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
            text = re.sub(marks, lambda m, body=body: m[1] + body + m[2], text, flags=re.S)
        page.write_text(text)


def lines_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]


def markdown(part: ModuleType, path: Path) -> str:
    """A result as a markdown table, with its picture where there is one."""
    result = json.loads(path.read_text())
    lines = lines_of(part.HEADER, part.table(result))
    picture = IMAGES / picture_of(path.stem)
    image = [f"![{summary(part)}](images/{picture.name})", ""] if picture.is_file() else []
    notes = [f"{line}\n" for line in left_out(result)]
    return "\n".join([f"{about(result)}.", "", *image, *lines, "", *notes])


if __name__ == "__main__":
    main()
