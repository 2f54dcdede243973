"""Claims and values make verdicts. Reads frames; knows neither files nor models nor pictures.

Of every claim it is asked what its numbers show, in the claim's direction, with d the effect:

- supported: d is above the smallest effect of interest s; the 95 % interval lies there, and so says
  the exact test. An equivalence or a value: two one-sided tests place it within the margin.
- refuted: d is below 0, by interval and test; or two one-sided tests place it within ±s. An
  equivalence or a value: interval and test place it outside the margin.
- inconclusive: neither; or more than a tenth of the seeds are lost.

The p-value of a claim is the smallest of those of the answers it can get (two-sided for "above" and
"below"); Holm's correction runs over the claims of a study. docs/verdicts.md has the reasons and
the error rates.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bnresearch import claims, words
from bnresearch.claims import ALPHA, NOTHING, Claim, Measure
from bnresearch.measures import Tuning
from bnresearch.verdict import estimate
from bnresearch.verdict.cases import Case, Source, case_of, shown
from bnresearch.verdict.estimate import Interval
from bnresearch.verdict.options import INCONCLUSIVE, Option
from bnresearch.verdict.samples import ROW, Sample, Table
from bnresearch.verdict.wording import Names, Unit

LOST = 0.1  # a larger share of lost seeds leaves a claim inconclusive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim. Effects as they are written: treatment - control, or their ratio.

    Attributes:
      claim: as JSON; text: in words.
      verdict: "supported", "refuted" or "inconclusive"; reason: one sentence.
      estimate, low, high, confidence: the effect and its interval (open ends are infinite; NaN
        where there is none); interval: which kind, "t", "bca", "percentile" or "median".
      of: the pair of an ordering that this is the effect of: the one that settles the verdict, or
        keeps it open; pairs: the effects of all.
      unit: of these ("times" for a ratio); log: whether they are ratios.
      null: no effect, or the expected value; boundary: the smallest effect of interest, margin or
        tolerance, as in the claim.
      n: the pairs (or seeds) it rests on; missing: {why: seeds lost}; censored: values that are
        only bounds.
      p: of the claim; p_holm: corrected; p_zero: two-sided against null, for itself.
      n_needed: seeds that would have decided it with 80 % probability, if effect and spread are as
        estimated; None if it is decided or no number would.
      at: {side, by its label: value of the tuned axis}; same_rate: the effect at each value of
        that axis.
      runs: ids; points: {seed: effect}.
    """

    claim: dict[str, Any]
    text: str
    verdict: str
    reason: str
    estimate: float
    low: float
    high: float
    confidence: float
    interval: str
    unit: str
    log: bool
    null: float
    boundary: float
    n: int
    missing: dict[str, int]
    censored: int
    p: float
    p_holm: float
    p_zero: float
    n_needed: int | None
    of: str
    pairs: list[dict[str, Any]]
    at: dict[str, Any]
    same_rate: list[dict[str, Any]]
    runs: list[str]
    points: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        return plain | {"points": {str(seed): value for seed, value in self.points.items()}}


def answer(verdict: Verdict | Mapping[str, Any]) -> str:
    """A verdict in one sentence; also of its JSON."""
    v = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    return f"{v['verdict'].capitalize()}: {v['text']}. {effect_of(v)}; {because(v)}."


def effect_of(v: Mapping[str, Any]) -> str:
    """Estimate and interval in words."""
    if not v["n"] or not isinstance(v["estimate"], int | float) or math.isnan(v["estimate"]):
        return f"No effect can be worked out (n = {v['n']})"
    plain = v["log"] or v["claim"]["kind"] == "value" or v["claim"].get("expected") is not None
    show = words.number if plain else words.signed
    unit = f" {v['unit']}".rstrip()
    interval = f"95 % interval {show(v['low'])} to {show(v['high'])}, "
    kind = {"value": "value", "slope": "slope"}.get(v["claim"]["kind"], "effect")
    kind = f"median {kind}" if v["interval"] == "median" else kind
    kind += f" of {v['of']}" if v["of"] else ""
    return (
        f"The {kind} is {show(v['estimate'])}{unit} ({interval if v['n'] > 1 else ''}n = {v['n']})"
    )


def because(v: Mapping[str, Any]) -> str:
    """The reason with its p-values, and the seeds that would be enough."""
    text = v["reason"]
    if v["n"] > 1:
        p, corrected = (words.chance(v[name]) for name in ("p", "p_holm"))
        text += f" (p {p}"
        text += ")" if corrected == p else f", {corrected.removeprefix('= ')} by Holm's correction)"
    if v["n_needed"] is not None:
        text += f"; {v['n_needed']} seeds would decide it with a probability of 80 %"
    return text


# ---- Deciding


def decide(
    written: Sequence[Claim],
    values: Mapping[str, pd.DataFrame],
    tuning: Tuning | None,
    measures: Mapping[str, Measure],
    arms: Mapping[str, str] = NOTHING,
    axes: Mapping[str, str] = NOTHING,
) -> list[Verdict]:
    """The verdicts on the claims of a study, in their order.

    Args:
      written: all claims of the study: the correction is over them.
      values: a frame per measure (`measures.values`).
      tuning: which value of the tuned axis each arm takes, if one is tuned.
      arms, axes: what they are called; their names by default.

    Raises:
      UserError: a claim is about a place that the values do not have.
    """
    tables = {name: Table(frame) for name, frame in values.items()}
    names = Names(arms, axes, tuning.axis if tuning else "")
    sources = [
        Source(claim, tables[claim.measure], measures[claim.measure], tuning, names)
        for claim in written
    ]
    cases = [case_of(*both) for both in zip(written, sources, strict=True)]
    adjusted = estimate.holm([case.leading.p for case in cases])
    return [_verdict(case, p, len(cases)) for case, p in zip(cases, adjusted, strict=True)]


