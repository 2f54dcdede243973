"""Defaults, choices, validation, resolved form and hash of an experiment's config.

Options that belong to one choice live under that choice's name (``model.resnet.depth``,
``optim.sgd.momentum``, ``norm.group.groups``); the resolved form keeps only the chosen ones, so
that the options of a choice that was not made never make two runs different.
"""

import difflib
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bnresearch import (
    arguments,
    average,
    config_file,
    data,
    initialise,
    models,
    native,
    norm_config,
    optim,
    parallel,
    processes,
    tasks,
)
from bnresearch.conventions import momentum_message
from bnresearch.errors import UserError, lookup
from bnresearch.norm import NORMS
from bnresearch.probes import options as probing
from bnresearch.rundir import config_hash as config_hash

# Part of every hash: raised when the meaning of a key or of a default changes.
SCHEMA = 4

STATISTICS = ("microbatch", "batch")
DTYPES = ("float32", "bfloat16")
NEVER = "never"  # what train.checkpoint_every may be instead of a duration

# Tables whose choice owns a sub-dict of options: path of the choice -> (table, key of the choice).
CHOICES: dict[str, tuple[Mapping[str, Any], str]] = {
    "model": (models.MODELS, "name"),
    "norm": (NORMS, "kind"),
    "init": (initialise.INITS, "name"),
    "optim": (optim.OPTIMIZERS, "name"),
    "optim.schedule": (optim.SCHEDULES, "name"),
    "train.average": (average.AVERAGES, "name"),
    "task": (tasks.TASKS, "name"),
}
OPTIONS = {**CHOICES, "data": (data.DATASETS, "name")}  # no choice: any TFDS name will do, too


def default_config() -> ConfigDict:
    """Every key there is, with its default: digits, an MLP with BatchNorm, SGD with momentum."""
    return pickle.loads(_pickled_defaults())


def _pickled_defaults() -> bytes:
    """Making a ConfigDict of every key takes five times as long as reading a pickled one. The
    tables may have changed since: kinds of norms are added by those who use this."""
    defaults = _defaults()
    if not _PICKLED or _PICKLED[0] != defaults:
        _PICKLED[:] = defaults, pickle.dumps(ConfigDict(defaults))
    return _PICKLED[1]


_PICKLED: list[Any] = []  # what _defaults() was, and its ConfigDict


def _defaults() -> dict[str, Any]:
    return dict(
        seed=0,
        dtype="float32",  # compute dtype; parameters and statistics are always float32
        data=data.DEFAULTS,
        task=dict(name="classification", **tasks.options()),
        model=dict(name="mlp", **{name: models.options(name) for name in models.MODELS}),
        norm=norm_config.defaults(),
        init=dict(name="he"),  # of the kernels: he | orthogonal | lsuv | matched
        optim=optim.defaults(),
        train=dict(
            duration="10ep",  # "10ep" epochs or "5000st" optimizer steps
            accumulate=1,  # microbatches per step
            accumulate_statistics="microbatch",  # of the norms: each microbatch | whole batch
            log_every="1ep",
            eval_every="1ep",
            checkpoint_every="1ep",  # or never: saved only where the run is stopped
            keep=2,  # checkpoints
            average=average.defaults(),
        ),
        probes=probing.defaults(),
        # devices, 0: all there are; kernels, on CPUs: auto | xla | native, see bnresearch.native
        parallel=dict(mode="jit", devices=0, kernels="auto"),
        distributed=processes.DEFAULTS,  # how several processes of one run find each other
    )


def _known() -> dict[str, Any]:
    """Every key with a value of its type: its default, where that is not left open."""
    return flatten(_defaults()) | norm_config.typical()


