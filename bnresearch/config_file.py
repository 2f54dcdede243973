"""Config files: Python with a ``get_config()``, read before ml_collections wraps the reasons."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from bnresearch.errors import UserError


def read(flag_value: str) -> ConfigDict:
    """What ``get_config()`` of a config file returns, for ``FILE`` or ``FILE:argument``.

    Raises:
      UserError: no such file, not Python, whatever it raises, or no ConfigDict comes of it.
    """
    name, *argument = flag_value.split(":", 1)
    path = Path(name)
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise UserError(
            f"config file {name!r} does not exist; see `python -m bnresearch list configs`"
        )
    spec = importlib.util.spec_from_file_location("bnresearch_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {name!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    with _failures_explained(name):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(
            f"config file {name!r} has no get_config() function; it must return a ConfigDict, "
            "see configs/digits_mlp.py"
        )
    with _failures_explained(name):
        config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() in config file {name!r} returns a {type(config).__name__}, not a "
            "ConfigDict; start from bnresearch.config.default_config() and return it"
        )
    return config


@contextmanager
def _failures_explained(name: str) -> Iterator[None]:
    """Whatever a config file raises, also by leaving the program, as a UserError of one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"config file {name!r} fails: {type(error).__name__}: {reason}; correct the file"
        ) from error
