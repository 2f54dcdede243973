"""From the numbers of run folders to pictures and one page. Knows neither jax nor models."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bnresearch import rundir, verdict
from bnresearch.verdict import Cell, Interval, Record, interval, label

# Okabe and Ito's palette, told apart with any colour vision; line style and marker differ as well.
LOOKS = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
)
HIGHEST_LOSS = 10.0  # shown; a first epoch far above chance would flatten all the rest
ACCURACY_TICKS = (10, 50, 80, 90, 95, 98, 99, 100)


# Pictures


def rate_figure(table: Sequence[Cell]) -> Figure:
    """Test accuracy against learning rate: means with intervals, single seeds, diverged runs."""
    figure, (axes,) = _figure(1, (8, 4.8))
    arms = _arms(table)
    for index, arm in enumerate(arms):
        aside = 1.03 ** (2 * index - len(arms) + 1)  # side by side, not on top of each other
        _rates(axes, [cell for cell in table if cell.arm == arm], index, aside)
    rates = sorted({cell.rate for cell in table})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel="test accuracy (%)")
    _stretch(axes)
    axes.legend(frameon=False, loc="lower center")
    return figure


def _rates(axes: Axes, mine: Sequence[Cell], index: int, aside: float) -> None:
    colour, line, marker = LOOKS[index % len(LOOKS)]
    name = label(mine[0].arm)
    rates = [cell.rate * aside for cell in mine]
    marks = [cell.accuracy("test") for cell in mine]
    half = [0 if math.isnan(mark.low) else mark.mean - mark.low for mark in marks]
    means = [mark.mean for mark in marks]
    axes.errorbar(rates, means, half, color=colour, ls=line, marker=marker, capsize=5, label=name)
    for rate, cell in zip(rates, mine, strict=True):
        seeds = [record.accuracy("test") for record in cell.done.values()]
        axes.plot([rate] * len(seeds), seeds, ".", color=colour, alpha=0.4, markersize=5)
        if cell.diverged:
            text = f"{name}: {cell.diverged} of {len(cell.records)} diverged"
            at = cell.rate, 1.02 + 0.05 * index
            above = axes.get_xaxis_transform()
            axes.text(*at, text, color=colour, transform=above, ha="center", fontsize=9)


def curve_figure(table: Sequence[Cell], split: str, key: str, ylabel: str) -> Figure:
    """One panel per rate: ``key`` on ``split`` along the epochs, mean and interval over seeds."""
    rates = sorted({cell.rate for cell in table})
    figure, panels = _figure(len(rates), (8, 3.1 * math.ceil(len(rates) / 2)))
    for rate, axes in zip(rates, panels, strict=True):
        for index, arm in enumerate(_arms(table)):
            for cell in table:
                if (cell.arm, cell.rate) == (arm, rate):
                    _curve(axes, cell, split, key, index)
        axes.set_title(f"learning rate {rate:g}", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel("epoch")
        if key == "accuracy":
            _stretch(axes)
    if key == "loss":
        _log_losses(panels)
    for axes in panels[::2]:
        axes.set_ylabel(ylabel)
    return figure


def _curve(axes: Axes, cell: Cell, split: str, key: str, index: int) -> None:
    colour, line, _ = LOOKS[index % len(LOOKS)]
    curves = [record.curve(split, key) for record in cell.done.values()]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    epochs = next(iter(cell.done.values())).curve(split, "epoch") if curves else {}
    average = _percent if key == "accuracy" else _geometric
    band = [average([curve[step] for curve in curves]) for step in steps]
    x = [epochs[step] for step in steps]
    name = f"{label(cell.arm)}, n = {len(curves)}"
    axes.plot(x, [b.mean for b in band], line, color=colour, linewidth=1.6, label=name)
    low, high = [b.low for b in band], [b.high for b in band]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _log_losses(panels: Sequence[Axes]) -> None:
    """One logarithmic axis for all panels, down to the lowest mean."""
    means = np.concatenate([np.asarray(line.get_ydata()) for ax in panels for line in ax.lines])
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(0.5 * means.min(initial=HIGHEST_LOSS), HIGHEST_LOSS)


def _percent(accuracies: Sequence[float]) -> Interval:
    return interval(100 * accuracy for accuracy in accuracies)


def _geometric(losses: Sequence[float]) -> Interval:
    """Mean and interval of the logarithms: on a logarithmic axis the arithmetic ones mislead."""
    mean, low, high, n = interval(np.log(np.maximum(losses, 1e-12)))
    return Interval(math.exp(mean), math.exp(low), math.exp(high), n)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of its own canvas, without pyplot's global state; two panels to a row."""
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(panels, 2)
    grid = figure.subplots(math.ceil(panels / columns), columns, squeeze=False, sharey=True).ravel()
    for axes in grid:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[panels:]:
        axes.remove()
    return figure, list(grid[:panels])


