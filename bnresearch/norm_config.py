"""The part ``norm`` of a config: which kinds, with which options, at which sites."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bnresearch import parallel
from bnresearch.conventions import CONVENTIONS, complete, has_conventions
from bnresearch.errors import UserError, lookup
from bnresearch.initialise import INITS
from bnresearch.norm import NORMS, kind_of
from bnresearch.reparam import REPARAMS
from bnresearch.sites import Choice, Rule, make_choice, make_rules, written

FEATURES = 64  # of an imagined site, to see which parameters a kind has

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

    A preset that is given wins over the config's conventions, too. ``traced`` holds values by
    dotted key that stand for those of the config.
    """
    node = {name: value for name, value in config.norm[kind].items() if value is not None}
    if "preset" in given:
        node = {k: v for k, v in node.items() if k not in (*CONVENTIONS, "momentum")}
    if "decay" in given or "momentum" in given:
        node = {k: v for k, v in node.items() if k not in ("decay", "momentum")}
    completed = complete(kind, NORMS[kind].options, {**node, **given})
    for name in completed.keys() - given.keys():
        completed[name] = traced.get(f"norm.{kind}.{name}", completed[name])
    return completed


def choice(config: ConfigDict, traced: Mapping[str, Any] = NOTHING) -> Choice:
    """What stands at sites that no rule names."""
    return make_choice(config.norm.kind, options(config, config.norm.kind, NOTHING, traced))


def rules(config: ConfigDict) -> tuple[Rule, ...]:
    """The rules of ``norm.rules``, with all options. Their numbers are constants of the program."""
    return make_rules(
        config.norm.rules, config.norm.kind, lambda kind, given: options(config, kind, given)
    )


def choices(config: ConfigDict) -> list[Choice]:
    """Everything that stands at some site: the default, and what the rules say."""
    return [choice(config), *(rule.choice for rule in rules(config))]


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The part ``norm`` of a resolved config: the kind with all its options, rules with all of
    theirs, and nothing of other kinds."""
    kind = config.norm.kind
    return dict(
        kind=kind,
        scope=config.norm.scope,
        weights=config.norm.weights,
        rules=[written(rule) for rule in rules(config)],
        **{kind: options(config, kind)},
    )


def validate(config: ConfigDict) -> None:
    """Raises a UserError for everything that can be seen to be wrong without a model."""
    kind_of(config.norm.kind)
    parallel.parse_scope(config.norm.scope)
    for text in config.norm.rules:
        if not isinstance(text, str):
            raise UserError(f"norm.rules: {text!r} is no text; write it in quotes")
    _check_weights(config)
    _check_initialiser(config)
    _check_accumulation(config)


def notes(config: ConfigDict, steps: int) -> list[str]:
    """What a user should know of this config in a training of so many steps, in sentences."""
    found = []
    for kind, given in choices(config):
        if given.get("warm_up", 0) >= steps:
            found.append(
                f"norm.{kind}.warm_up={given['warm_up']} is not shorter than this training of "
                f"{steps} steps: {kind} stays in its warm-up to the end"
            )
        side = [name for name in NORMS[kind].context if name in ("domain", "condition", "time")]
        if side:
            found.append(
                f"norm kind {kind} takes {side[0]!r} from the batches of the data; where they have "
                f"none it does the same for all examples"
            )
        if zero_gamma(config) and "scale" not in NORMS[kind].params(FEATURES, given):
            found.append(f"zero_gamma does nothing at sites of kind {kind}, which has no scale")
    return found


def zero_gamma(config: ConfigDict) -> bool:
    """Whether the model of a config asks for scales that start at 0."""
    return bool(config.model[config.model.name].get("zero_gamma", False))


def _reparametrisations(config: ConfigDict) -> set[str]:
    """The reparametrisations that this config puts on kernels, where "none" stands for none."""
    if config.norm.weights != "auto":
        return {config.norm.weights}
    return {NORMS[kind].weights for kind, _ in choices(config)}


def _check_weights(config: ConfigDict) -> None:
    given = config.norm.weights
    lookup({**REPARAMS, "none": None, "auto": None}, given, "norm.weights")
    for kind, _ in choices(config):
        own = NORMS[kind].weights
        # A kind with statistics is something without its weights, too.
        if given not in ("auto", own) and own != "none" and NORMS[kind].state is None:
            raise UserError(
                f"norm.weights={given} takes from norm kind {kind} what it consists of ({own}); "
                "leave norm.weights at auto, or choose another kind"
            )


def _check_initialiser(config: ConfigDict) -> None:
    entry = lookup(INITS, config.init.name, "init.name")
    useless = _reparametrisations(config) - {"none", "centred"}
    if entry.fit is not None and useless:
        raise UserError(
            f"init.name={config.init.name} sets the length of every kernel, but "
            f"{', '.join(sorted(useless))} takes lengths away; choose init.name=orthogonal|he, or "
            "another norm"
        )
    if entry.check is not None:
        entry.check(config.model[config.model.name], {kind for kind, _ in choices(config)})


def _check_accumulation(config: ConfigDict) -> None:
    if config.train.accumulate == 1 or config.train.accumulate_statistics != "batch":
        return
    stateful = [kind for kind, _ in choices(config) if NORMS[kind].state is not None]
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
