"""The part ``norm`` of a config: which kinds, with which options, at which sites."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bnresearch import parallel
from bnresearch.conventions import CONVENTIONS, complete, has_conventions
from bnresearch.errors import UserError, lookup
from bnresearch.norm import NORMS
from bnresearch.reparam import REPARAMS
from bnresearch.sites import Choice, Rule, make_rules, parse

NOTHING: Mapping[str, Any] = MappingProxyType({})


def defaults() -> dict[str, Any]:
    """The config's ``norm`` with its defaults."""
    return dict(
        kind="batch",
        scope="global",  # global | device | group:N devices | ghost:N examples
        rules=(),  # "PATTERN -> KIND option=value" on site paths, see sites.py
        weights="auto",  # reparametrisation of linear maps; auto: that of the kind
        **{name: _options(kind.options) for name, kind in NORMS.items()},
    )


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The config of one kind. What a preset decides is left open (None) until somebody decides."""
    if not has_conventions(options):
        return dict(options)
    opened = {name: placeholder(type(options[name])) for name in CONVENTIONS}
    return {"preset": "bnresearch", "momentum": placeholder(float), **options, **opened}


def typical() -> dict[str, Any]:
    """A value of the right type for every key that may be left open, by dotted key."""
    values: dict[str, Any] = {}
    for name, kind in NORMS.items():
        if has_conventions(kind.options):
            values |= {f"norm.{name}.{key}": kind.options[key] for key in CONVENTIONS}
            values[f"norm.{name}.momentum"] = 0.9
    return values


def numbers() -> tuple[str, ...]:
    """The keys of all options that are floats: they enter the compiled step as data."""
    return tuple(
        f"norm.{kind}.{name}"
        for kind, entry in NORMS.items()
        for name, value in entry.options.items()
        if isinstance(value, float)
    )


def options(
    config: ConfigDict,
    kind: str,
    given: Mapping[str, Any] = NOTHING,
    traced: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """All options of a kind: those ``given`` win over the config's, these over the preset.

    ``traced`` holds values by dotted key that stand for those of the config.
    """
    node = {name: value for name, value in config.norm[kind].items() if value is not None}
    completed = complete(kind, NORMS[kind].options, {**node, **given})
    for name in completed.keys() - given.keys():
        completed[name] = traced.get(f"norm.{kind}.{name}", completed[name])
    return completed


def choice(config: ConfigDict, traced: Mapping[str, Any] = NOTHING) -> Choice:
    """What stands at sites that no rule names."""
    return Choice(config.norm.kind, options(config, config.norm.kind, NOTHING, traced))


def rules(config: ConfigDict, traced: Mapping[str, Any] = NOTHING) -> tuple[Rule, ...]:
    """The rules of ``norm.rules``, with all options."""

    def options_of(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return options(config, kind, given, traced)

    return make_rules(config.norm.rules, config.norm.kind, options_of)


def kinds(config: ConfigDict) -> list[str]:
    """The kinds that this config has, each once: ``norm.kind``, and those of its rules."""
    named = [parse(text).kind for text in config.norm.rules]
    return list(dict.fromkeys([config.norm.kind, *filter(None, named)]))


def validate(config: ConfigDict) -> None:
    """Raises a UserError for everything that can be seen to be wrong without a model."""
    lookup(NORMS, config.norm.kind, "norm.kind")
    lookup({**REPARAMS, "none": None, "auto": None}, config.norm.weights, "norm.weights")
    parallel.parse_scope(config.norm.scope)
    for text in config.norm.rules:
        if not isinstance(text, str):
            raise UserError(f"norm.rules: {text!r} is no text; write it in quotes")
    choices = [choice(config), *(rule.choice for rule in rules(config))]
    for kind, given in choices:
        _check_options(kind, given)
    _check_accumulation(config, choices)


def _check_options(kind: str, given: Mapping[str, Any]) -> None:
    if given.get("correction", 0) not in (0, 1):
        raise UserError(
            f"unknown norm.{kind}.correction {given['correction']!r}; choose one of: 0, 1 (a "
            "biased or an unbiased running variance)"
        )
    if not 0 <= given.get("decay", 0) <= 1:
        raise UserError(f"norm.{kind}.decay={given['decay']} is out of range; give one in [0, 1]")


def _check_accumulation(config: ConfigDict, choices: list[Choice]) -> None:
    if config.train.accumulate == 1 or config.train.accumulate_statistics != "batch":
        return
    stateful = [kind for kind, _ in choices if NORMS[kind].state is not None]
    if stateful and config.norm.scope != "global":
        raise UserError(
            f"train.accumulate_statistics=batch takes the statistics of the whole batch, but "
            f"norm.scope={config.norm.scope} asks for smaller sets; choose norm.scope=global, or "
            "accumulate_statistics=microbatch"
        )
    for kind in stateful:
        if kind != "batch":
            raise UserError(
                f"train.accumulate_statistics=batch is exact for norm.kind=batch only, not for "
                f"{kind}; choose accumulate_statistics=microbatch"
            )
