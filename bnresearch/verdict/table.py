"""The verdicts of a study as a table for the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnresearch.verdict.deciding import because, effect_of

LOOKS = {"supported": "bold green", "refuted": "bold red", "inconclusive": "bold yellow"}


def show(definition: Mapping[str, Any]) -> None:
    """Prints the question of a study.json and the verdict on each claim, with its numbers."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(f"\n{definition['question']}", markup=False, style="bold")
    if definition["verdicts"] is None:
        console.print(f"No verdicts at scale {definition['scale']}: it shows that the study runs.")
        return
    table = Table("claim", "verdict", "what the runs say", box=box.SIMPLE, leading=1)
    for verdict in definition["verdicts"]:
        name = verdict["verdict"]
        numbers = f"{effect_of(verdict)}; {because(verdict)}."
        table.add_row(Text(verdict["text"]), Text(name, LOOKS[name]), Text(numbers))
    console.print(table)