def _stretch(axes: Axes) -> None:
    """An accuracy axis on which 98 and 99 % are as far apart as 50 and 80 %: -log(101 - accuracy).

    101, not 100, so that 100 % has a place on it.
    """

    def forward(accuracy: np.ndarray) -> np.ndarray:
        return -np.log10(101 - np.clip(accuracy, 0, 100))

    axes.set_yscale("function", functions=(forward, lambda y: 101 - 10.0**-y))
    axes.set_yticks(ACCURACY_TICKS)
    axes.minorticks_off()
    axes.set_ylim(0, 100)


def _arms(table: Iterable[Cell]) -> list[str]:
    return sorted({cell.arm for cell in table})


# The page


def write(
    out: Path | str,
    records: Sequence[Record],
    *,
    question: str,
    treatment: str,
    control: str,
    command: str,
    seconds: float,
) -> Path:
    """Writes ``out``/index.html with its pictures beside it, and returns the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table = verdict.cells(records)
    comparison = verdict.compare(table, treatment, control)
    for name, figure in _pictures(table).items():
        figure.savefig(out / name)
    page = out / "index.html"
    text = _template("report.html").render(
        question=question,
        answer=verdict.answer(comparison),
        comparison=comparison,
        table=table,
        counts=_counts(table),
        edges={arm: verdict.edge(table, cell) for arm, cell in comparison.best.items()},
        origin=origin(records),
        command=command,
        seconds=seconds,
    )
    rundir.write_text(page, text)
    return page


def _pictures(table: Sequence[Cell]) -> dict[str, Figure]:
    return {
        "accuracy_vs_rate.png": rate_figure(table),
        "validation_accuracy.png": curve_figure(
            table, "validation", "accuracy", "validation accuracy (%)"
        ),
        "training_loss.png": curve_figure(table, "train", "loss", "training loss"),
    }


def _template(name: str) -> jinja2.Template:
    loader = jinja2.PackageLoader("bnresearch", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    words = (verdict.label, verdict.percent, verdict.signed, verdict.bounds)
    environment.filters |= {word.__name__: word for word in words}
    return environment.get_template(name)


def _counts(table: Iterable[Cell]) -> dict[str, int]:
    totals = dict.fromkeys(("total", "finished", "diverged", "unfinished"), 0)
    for cell in table:
        totals["total"] += len(cell.records)
        totals["finished"] += len(cell.done)
        totals["diverged"] += cell.diverged
        totals["unfinished"] += cell.unfinished
    return totals


def origin(records: Sequence[Record]) -> dict[str, str]:
    """Where the runs come from; several values where they differ (two commits, say)."""
    states = [record.state for record in records]
    seconds = sum(record.result.get("seconds", 0) for record in records)
    return {
        "runs": f"{len(records)}, {seconds:.1f} s of training and evaluation in all",
        "dataset": _distinct(record.config["data"]["name"] for record in records),
        "images": _distinct(map(_images, (r for r in records if r.status == "done"))) or "unknown",
        "model": _distinct(record.config["model"]["name"] for record in records),
        "commit": _distinct(state.get("commit") or "unknown" for state in states),
        "versions": _distinct(_pairs(state.get("versions")) for state in states),
        "device": _distinct(_pairs(state.get("device")) for state in states),
        "date": _distinct(str(state.get("started", "unknown"))[:10] for state in states),
    }


def _images(record: Record) -> str:
    counts = {split: values["count"] for split, values in record.result["metrics"].items()}
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _pairs(table: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (table or {}).items()) or "unknown"
