"""The answers that a claim can get, each with the evidence for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bnresearch.claims import ALPHA
from bnresearch.verdict.evidence import Evidence
from bnresearch.verdict.wording import Unit

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"


class Option(NamedTuple):
    """An answer that a claim can get.

    Attributes:
      verdict: which; p: the evidence for it; shown: whether the interval agrees.
      region: where the effect is then, in words.
      evidence: what it rests on.
      needed: seeds that would be enough, of the level.
      bounds: of the regions between which the claim decides.
      of: the pair that the effect is of, where a claim has several.
    """

    verdict: str
    p: float
    shown: bool
    region: str
    evidence: Evidence
    needed: Callable[[float], float]
    bounds: Sequence[float] = ()
    of: str = ""


def leading(options: Sequence[Option]) -> Option:
    """The answer that a claim gets if any: of those that interval and test show by themselves, else
    of all, the one with the least p."""
    return min(options, key=lambda option: (not (option.shown and option.p <= ALPHA), option.p))


def above(evidence: Evidence, verdict: str, bound: float, unit: Unit) -> Option:
    """The centre is above ``bound``: the 95 % interval lies there; p is twice the one-sided one."""
    return Option(
        verdict,
        min(1.0, 2 * evidence.test(bound).above),
        evidence.centre.low > bound,
        unit.above(bound),
        evidence,
        lambda level: evidence.needed_above(bound, level / 2),
    )


def below(evidence: Evidence, verdict: str, bound: float, unit: Unit) -> Option:
    """As `above`, for the other side."""
    return Option(
        verdict,
        min(1.0, 2 * evidence.test(bound).below),
        evidence.centre.high < bound,
        unit.below(bound),
        evidence,
        lambda level: evidence.needed_below(bound, level / 2),
    )


def inside(evidence: Evidence, verdict: str, margin: float, unit: Unit) -> Option:
    """The centre is within ±margin, by two one-sided tests."""
    return Option(
        verdict,
        evidence.inside(margin),
        True,
        unit.within(margin),
        evidence,
        lambda level: evidence.needed_inside(margin, level),
    )


def directed(evidence: Evidence, sesoi: float, unit: Unit) -> list[Option]:
    """For a claim that the effect is above sesoi. The first supports it."""
    options = [above(evidence, SUPPORTED, sesoi, unit), below(evidence, REFUTED, 0.0, unit)]
    if sesoi > 0:
        options.append(inside(evidence, REFUTED, sesoi, unit))
    return [option._replace(bounds=sorted({0.0, sesoi})) for option in options]


def confined(evidence: Evidence, margin: float, unit: Unit) -> list[Option]:
    """For a claim that the effect is within ±margin."""
    options = [
        inside(evidence, SUPPORTED, margin, unit),
        above(evidence, REFUTED, margin, unit),
        below(evidence, REFUTED, -margin, unit),
    ]
    return [option._replace(bounds=(-margin, margin)) for option in options]


def ordered(parts: Mapping[str, list[Option]]) -> list[Option]:
    """For a claim that every neighbouring effect is above sesoi; ``parts``: of each, `directed`.

    Supported only if all are: their largest p needs no correction (intersection-union). Refuted if
    one is: the smallest p times how many there are (Bonferroni).
    """
    k = len(parts)
    named = {name: [option._replace(of=name) for option in part] for name, part in parts.items()}
    firsts = [part[0] for part in named.values()]
    weakest = max(firsts, key=lambda one: (not one.shown, one.p, -one.evidence.centre.low))
    worst = leading([option for part in named.values() for option in part[1:]])
    return [
        weakest._replace(
            p=max(option.p for option in firsts),
            shown=all(option.shown for option in firsts),
            needed=lambda level: max(option.needed(level) for option in firsts),
        ),
        worst._replace(p=min(1.0, k * worst.p), needed=lambda level: worst.needed(level / k)),
    ]
