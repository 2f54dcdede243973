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
from bnresearch.claims import Claim, Measure
from bnresearch.measures import Tuning
from bnresearch.verdict import estimate
from bnresearch.verdict.cases import Case, Source, case_of, shown
from bnresearch.verdict.estimate import Interval
from bnresearch.verdict.options import INCONCLUSIVE, Option
from bnresearch.verdict.samples import Sample, Table
from bnresearch.verdict.wording import Names

ALPHA = 0.05
LOST = 0.1  # a larger share of lost seeds leaves a claim inconclusive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a claim. Effects as they are written: treatment - control, or their ratio.

    Attributes:
      claim: as JSON; text: in words.
      verdict: "supported", "refuted" or "inconclusive"; reason: one sentence.
      estimate, low, high, confidence: the effect and its interval (open ends are infinite; NaN
        where there is none); interval: which kind, "t", "bca", "percentile" or "median".
      unit: of these ("times" for a ratio); log: whether they are ratios.
      null: no effect, or the expected value; boundary: the smallest effect of interest, margin or
        tolerance, as in the claim.
      n: the pairs (or seeds) it rests on; missing: {why: seeds lost}; censored: values that are
        only bounds.
      p: of the claim; p_holm: corrected; p_zero: two-sided against null, for itself.
      n_needed: seeds that would have decided it with 80 % probability, if effect and spread are as
        estimated; None if it is decided or no number would.
      at: {side: value of the tuned axis}; same_rate: the effect at each value of that axis.
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
    return f"{v['verdict'].capitalize()}: {v['text']}. {effect_of(v)}; {v['reason']}."


def effect_of(v: Mapping[str, Any]) -> str:
    """Estimate and interval in words."""
    if not isinstance(v["estimate"], int | float) or math.isnan(v["estimate"]):
        return f"No effect can be worked out (n = {v['n']})"
    plain = v["log"] or v["claim"]["kind"] == "value" or v["claim"].get("expected") is not None
    show = words.number if plain else words.signed
    unit = f" {v['unit']}".rstrip()
    interval = f"95 % interval {show(v['low'])} to {show(v['high'])}, "
    kind = "median effect" if v["interval"] == "median" else "effect"
    return (
        f"The {kind} is {show(v['estimate'])}{unit} ({interval if v['n'] > 1 else ''}n = {v['n']})"
    )


# ---- Deciding


def decide(
    written: Sequence[Claim],
    values: Mapping[str, pd.DataFrame],
    tuning: Tuning | None,
    measures: Mapping[str, Measure],
    labels: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """The verdicts on the claims of a study, in their order.

    Args:
      written: all claims of the study: the correction is over them.
      values: a frame per measure (`measures.values`).
      tuning: which value of the tuned axis each arm takes, if one is tuned.
      labels: what the arms are called; their names by default.

    Raises:
      UserError: a claim is about a place that the values do not have.
    """
    tables = {name: Table(frame) for name, frame in values.items()}
    names = Names(labels or {}, tuning.axis if tuning else "")
    cases = [
        case_of(claim, Source(claim, tables[claim.measure], measures[claim.measure], tuning), names)
        for claim in written
    ]
    adjusted = estimate.holm([case.leading.p for case in cases])
    return [_verdict(case, p, len(cases)) for case, p in zip(cases, adjusted, strict=True)]


def _verdict(case: Case, p_holm: float, family: int) -> Verdict:
    option, unit = case.leading, case.unit
    evidence = option.evidence
    sample = evidence.sample
    worst = max(case.samples, key=lambda one: one.lost_share)
    clear = sample.n > 1 and option.shown and p_holm <= ALPHA
    needed = None if clear else _needed(case, family)
    return Verdict(
        claim=claims.to_json(case.claim),
        text=case.text,
        verdict=option.verdict if clear and worst.lost_share <= LOST else INCONCLUSIVE,
        reason="; ".join(_reasons(case, p_holm, family, worst, clear, needed)),
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
        n_needed=needed,
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


def _reasons(
    case: Case, p_holm: float, family: int, worst: Sample, clear: bool, needed: int | None
) -> list[str]:
    option = case.leading
    sample, parts = option.evidence.sample, []
    if worst.lost_share > LOST:
        why = ", ".join(f"{count} {status}" for status, count in worst.lost.items())
        parts.append(
            f"{sum(worst.lost.values())} of {worst.planned} seeds are lost ({why}), more than a "
            "tenth"
        )
    if sample.n < 2:
        parts.append(f"{sample.n} seeds can be compared, 2 are the least")
    else:
        parts.append(_tested(option, p_holm, family, clear))
    if sample.censored:
        parts.append(f"{sample.censored} of the values are only bounds")
    if sample.aside:
        parts.append(f"{sample.aside} pairs are bounds on both sides and say nothing")
    if needed is not None:
        parts.append(f"{needed} seeds would decide it with a probability of 80 %")
    return parts


def _tested(option: Option, p_holm: float, family: int, clear: bool) -> str:
    test = f"p {words.chance(option.p)}"
    if family > 1:
        test += f", {words.chance(p_holm).removeprefix('= ')} corrected for {family} claims"
    if clear:
        return f"it lies {option.region} ({test})"
    if option.shown and option.p <= ALPHA:
        return f"it lies {option.region} by itself, but not with the correction ({test})"
    if option.shown:
        return f"the interval lies {option.region}, but the exact test does not agree ({test})"
    return f"nothing is shown; the nearest answer is that it lies {option.region} ({test})"


# ---- Single arms


def cells(values: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """The seeds of every arm and point, each for itself.

    Returns:
      A row per arm and point: those columns, n (seeds with a value), mean, low, high (of the 95 %
      interval), kind, censored, and how many have no value: diverged, lost. ``kind`` says what it
      is: "t" a mean (geometric for a measure that compares by ratios), "wilson" the share of ones
      of a 0/1 measure, "median" the median, where some values are only bounds. Also the share of
      runs that diverged, with its Wilson interval: diverged_share, diverged_low, diverged_high.
    """
    table = Table(values)
    made = []
    for (arm, *point), rows in table.rows.items():
        kept = [row for row in rows.values() if not row.lost]
        diverged = sum(row.lost == "diverged" for row in rows.values())
        centre = _cell(np.array([row[:3] for row in kept]), measure)
        share = estimate.wilson(diverged, len(rows))
        made.append(
            {"arm": arm, **dict(zip(table.axes, point, strict=True)), "n": len(kept)}
            | {"mean": centre.estimate, "low": centre.low, "high": centre.high}
            | {"kind": centre.kind, "censored": sum(row.censored for row in kept)}
            | {"diverged": diverged, "lost": len(rows) - len(kept) - diverged}
            | {"diverged_share": share.estimate}
            | {"diverged_low": share.low, "diverged_high": share.high}
        )
    return pd.DataFrame(made)


def _cell(rows: np.ndarray, measure: Measure) -> Interval:
    """``rows``: [n, 3] of the number, and what it is at least and at most."""
    at, low, high = rows.T if len(rows) else np.empty((3, 0))
    if (low != high).any():
        return estimate.median_interval(at, low, high)
    if len(at) and set(at / measure.factor) <= {0.0, 1.0}:
        share = estimate.wilson(int(np.count_nonzero(at)), len(at))
        return share.through(lambda end: measure.factor * end)
    if measure.log and (at > 0).all():
        return estimate.t_interval(np.log(at)).through(np.exp)
    return estimate.t_interval(at)