def _verdict(case: Case, p_holm: float, family: int) -> Verdict:
    option, unit = case.leading, case.unit
    evidence = option.evidence
    sample = evidence.sample
    worst = max(case.samples, key=lambda one: one.lost_share)
    clear = sample.n > 1 and option.shown and p_holm <= ALPHA
    return Verdict(
        claim=claims.to_json(case.claim),
        text=case.text,
        verdict=option.verdict if clear and worst.lost_share <= LOST else INCONCLUSIVE,
        reason="; ".join(_reasons(case, worst, clear)),
        **shown(evidence, unit),
        confidence=estimate.CONFIDENCE,
        interval=evidence.centre.kind,
        unit=unit.name,
        log=unit.log,
        null=unit.back(0.0),
        boundary=float(case.boundary),
        missing=dict(worst.lost),
        censored=sample.censored,
        p=option.p,
        p_holm=p_holm,
        p_zero=evidence.two_sided,
        n_needed=None if clear else _needed(case, family),
        of=option.of,
        pairs=case.pairs,
        at=case.at,
        same_rate=case.same_rate,
        runs=list(dict.fromkeys(run for one in case.samples for run in one.runs)),
        points={s: unit.back(float(x)) for s, x in zip(sample.seeds, sample.at, strict=True)},
    )


def _needed(case: Case, family: int) -> int | None:
    """Seeds for the answer to which the estimate points, if this claim met the strictest level of
    the correction; as many more as are lost or say nothing."""
    sample = case.leading.evidence.sample
    if sample.n < 2:
        return None
    least = min(option.needed(ALPHA / family) for option in case.options)
    enough = max(least * sample.planned / sample.n, sample.planned + 1)
    return math.ceil(enough) if math.isfinite(enough) else None


def _reasons(case: Case, worst: Sample, clear: bool) -> list[str]:
    option = case.leading
    sample, parts = option.evidence.sample, []
    if worst.lost_share > LOST:
        why = ", ".join(f"{count} {status}" for status, count in worst.lost.items())
        parts.append(
            f"{sum(worst.lost.values())} of {worst.planned} seeds are lost ({why}), more than a "
            "tenth"
        )
    if sample.n < 2:
        parts.append(f"{words.count(sample.n, 'seed')} can be compared, 2 are the least")
    else:
        parts.append(_tested(option, case.unit, clear))
    if sample.censored:
        parts.append(f"of {words.count(sample.censored, 'value')} only a bound is known")
    if sample.aside:
        parts.append(f"set aside: {words.count(sample.aside, 'pair')} with bounds on both sides")
    return parts


def _tested(option: Option, unit: Unit, clear: bool) -> str:
    if clear:
        return f"it lies {option.region}"
    if option.shown and option.p <= ALPHA:
        return f"it lies {option.region} by itself, but not with Holm's correction"
    centre = option.evidence.centre
    open_ = [bound for bound in option.bounds if centre.low <= bound <= centre.high]
    if open_:
        return f"the interval includes {unit.listed(open_)}"
    return f"the interval lies {option.region}, but the exact test does not agree"


# ---- Single arms


def cells(values: pd.DataFrame, measure: Measure, by: Sequence[str] | None = None) -> pd.DataFrame:
    """The seeds of every arm and point, each for itself.

    Args:
      values: of `measures.values`.
      by: the columns that make a cell; arm and all axes by default.

    Returns:
      A row per cell: those columns, n (seeds with a value), mean, low, high (of the 95 % interval),
      kind, censored (how many of the n are only bounds), and how many have no value: diverged,
      lost. ``kind`` says what it is: "t" a mean (geometric if `Measure.geometric`), "wilson" the
      share of ones of a binary measure, "kaplan-meier" the median, where some values are only
      bounds ("median": between order statistics, where they are bounds on either side). For a
      measure of single runs also the share of those that ended by diverging, with its Wilson
      interval: diverged_share, diverged_low, diverged_high; they may have a value as well.
    """
    by = list(by or (name for name in values.columns if name not in ("seed", *ROW)))
    groups = values.groupby(by, sort=False, dropna=False)
    rows = [dict(zip(by, key, strict=True)) | _cell(group, measure) for key, group in groups]
    return pd.DataFrame(rows, columns=None if rows else [*by, *CELL])


CELL = ("n", "mean", "low", "high", "kind", "censored", "lost")


def _cell(rows: pd.DataFrame, measure: Measure) -> dict[str, Any]:
    kept = rows[rows["value"].notna()]
    centre = _centre(kept["value"].to_numpy(float), kept["censored"].to_numpy(int), measure)
    diverged = int((rows["status"] == "diverged").sum())
    without = rows.loc[rows["value"].isna(), "status"]
    found = dict(zip(CELL[1:5], centre, strict=True))
    found |= {"n": len(kept), "censored": int(kept["censored"].ne(0).sum())}
    found |= {"lost": int((without != "diverged").sum())}
    if measure.collapses is None:
        share = estimate.wilson(diverged, diverged + int((rows["status"] == "done").sum()))
        ends = zip(("share", "low", "high"), share[:3], strict=True)
        found |= {"diverged": diverged} | {f"diverged_{name}": end for name, end in ends}
    return found


def _centre(at: np.ndarray, censored: np.ndarray, measure: Measure) -> Interval:
    if censored.any():
        return estimate.censored_median(at, censored)
    if measure.binary and len(at):
        share = estimate.wilson(int(np.count_nonzero(at)), len(at))
        return share.through(lambda end: measure.factor * end)
    if measure.geometric and (at > 0).all():
        return estimate.t_interval(np.log(at)).through(np.exp)
    return estimate.t_interval(at)