def load(path: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of the file at ``path``, with overrides such as ``"optim.learning_rate=0.1"``.

    Raises:
      UserError: no such file, no get_config in it, an unknown key, a value of the wrong type.
    """
    overrides = list(overrides)
    for item in overrides:
        if not re.match(r"\w[\w.]*=", item):
            raise UserError(
                f"override {item!r} is not of the form key=value; write it without dashes, such "
                "as 'optim.learning_rate=0.1'"
            )
    argv = ["config", f"--config={path}", *(f"--config.{item}" for item in overrides)]
    values = flags.FlagValues()
    define_flag(argv, values)
    return parse_flags(argv, values).config


def define_flag(argv: list[str], values: flags.FlagValues) -> None:
    """Define ``--config=FILE`` with ``--config.a.b=v`` overrides taken from ``argv``."""
    arguments.refuse_flagfile(argv)
    help_text = "config file with a get_config() function; --config.a.b=v overrides a value"
    config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values=values, sys_argv=argv, lock_config=True
    )


def parse_flags(argv: list[str], values: flags.FlagValues) -> flags.FlagValues:
    """Parse ``argv``, turning every complaint of absl and ml_collections into a UserError."""
    arguments.refuse_flagfile(argv)
    given = _config_flag(argv)
    if given is not None:
        _check_keys(flatten(config_file.read(given)), _known())
        _check_overrides(argv)
    try:
        others = arguments.parse(argv, values, _explain_flag)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the config cannot be read: {reason}") from None
    arguments.refuse_others(others)
    return values


def _config_flag(argv: list[str]) -> str | None:
    """The value of the last ``--config=FILE`` or ``--config FILE``."""
    value = None
    for item, following in zip(argv, [*argv[1:], None], strict=True):
        match = re.fullmatch(r"--?config(?:=(.*))?", item, re.DOTALL)
        if match:
            value = following if match[1] is None else match[1]
    return value


def _explain_flag(message: str) -> str:
    """absl's complaint about a value, with the kind of value that the config key takes."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    default = _known().get(match[1]) if match else None
    if match is None or default is None:
        return arguments.see_help(message)
    return (
        f"{match[1]}={match[2]!r} is no {type(default).__name__}; give a value such as {default!r}"
    )


def _check_overrides(argv: list[str]) -> None:
    """Refuse unknown keys and whole groups of keys, for which ml_collections has no words."""
    known = sorted(_known())
    for item in argv:
        match = re.match(r"--?config\.([\w.]+)(?:=(.*))?", item, re.DOTALL)
        if match is None or match[1] in known:
            continue
        key, value = match.groups()
        group = [name for name in known if name.startswith(f"{key}.")]
        kind = re.fullmatch(r"norm\.(\w+)\.momentum", key)
        if kind and f"norm.{kind[1]}.decay" in known:
            raise UserError(momentum_message(kind[1], value, has_presets=False))
        if not group:
            raise unknown_key(key, known)
        table, choice = CHOICES.get(key, ({}, ""))
        meant = f"{key}.{choice}={value}" if value in table else f"one of its keys, as {group[0]}"
        raise UserError(f"{key} is a group of keys and takes no value; did you mean {meant}?")


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones: ``{"a": {"b": 1}} -> {"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):  # to ask for Mapping takes most of the time of a whole config
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def validate(config: ConfigDict) -> None:
    """Raise a UserError for everything that can be seen to be wrong without data or devices."""
    known, flat = _known(), flatten(config)
    _check_keys(flat, known)
    for key, value in flat.items():
        if value is not None:  # what a preset decides
            _check_value(key, value, known[key])
    norm_config.validate(config)
    for path, (table, key) in CHOICES.items():
        lookup(table, _at(config, path)[key], f"{path}.{key}")
    _check_choice("dtype", config.dtype, DTYPES)
    _check_choice("train.accumulate_statistics", config.train.accumulate_statistics, STATISTICS)
    lookup(parallel.MODES, config.parallel.mode, "parallel.mode")
    lookup(native.MODES, config.parallel.kernels, "parallel.kernels")
    if config.seed >= 2**31:
        raise UserError(f"seed={config.seed} is too large; give a number below 2**31")
    for key in ("train.accumulate", "train.keep", "data.batch_size"):
        if flat[key] < 1:
            raise UserError(f"{key}={flat[key]} must be at least 1")
    periods = ("duration", "log_every", "eval_every", "checkpoint_every")
    for key in periods[:-1] if config.train.checkpoint_every == NEVER else periods:
        optim.parse_duration(f"train.{key}", config.train[key], positive=True)
    average.validate(config.train.average)
    probing.validate(config.probes)
    optim.validate(config.optim)
    models.check_arm(config.model.name, config.norm.kind, config.norm.weights, config.init.name)


def _check_keys(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise unknown_key(key, known)
    for key in known:
        if key not in given:
            raise UserError(
                f"config key {key!r} is missing; start from bnresearch.config.default_config()"
            )


def unknown_key(key: str, known: Iterable[str]) -> UserError:
    """An error that suggests the nearest keys of the same group (for one of no group, those of this
    name in any), or lists what the group has."""
    known, group = list(known), key.rpartition(".")[0]
    while group and not any(name.startswith(f"{group}.") for name in known):
        group = group.rpartition(".")[0]
    prefix = f"{group}." if group else ""
    # Without what all members begin with: "train.steps" is like "train.keep" in nothing else.
    members = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    close = difflib.get_close_matches(key.removeprefix(prefix), sorted(members), n=3, cutoff=0.75)
    near = [prefix + name for name in close]
    if near := near or [name for name in known if name.endswith(f".{key}")]:
        return UserError(f"unknown config key {key!r}; did you mean {' or '.join(near[:3])}?")
    heads = {prefix + name.partition(".")[0] for name in members}
    return UserError(f"unknown config key {key!r}; known: {', '.join(sorted(heads))}")


def _check_value(key: str, value: Any, default: Any) -> None:
    _check_type(key, value, default)
    if isinstance(value, tuple) and default:
        for item in value:
            _check_value(f"an item of {key}", item, default[0])
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number")
        if isinstance(value, float) and abs(value) > LARGEST:
            raise UserError(f"{key}={value} is too large; give a number up to {LARGEST}")
        if value < 0 and key not in ("data.workers", "distributed.process"):
            raise UserError(f"{key}={value} is negative; give 0 or more")
    limit = UNIT_INTERVAL.get(key)
    if limit is not None and not (value < 1 or (limit and value == 1)):
        raise UserError(
            f"{key}={value} is out of range; give a number in [0, 1{']' if limit else ')'}"
        )


def _check_type(key: str, value: Any, default: Any) -> None:
    if type(value) is not type(default):
        raise UserError(
            f"{key}={value!r} is of type {type(value).__name__}, not {type(default).__name__}; "
            f"give a value such as {default!r}"
        )


LARGEST = 3.4e38  # float32, in which all is computed, ends soon after

# Numbers that must lie between 0 and 1; True where 1 itself is allowed.
UNIT_INTERVAL = {
    "optim.sgd.momentum": False,
    "optim.lars.momentum": False,
    "optim.adamw.b1": False,
    "optim.adamw.b2": False,
    "optim.lamb.b1": False,
    "optim.lamb.b2": False,
    "optim.schedule.cosine.final": True,
    "optim.schedule.step.factor": True,
    "task.classification.label_smoothing": False,
    "train.average.ema.decay": False,
    "train.average.swa.start": False,
}


def _check_choice(key: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        raise UserError(f"unknown {key} {value!r}; choose one of: {', '.join(map(str, known))}")


def _at(config: Any, path: str) -> Any:
    """The node at a dotted path; the config itself at ""."""
    for key in path.split(".") if path else ():
        config = config[key]
    return config


def chosen(config: ConfigDict, path: str) -> dict[str, Any]:
    """The options of the choice made at ``path``: ``chosen(config, "model")``."""
    node = _at(config, path)
    return dict(node[node[CHOICES[path][1]]].items())


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values, with the options of the choices made and no others."""
    chosen = {"schema": SCHEMA, **_resolved(config, ""), "norm": norm_config.resolved(config)}
    del chosen["distributed"]  # where a run was started is not what it is
    return json.loads(json.dumps(chosen))


def _resolved(node: ConfigDict, path: str) -> dict[str, Any]:
    table, key = OPTIONS.get(path, ({}, ""))
    others = table.keys() - {node[key]} if key else ()
    return {
        name: _resolved(value, f"{path}.{name}".lstrip(".")) if hasattr(value, "items") else value
        for name, value in node.items()
        if name not in others
    }


def unresolve(resolved: Mapping[str, Any]) -> ConfigDict:
    """The config of a run folder's ``config.json``: the inverse of ``resolve``.

    Raises:
      UserError: written under another schema number, with keys that are not those of its choices,
        or with a value of another type.
    """
    if resolved.get("schema") != SCHEMA:
        raise UserError(
            f"this run was written with config schema {resolved.get('schema')}, the program has "
            f"{SCHEMA}; use the version of bnresearch that status.json of the run names"
        )
    config, known, given = default_config(), _known(), flatten(resolved)
    for key, value in given.items():
        if key in known:
            value = tuple(value) if isinstance(value, list) else value
            _check_type(key, value, known[key])
            _at(config, key.rpartition(".")[0])[key.rpartition(".")[-1]] = value
        elif key != "schema":
            raise unknown_key(key, known)
    for key in flatten(resolve(config)):
        if key not in given:
            raise UserError(f"config.json lacks {key!r}; was it changed by hand? Put the key back")
    return config


# Numbers that enter the compiled step as data: a sweep over them compiles once. Where zero means
# "leave this out", the step still compiles twice: with and without.
NUMBERS = (
    "seed",
    *norm_config.numbers(),
    *(f"optim.{key}" for key in ("learning_rate", "weight_decay", "clip_norm", "agc")),
    "optim.sgd.momentum",
    *(f"optim.adamw.{key}" for key in ("b1", "b2", "eps")),
    "optim.lars.momentum",
    "optim.lars.trust_coefficient",
    *(f"optim.lamb.{key}" for key in ("b1", "b2", "eps")),
    "task.classification.label_smoothing",
    "train.average.ema.decay",
)

# What only the loop looks at.
LOOP = (
    *(f"train.{key}_every" for key in ("log", "eval", "checkpoint")),
    *("train.keep", "train.average.batches"),
    *(f"probes.{key}" for key in probing.defaults()),
)


def numbers(resolved: Mapping[str, Any]) -> dict[str, float]:
    """The values of NUMBERS that this config has, by dotted key."""
    flat = flatten(resolved)
    return {key: flat[key] for key in NUMBERS if key in flat}


def program_key(resolved: Mapping[str, Any]) -> str:
    """What decides the compiled program: the config without its numbers, as JSON."""
    flat = flatten(resolved)
    flat |= {key: bool(flat[key]) for key in numbers(resolved)}
    for key in ("seed", *LOOP):
        del flat[key]
    return json.dumps(flat, sort_keys=True)
