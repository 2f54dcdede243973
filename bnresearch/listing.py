"""What can be chosen in a config, and the files that come with the source: rows for ``list``."""

import inspect
from collections.abc import Callable


def summary(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].split("\n")[0]


def _norms() -> list[tuple[str, str]]:
    from bnresearch.handbook import listing

    return listing()


def _weights() -> list[tuple[str, str]]:
    from bnresearch.reparam import REPARAMS

    return [(name, summary(function)) for name, function in REPARAMS.items()]


def _presets() -> list[tuple[str, str]]:
    from bnresearch.conventions import PRESETS

    return [
        (name, ", ".join(f"{key}={value}" for key, value in preset.options.items()))
        for name, preset in PRESETS.items()
    ]


def _inits() -> list[tuple[str, str]]:
    from bnresearch.initialise import INITS

    return [(name, summary(entry.fit or entry.draw)) for name, entry in INITS.items()]


def _models() -> list[tuple[str, str]]:
    from bnresearch.models import MODELS

    return [(name, summary(entry.module)) for name, entry in MODELS.items()]


def _datasets() -> list[tuple[str, str]]:
    from bnresearch.data import describe

    return describe()


def _tasks() -> list[tuple[str, str]]:
    from bnresearch.tasks import TASKS

    return [(name, summary(task)) for name, task in TASKS.items()]


def _optimizers() -> list[tuple[str, str]]:
    from bnresearch.optim import OPTIMIZERS

    return [(name, f"options {dict(entry.options)}") for name, entry in OPTIMIZERS.items()]


def _schedules() -> list[tuple[str, str]]:
    from bnresearch.optim import SCHEDULES

    return [(name, f"options {dict(entry.options)}") for name, entry in SCHEDULES.items()]


def _averages() -> list[tuple[str, str]]:
    from bnresearch.average import AVERAGES

    return [(name, summary(entry.make)) for name, entry in AVERAGES.items()]


def _modes() -> list[tuple[str, str]]:
    from bnresearch.parallel import MODES

    return [(name, summary(layout)) for name, layout in MODES.items()]


def _stats() -> list[tuple[str, str]]:
    from bnresearch.stats import STATS

    return [(name, summary(entry.run)) for name, entry in STATS.items()]


def _probes() -> list[tuple[str, str]]:
    from bnresearch.probes import PROBES

    return [(name, summary(probe)) for name, probe in PROBES.items()]


def _configs() -> list[tuple[str, str]]:
    from bnresearch.config_file import listing

    return listing("configs")


def _studies() -> list[tuple[str, str]]:
    from bnresearch.config_file import listing

    return listing("configs/studies")


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "norms": _norms,
    "presets": _presets,
    "weights": _weights,
    "models": _models,
    "inits": _inits,
    "datasets": _datasets,
    "tasks": _tasks,
    "optimizers": _optimizers,
    "schedules": _schedules,
    "averages": _averages,
    "modes": _modes,
    "stats": _stats,
    "probes": _probes,
    "configs": _configs,
    "studies": _studies,
}
