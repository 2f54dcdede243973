"""What a check finds, and in which words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SEVERITIES = ("serious", "warning", "note")


class Finding(NamedTuple):
    """Something that is wrong, or may be.

    Attributes:
      check: the name of the check that found it, a key of doctor.CHECKS.
      severity: "serious": results are wrong, or training is not what it is taken for; "warning": it
        may cost accuracy, or does so under some conditions; "note": needless, or explained by
        another finding.
      title: what is wrong, in one line.
      evidence: what was seen, in sentences with numbers.
      sites: the paths of the sites concerned; () for the whole model.
      numbers: the same numbers for programs, {name: number or {site: number}}.
      mend: the line or the command that mends it.
    """

    check: str
    severity: str
    title: str
    evidence: str
    sites: Sequence[str] = ()
    numbers: Mapping[str, Any] = {}
    mend: str = ""


Check = Callable[[Any], Iterable[Finding]]  # of an Examination


def few(sites: Sequence[str], most: int = 4) -> str:
    """The first of some sites, in words."""
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return ", ".join(sites[:most]) + more
