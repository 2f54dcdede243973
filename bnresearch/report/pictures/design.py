"""What the arms and axes of a study look like, and what all its pictures have in common."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from bnresearch import words
from bnresearch.claims import measure_from_json
from bnresearch.report.pictures.marks import Axis, Key, axis, look

PANELS = 12  # of one picture; what is left out is in the tables


@dataclasses.dataclass(frozen=True)
class Design:
    """What the arms and axes of a study are called and look like.

    Attributes:
      keys: the legend line of each arm, by its name, in the order of the study.
      axes: those of study.json.
      tuned: the axis on which each arm has a value chosen on validation, or "".
      chosen: those values: a frame with the columns arm, the other axes, and the tuned axis.
    """

    keys: Mapping[str, Key]
    axes: Mapping[str, Mapping[str, Any]]
    tuned: str = ""
    chosen: pd.DataFrame | None = None

    @classmethod
    def of(cls, definition: Mapping[str, Any], chosen: pd.DataFrame | None = None) -> "Design":
        arms = definition["arms"].items()
        keys = {
            name: Key(name, arm.get("label") or name, look(index))
            for index, (name, arm) in enumerate(arms)
        }
        tuned = (definition.get("tune") or {}).get("axis", "")
        return cls(keys, definition["axes"], tuned, chosen)

    def label(self, name: str) -> str:
        return self.axes[name].get("label") or name

    @property
    def labels(self) -> dict[str, str]:
        return {name: self.label(name) for name in self.axes}

    def varied(self, frame: pd.DataFrame) -> list[str]:
        """The axes on which the rows of ``frame`` differ."""
        return [name for name in self.axes if name in frame and frame[name].nunique() > 1]

    def values(self, name: str, frame: pd.DataFrame) -> list[Any]:
        """The values of an axis that are there: numbers by size, words in the study's order."""
        there = set(frame[name])
        found = [value for value in dict.fromkeys(self.axes[name]["values"]) if value in there]
        numeric = all(isinstance(value, int | float) for value in found)
        return sorted(found) if numeric else found

    def at_chosen(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Only the runs of each arm at the value that was chosen for it."""
        if self.chosen is None or self.tuned not in frame:
            return frame
        shared = [name for name in self.chosen.columns if name in frame]
        return frame.merge(self.chosen[shared].dropna(), on=shared)


def means_of(frame: pd.DataFrame, by: list[str], log: bool) -> pd.DataFrame:
    """``by``, mean over seeds, low and high of its 95 % t interval (NaN for one seed), and n."""
    values = np.log(frame["value"].clip(lower=1e-12)) if log else frame["value"]
    grouped = values.groupby([frame[name] for name in by], sort=False)
    table = grouped.agg(["mean", "std", "count"]).reset_index()
    n = table["count"].to_numpy(float)
    half = special.stdtrit(np.maximum(n - 1, 1), 0.975) * table["std"] / np.sqrt(n)
    ends = {"mean": table["mean"], "low": table["mean"] - half, "high": table["mean"] + half}
    if log:
        ends = {name: np.exp(column) for name, column in ends.items()}
    return table[by].assign(**ends, n=table["count"])


def split(
    design: Design, frame: pd.DataFrame, by: Sequence[str]
) -> tuple[list[tuple[str, dict[str, Any], pd.DataFrame]], int]:
    """(title, place, rows) for each place on the axes ``by`` that is there; and how many places
    were left out to keep to PANELS, evenly."""
    orders = [list(design.keys) if name == "arm" else design.values(name, frame) for name in by]
    parts = dict(iter(frame.groupby(list(by), sort=False))) if by else {(): frame}
    places = [place for place in itertools.product(*orders) if place in parts]
    kept = range(len(places))
    if len(places) > PANELS:
        kept = np.linspace(0, len(places) - 1, PANELS).round().astype(int).tolist()
    labels = design.labels
    panels = []
    for index in kept:
        place = dict(zip(by, places[index], strict=True))
        arm = [design.keys[place["arm"]].label] if "arm" in place else []
        rest = {name: value for name, value in place.items() if name != "arm"}
        title = ", ".join([*arm, *([words.point(rest, labels)] if rest else [])])
        panels.append((title, place, parts[places[index]]))
    return panels, len(places) - len(panels)


def rows_at(frame: pd.DataFrame, place: Mapping[str, Any]) -> pd.DataFrame:
    for name, value in place.items():
        frame = frame[frame[name] == value]
    return frame


def value_axis(measure: Mapping[str, Any], values: pd.DataFrame, means: pd.DataFrame) -> Axis:
    """Shows all seeds; of intervals as much as half the seeds' range to either side."""
    log = measure_from_json(measure).geometric and bool((values["value"] > 0).all())
    numbers = np.log(values["value"]) if log else values["value"]
    span = float(numbers.max() - numbers.min()) / 2 if len(numbers) else 0.0
    ends = means[["low", "high"]].to_numpy(float)
    ends = np.log(np.maximum(ends, 1e-300)) if log else ends
    ends = np.clip(ends, numbers.min() - span, numbers.max() + span)
    shown = [numbers, ends]
    return axis(
        axis_label(measure),
        [np.exp(one) for one in shown] if log else shown,
        "log" if log else "linear",
        measure["unit"] == "%",
    )


def keys_of(design: Design, frame: pd.DataFrame) -> tuple[Key, ...]:
    there = set(frame["arm"])
    return tuple(key for arm, key in design.keys.items() if arm in there)


def axis_label(measure: Mapping[str, Any]) -> str:
    label, unit = measure["label"], measure["unit"]
    return f"{label} ({unit})" if unit and unit not in label else label


def notes(measure: Mapping[str, Any], y: Axis, values: pd.DataFrame, left_out: int) -> str:
    """Further sentences of a caption: whatever of a picture is not what it seems."""
    found = omitted(left_out)
    if "censored" in values and values["censored"].fillna(0).any():
        found += (
            " Open dots: only a bound is known; where there are such, the mark is Kaplan and "
            "Meier's median instead of a mean."
        )
    if y.scale == "stretch":
        found += " The vertical axis is stretched towards 100 %."
    if y.scale == "log":
        found += " The vertical axis is logarithmic, and means are geometric."
    return found


def omitted(count: int) -> str:
    return f" {count} further settings are not shown here; the tables have them." if count else ""


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def file_name(*parts: str) -> str:
    """A name for files: letters, digits and underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in " ".join(parts)).split())


KINDS = {"wilson": "share", "median": "median", "kaplan-meier": "median"}


def interval_text(row: Mapping[Any, Any], unit: str) -> str:
    mean, low, high = words.together([row["mean"], row["low"], row["high"]])
    kind = KINDS.get(row.get("kind", ""), "mean")
    return f"{kind} {words.with_unit(mean, unit)} (95 % interval {low} to {high}, n = {row['n']})"
