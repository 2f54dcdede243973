"""What a study's page says, from its results: verdict cards, arms, runs, origin. No layout."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from bnresearch import words
from bnresearch.records import StudyResults
from bnresearch.report.pictures.design import KINDS, Design, axis_label, upper_first
from bnresearch.report.pictures.effects import Effect, Strip, effect, in_words, strip

SYMBOLS: Mapping[str, str] = {"supported": "✓", "refuted": "✗", "inconclusive": "?"}
STATUSES = ("done", "diverged", "failed", "stopped", "running", "missing", "damaged")
PLACES = ("arm", "seed", "id", "status", "step", "seconds", "message")


class Card(NamedTuple):
    """A claim and what became of it, in words. ``verdict`` is "" where nothing was decided."""

    number: int
    text: str
    verdict: str = ""
    symbol: str = ""
    reason: str = ""
    effect: str = ""
    interval: str = ""
    n: str = ""
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    strip: Strip | None = None


def cards(results: StudyResults) -> list[Card]:
    """A card per claim, in the order of the study."""
    definition = results.definition
    verdicts = definition.get("verdicts")
    if not verdicts:
        return [Card(i, _claim(claim)) for i, claim in enumerate(definition["claims"], start=1)]
    return [_card(results, i, verdict) for i, verdict in enumerate(verdicts, start=1)]


def _claim(claim: Mapping[str, Any]) -> str:
    """The words of a claim that nobody has decided, and that may have none of its own."""
    sides = [claim.get("treatment"), claim.get("control"), claim.get("arm")]
    named = " and ".join(str(side) for side in sides if side)
    named = named or " > ".join(str(arm) for arm in claim.get("arms", ()))
    return claim.get("text") or f"{claim['kind']} of {claim['measure']}: {named}"


def _card(results: StudyResults, number: int, verdict: Mapping[str, Any]) -> Card:
    found = effect(verdict, results.definition["measures"])
    return Card(
        number,
        verdict["text"],
        verdict["verdict"],
        SYMBOLS[verdict["verdict"]],
        upper_first(verdict["reason"].rstrip(".")) + ".",
        *_numbers(found, verdict["of"]),
        words.number(verdict["n"]),
        _facts(results, verdict),
        _warnings(results, verdict),
        strip(found) if found else None,
    )


def _numbers(found: Effect | None, of: str) -> tuple[str, str]:
    """("+2.3 points", "95 % interval +1.9 to +2.7"), and the pair of an ordering they are of."""
    if found is None:
        return "no number", ""
    estimate, interval = in_words(found)
    return estimate, f"{interval} ({of})" if of else interval


def _facts(results: StudyResults, verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    claims = len(results.definition["claims"])
    p = _chance(verdict["p"])
    if claims > 1:
        p += f"; {_chance(verdict['p_holm'])} by Holm's correction for {claims} claims"
    facts = [("seeds, n", words.number(verdict["n"])), ("p", p)]
    for pair in verdict["pairs"]:
        estimate, interval = _effect_of(results, verdict, pair)
        facts.append((pair["of"], f"{estimate} ({interval})"))
    facts += _rates(results, verdict)
    if verdict["verdict"] == "inconclusive":
        facts.append(("enough would have been", _needed(verdict["n_needed"])))
    return facts


def _chance(p: Any) -> str:
    return words.chance(p).removeprefix("= ")


def _needed(seeds: Any) -> str:
    if not isinstance(seeds, int | float) or not math.isfinite(seeds):
        return "more seeds than can be worked out from these"
    return f"about {math.ceil(seeds):,} seeds, if the effect is as it looks here"


def _effect_of(
    results: StudyResults, verdict: Mapping[str, Any], other: Mapping[str, Any]
) -> list[str]:
    """Estimate and interval of another effect of the same claim, in words."""
    found = effect({**verdict, **other}, results.definition["measures"])
    if found is None:
        return ["no number", ""]
    estimate, interval = in_words(found)
    return [estimate, interval.removeprefix("95 % interval ")]


def _rates(results: StudyResults, verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The value of the tuned axis that each side takes, or that the claim fixes for both."""
    tune, at = results.definition["tune"], verdict["at"]
    if tune is None or not at:
        return []
    label = _label(results, tune["axis"])
    if verdict["claim"]["at"] != "best":
        return [(label, f"{words.setting(verdict['claim']['at'])}, fixed by the claim")]
    values = [f"{side}: {words.setting(value)}" for side, value in at.items()]
    return [(f"chosen {label}", ", ".join(values))]


