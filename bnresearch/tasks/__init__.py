"""What a batch is, the loss and the metrics: the table TASKS."""

from typing import Any

from bnresearch.tasks.classification import Classification

TASKS = {"classification": Classification}


def options() -> dict[str, dict[str, Any]]:
    """The default options of every task, by name."""
    return {name: dict(task.OPTIONS) for name, task in TASKS.items()}
