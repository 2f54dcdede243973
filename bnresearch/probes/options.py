"""The config's ``probes``: what looks inside a run, how often, and at which sites."""

import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from bnresearch.errors import UserError, lookup
from bnresearch.optim import parse_duration
from bnresearch.probes import PROBES

EVERYWHERE = ".*"


def defaults() -> dict[str, Any]:
    """The config's ``probes`` with its defaults."""
    return dict(
        names=(),  # of PROBES; none: nothing is looked at
        every="1ep",  # and at the first and the last step
        sites=EVERYWHERE,  # a regular expression that matches whole paths
        batches=10,  # for probes that average over several
    )


def validate(config: ConfigDict) -> None:
    """Raise a UserError for what can be seen to be wrong without a model."""
    for name in config.names:
        lookup(PROBES, name, "probe in probes.names")
    if len(set(config.names)) < len(config.names):
        raise UserError(f"probes.names={config.names} names a probe twice; name each once")
    parse_duration("probes.every", config.every, positive=True)
    if config.batches < 1:
        raise UserError(f"probes.batches={config.batches} must be at least 1")
    try:
        re.compile(config.sites)
    except re.error as error:
        raise UserError(
            f"probes.sites={config.sites!r} is no regular expression ({error}); write one that "
            "matches the whole path of a site, such as 'stage1/.*'"
        ) from None


def selected(config: ConfigDict, paths: Iterable[str]) -> list[str]:
    """Those paths that ``probes.sites`` matches."""
    matches = re.compile(config.sites).fullmatch
    return [path for path in paths if matches(path)]


def check_sites(config: ConfigDict, paths: Iterable[str]) -> None:
    """Raise a UserError if ``probes.sites`` matches none of the sites of the model."""
    paths = list(paths)
    if not selected(config, paths):
        raise UserError(
            f"probes.sites={config.sites!r} matches no site; the sites are: "
            f"{', '.join(paths) or 'none'}"
        )