def _label(results: StudyResults, axis: str) -> str:
    return results.definition["axes"][axis].get("label") or axis


def _warnings(results: StudyResults, verdict: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting a verdict: pairs lost, choices at an edge."""
    found = []
    missing = verdict["missing"]
    lost = {why: count for why, count in (missing or {}).items() if count}
    if lost:
        named = ", ".join(f"{count} {why}" for why, count in lost.items())
        found.append(f"Left out for want of a value: {named}.")
    since = len(results.damaged.keys() & set(verdict["runs"])) - lost.get("damaged", 0)
    if since > 0:
        found.append(
            f"Damaged since the verdict was given: {words.count(since, 'run')} behind it. Run the "
            "study again."
        )
    tuning = results.tuning
    if tuning is None or verdict["claim"]["at"] != "best":
        return found
    label = _label(results, tuning.axis)
    edges = tuning.chosen[tuning.chosen["edge"] != ""]
    ends = dict(zip(edges[tuning.axis], edges["edge"], strict=True))
    for side, value in (verdict["at"] or {}).items():
        if value in ends:
            found.append(
                f"{side}: the chosen {label} {words.setting(value)} is the {ends[value]} that was "
                "tried; there may be a better one beyond."
            )
    return found


def tally(cards: Sequence[Card]) -> list[tuple[str, str, int]]:
    """(verdict, symbol, how many claims) of those that occur."""
    found = [card.verdict for card in cards]
    return [(name, symbol, found.count(name)) for name, symbol in SYMBOLS.items() if name in found]


def undecided(results: StudyResults) -> str:
    """Why there are no verdicts, or "" where there are."""
    definition = results.definition
    if not definition["claims"]:
        return "This study makes no claim, so there is nothing to decide."
    if not definition.get("may_conclude", True):
        return (
            f"No verdict: this is the scale “{definition['scale']}”, which only shows that the "
            "study runs from end to end. Run it with --scale=quick for a verdict."
        )
    if not definition.get("verdicts"):
        ended = sum(run.status in ("done", "diverged") for run in results.records)
        return (
            f"No verdict yet: {ended} of {len(results.records)} runs have ended. "
            "The same command goes on where it stopped."
        )
    return ""


# ---- Arms and runs


def paragraphs(text: str) -> list[tuple[bool, str]]:
    """(whether it is code, text) of each part of a docstring; prose without its line breaks."""
    parts = [part for part in re.split(r"\n\s*\n", textwrap.dedent(text)) if part.strip()]
    indented = [part.startswith("    ") for part in parts]
    return [
        (True, textwrap.dedent(part)) if code else (False, " ".join(part.split()))
        for code, part in zip(indented, parts, strict=True)
    ]


def arms(results: StudyResults, design: Design) -> list[dict[str, Any]]:
    """A row per arm: its look, what it changes, how its runs ended, and what was chosen for it."""
    statuses = results.runs.groupby(["arm", "status"]).size() if len(results.runs) else {}
    rows = []
    for name, arm in results.definition["arms"].items():
        counts = {status: int(statuses.get((name, status), 0)) for status in STATUSES}
        rows.append(
            {
                "key": design.keys[name],
                "overrides": arm["overrides"],
                "first_seed": arm.get("first_seed", 0),
                "counts": {status: count for status, count in counts.items() if count},
                "chosen": _chosen_of(results, design, name),
            }
        )
    return rows


def _chosen_of(results: StudyResults, design: Design, arm: str) -> str:
    """The chosen values of an arm: one, or one for each place on the other axes."""
    if results.tuning is None:
        return ""
    rows = results.tuning.chosen
    rows = rows[rows["arm"] == arm]
    others = [name for name in design.varied(rows) if name != design.tuned]
    texts = []
    for row in rows.to_dict("records"):
        place = words.point({name: row[name] for name in others}, design.labels)
        edge = f" ({row['edge']} tried)" if row["edge"] else ""
        value = words.setting(row[design.tuned])
        texts.append(f"{value}{edge}{f' at {place}' if place else ''}")
    return "; ".join(texts)


def counts(results: StudyResults) -> dict[str, int]:
    """How many runs ended how."""
    found = [run.status for run in results.records]
    return {status: found.count(status) for status in STATUSES if status in found}


def run_table(results: StudyResults, design: Design) -> dict[str, Any]:
    """What site.js shows as the table of runs: columns and rows of short texts and numbers."""
    frame = results.runs
    metrics = [
        name for name in frame if name not in (*PLACES, *design.axes) and "/count" not in name
    ]
    axes = list(design.axes)
    columns = ["arm", *(design.label(name) for name in axes), "seed", "status", *metrics]
    rows = []
    for row in frame.to_dict("records"):
        arm = design.keys[row["arm"]].label
        place = [row[name] for name in axes]
        values = [_cell(row[name]) for name in metrics]
        rest = [_cell(row["seconds"]), row["id"], row["message"]]
        rows.append([arm, *place, row["seed"], row["status"], *values, *rest])
    configs = sorted({run.id for run in results.records if run.config})
    columns += ["seconds", "run", "remark"]
    return {"columns": columns, "rows": rows, "configs": configs}


def _cell(value: Any) -> Any:
    """Four significant digits; None for what is not there."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


class Numbers(NamedTuple):
    """A measure as a table: a row per arm and place, at the chosen values of a tuned axis."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def numbers(design: Design, measure: Mapping[str, Any], table: pd.DataFrame) -> Numbers:
    """What `verdict.cells` made of a measure, in words."""
    axes = [name for name in design.axes if name in table]
    table = design.at_chosen(table)
    bounds, diverged = table["censored"].any(), "diverged" in table and table["diverged"].any()
    columns = ["arm", *map(design.label, axes), "n", *["of them bounds"] * bool(bounds)]
    columns += ["estimate", "95 % interval", *["diverged (95 % interval)"] * bool(diverged)]
    rows = []
    for row in table.to_dict("records"):
        place = [design.keys[row["arm"]].label, *(words.setting(row[name]) for name in axes)]
        counts = [str(row["n"])] + [str(row["censored"])] * bool(bounds)
        rows.append([*place, *counts, *_centre(row), *(_share(row) if diverged else [])])
    return Numbers(f"{upper_first(axis_label(measure))} in numbers", columns, rows)


def same_rates(results: StudyResults) -> list[Numbers]:
    """The effects with both sides at the same value of the tuned axis; on a plot the small ones
    are hard to tell from nothing."""
    found = []
    for number, verdict in enumerate(results.definition["verdicts"] or [], start=1):
        rows = [
            [words.setting(row["value"]), str(row["n"]), *_effect_of(results, verdict, row)]
            for row in verdict["same_rate"]
        ]
        if rows and results.tuning is not None:
            label = _label(results, results.tuning.axis)
            columns = [f"{label} of both", "n", "effect", "95 % interval"]
            found.append(Numbers(f"Claim {number} at the same {label}", columns, rows))
    return found


def _centre(row: Mapping[Any, Any]) -> list[str]:
    mean, low, high = words.together([row["mean"], row["low"], row["high"]])
    kind = KINDS.get(row["kind"], "mean")
    return [f"{kind} {mean}" if row["n"] else words.NOTHING, f"{low} to {high}"]


def _share(row: Mapping[Any, Any]) -> list[str]:
    low, high = (round(100 * row[f"diverged_{end}"]) for end in ("low", "high"))
    return [f"{row['diverged']} ({low} to {high} %)"]


# ---- Where the numbers come from


def origin(results: StudyResults) -> list[tuple[str, str]]:
    """What produced the page, as pairs of words."""
    definition = results.definition
    device = definition.get("device")
    seconds = sum(run.result.get("seconds") or 0.0 for run in results.records)
    return [
        ("study file", str(definition.get("file") or "unknown")),
        ("scale", definition["scale"]),
        ("command", " ".join(map(str, definition.get("command") or ["unknown"]))),
        ("started", _moment(definition.get("started"))),
        ("finished", _moment(definition.get("finished"))),
        ("last call took", words.duration(definition.get("seconds"))),
        ("runs took, added up", words.duration(seconds)),
        ("commit", str(definition.get("commit") or "unknown")),
        ("device", _pairs(device) if isinstance(device, Mapping) else str(device or "unknown")),
        ("versions", _pairs(definition.get("versions") or {})),
    ]


def _moment(text: Any) -> str:
    """2026-01-02T03:04:05+00:00 -> 2026-01-02 03:04 UTC."""
    if not isinstance(text, str):
        return "unknown"
    zone = " UTC" if text.endswith("+00:00") else text[19:]
    return f"{text[:10]} {text[11:16]}{zone}"


def _pairs(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in table.items()) or "unknown"
