"""What the runs of a study are made from: a base config, or a function of the study file.

Both turn overrides into what a run folder's config.json holds, or say why they cannot.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from bnresearch import average, config_file, norm_config
from bnresearch import config as configs
from bnresearch.errors import UserError, lookup
from bnresearch.metrics import OF_TRAINING
from bnresearch.parallel import parse_scope
from bnresearch.tasks import TASKS

FUNCTION_SCHEMA = 1


class Settled(NamedTuple):
    """What the runs of one arm at one point have in common.

    Attributes:
      resolved: the content of config.json, but for "seed", which each run sets to its own.
      program: runs with equal ones share a compilation (`config.program_key`); "" for functions.
    """

    resolved: dict[str, Any]
    program: str


class Subject(Protocol):
    """What a study varies."""

    def check_keys(self, overrides: Mapping[str, Any]) -> None:
        """UserError for a key that nothing here has."""

    def settle(self, overrides: Mapping[str, Any]) -> Settled:
        """The runs' config with these overrides; UserError for values that cannot be."""

    def ignored(self, key: str, settled: Settled) -> str:
        """Why ``key`` makes no difference there, or "" if it could."""

    def metrics(self, settled: Settled, split: str) -> Sequence[str] | None:
        """What such runs record of a split; None where nobody knows before they run."""


class Training:
    """Training runs, from the config file at ``base``."""

    def __init__(self, base: str | Path):
        given = config_file.read(str(base))
        configs.validate(given)
        # Takes values of any type: validate has better words about them.
        self._config = ConfigDict(given.to_dict(), type_safe=False)
        self._open = norm_config.typical()  # may be None: left to a preset
        self._known = configs.flatten(configs.default_config()) | self._open

    def check_keys(self, overrides: Mapping[str, Any]) -> None:
        for key in overrides:
            if key == "seed":
                raise UserError(
                    "'seed' is what pairs the arms of a study and cannot be overridden; to give an "
                    "arm other seeds than the rest, use Arm(first_seed=...)"
                )
            group = [name for name in self._known if name.startswith(f"{key}.")]
            if group:
                raise UserError(
                    f"{key!r} is a group of keys and takes no value; give one of its keys, such as "
                    f"{group[0]!r}"
                )
            if key not in self._known:
                raise configs.unknown_key(key, self._known)

    def settle(self, overrides: Mapping[str, Any]) -> Settled:
        config = self._config.copy_and_resolve_references()
        for key, value in overrides.items():
            self._set(config, key, value)
        configs.validate(config)
        if parse_scope(config.norm.scope).devices is not None and not config.parallel.devices:
            raise UserError(
                f"norm.scope={config.norm.scope} makes the number of devices part of the config: "
                "override 'parallel.devices' with a number, not 0"
            )
        resolved = configs.resolve(config)
        return Settled(resolved, configs.program_key(resolved))

    def _set(self, config: ConfigDict, key: str, value: Any) -> None:
        if value is None and key not in self._open:
            raise UserError(f"{key}=None is no value; give one such as {self._known[key]!r}")
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[last] = _like(self._known[key], value)

    def ignored(self, key: str, settled: Settled) -> str:
        for path, (table, choice) in configs.CHOICES.items():
            option = key.removeprefix(f"{path}.").split(".")[0]
            if key.startswith(f"{path}.") and option in table:
                node = settled.resolved
                for group in path.split("."):
                    node = node[group]
                if node[choice] != option:
                    return f"{path}.{choice} is {node[choice]!r}"
        return ""

    def metrics(self, settled: Settled, split: str) -> Sequence[str] | None:
        if split == "train":
            return OF_TRAINING
        known = TASKS[settled.resolved["task"]["name"]].METRICS
        averages = settled.resolved["train"]["average"]["name"] != "none"
        return (*known, *average.metrics(known).values()) if averages else known


def _like(typical: Any, value: Any) -> Any:
    """``value`` as the type of ``typical`` where nothing is lost: 1 is a float, [8, 8] a tuple."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(typical, float) and type(value) is int:
        return float(value)
    if type(typical) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return tuple(value) if isinstance(typical, tuple) and isinstance(value, list) else value


def identity(function: Callable[..., Any]) -> str:
    """sha256 of the text of a function: by which runs know what was measured."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


class Measuring:
    """Calls of ``function(seed=..., **settings)``, which trains nothing and returns named numbers.

    A run's identity is the text of the function, its arguments and the seed: what the function
    calls is not part of it.
    """

    def __init__(self, function: Callable[..., Mapping[str, float]]):
        try:
            self._identity = identity(function)
            self._name = function.__name__
            self._signature = inspect.signature(function)
        except (OSError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"Study(function={function!r}) must be a function written with def in a file"
            ) from None
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        if "seed" not in self._signature.parameters or kinds & {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        }:
            raise UserError(
                f"the function {self._name}{self._signature} of a study is called with keywords: "
                "it must name `seed` and every setting, without * and **"
            )

    def check_keys(self, overrides: Mapping[str, Any]) -> None:
        settings = {name: name for name in self._signature.parameters if name != "seed"}
        for key in overrides:
            lookup(settings, key, f"argument of {self._name}()")

    def settle(self, overrides: Mapping[str, Any]) -> Settled:
        try:
            bound = self._signature.bind(seed=0, **overrides)
        except TypeError as error:
            raise UserError(
                f"{self._name}{self._signature}: {error}; give it in overrides, an arm or an axis"
            ) from None
        bound.apply_defaults()
        arguments = {key: value for key, value in bound.arguments.items() if key != "seed"}
        try:
            arguments = json.loads(json.dumps(arguments, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the arguments of {self._name}() cannot be written as JSON: {error}"
            ) from None
        resolved = {
            "schema": FUNCTION_SCHEMA,
            "function": self._name,
            "source": self._identity,
            "arguments": arguments,
            "seed": 0,
        }
        return Settled(resolved, "")

    def ignored(self, key: str, settled: Settled) -> str:
        return ""

    def metrics(self, settled: Settled, split: str) -> Sequence[str] | None:
        return None
