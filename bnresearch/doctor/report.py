"""What the doctor found, as a table, as data and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnresearch import provenance
from bnresearch.doctor.examine import Examination
from bnresearch.doctor.finding import SEVERITIES, Finding, few


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
      findings: the serious ones first.
      examined: the measurements they rest on.
      about: where the model came from, for the page.
    """

    findings: Sequence[Finding]
    examined: Examination
    about: Mapping[str, Any]

    @property
    def serious(self) -> list[Finding]:
        return [found for found in self.findings if found.severity == "serious"]

    def counts(self) -> dict[str, int]:
        """How many findings of each severity."""
        found = [finding.severity for finding in self.findings]
        return {severity: found.count(severity) for severity in SEVERITIES}

    def table(self) -> str:
        """The findings as text."""
        examined = self.examined
        head = (
            f"{len(examined.sites)} norms, {len(examined.keepers)} of them with running "
            f"statistics; {examined.batches} training batches of {examined.size} examples"
        )
        if examined.left_out:
            head += f" ({examined.left_out} of another size left out)"
        if examined.unseen:
            head += (
                f"\nNot looked at: {few(examined.unseen)}. Only training calls them, or nn.scan or "
                "nn.vmap hides them: call the layers one by one in a Python loop, and let "
                "evaluation call them"
            )
        if not self.findings:
            return f"{head}\n\nNothing found.\n"
        parts = [head]
        for found in self.findings:
            where = few(list(found.sites)) or "the whole model"
            parts.append(
                f"{found.severity.upper()}  {found.title}  [{found.check}]\n"
                f"  where     {where}\n  evidence  {found.evidence}\n  mend      {found.mend}"
            )
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Findings, and the measurements of every site, as plain values."""
        examined = self.examined
        gap, error = examined.gap()
        sites = {
            site.path: {
                "norm": site.made.name,
                "decay": site.made.decay,
                "values": site.values if site.look else None,
                **({"apart": site.apart()} if site.running is not None and site.look else {}),
                **({"blame": examined.blame[site.path]} if site.path in examined.blame else {}),
            }
            for site in examined.sites.values()
        }
        return {
            "schema": 1,
            **self.about,
            "batches": examined.batches,
            "batch_size": examined.size,
            "loss": {name: float(values.mean()) for name, values in examined.losses.items()},
            "gap": {"estimate": gap, "standard_error": error},
            "sites": sites,
            "findings": [
                {**found._asdict(), "sites": list(found.sites)} for found in self.findings
            ],
            "versions": provenance.versions(),
        }

    def write(self, folder: str | Path) -> Path:
        """Writes the page, its pictures and ``doctor.json`` to a folder (made, or replaced) and
        returns the page; it opens offline."""
        from bnresearch.doctor.page import write

        return write(self, Path(folder))
