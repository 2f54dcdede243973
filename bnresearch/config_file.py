"""Files that are Python: configs with a ``get_config()``, studies with a ``get_study()``.

They are run here, before ml_collections could wrap the reasons for which they fail. Imports no jax.
"""

import ast
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from bnresearch.errors import UserError


def read(flag_value: str) -> ConfigDict:
    """What ``get_config()`` of a config file returns, for ``FILE`` or ``FILE:argument``.

    Raises:
      UserError: no such file, not Python, whatever it raises, or no ConfigDict comes of it.
    """
    name, *argument = flag_value.split(":", 1)
    module = execute(name, "config file", "list configs")
    if not callable(getattr(module, "get_config", None)):
        raise UserError(
            f"config file {name!r} has no get_config() function; it must return a ConfigDict, "
            "see configs/digits_mlp.py"
        )
    with failures_explained(name, "config file"):
        config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() in config file {name!r} returns a {type(config).__name__}, not a "
            "ConfigDict; start from bnresearch.config.default_config() and return it"
        )
    return config


def execute(name: str, what: str, listing: str) -> ModuleType:
    """Runs the Python file ``name``, a ``what``, and returns its module. It may import helpers that
    lie beside it.

    Raises:
      UserError: no such file (``listing`` is the verb that shows those there are), not Python, or
        whatever it raises.
    """
    path = Path(name)
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise UserError(f"{what} {name!r} does not exist; see `python -m bnresearch {listing}`")
    spec = importlib.util.spec_from_file_location(f"bnresearch_{what.replace(' ', '_')}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what} {name!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of their fields' types
    beside = os.path.dirname(os.path.abspath(path))
    if beside not in sys.path:
        sys.path.append(beside)  # for helpers; last, so that they hide nothing installed
    with failures_explained(name, what):
        spec.loader.exec_module(module)
    return module


@contextmanager
def failures_explained(name: str, what: str) -> Iterator[None]:
    """Whatever a file raises, also by leaving the program, as a UserError of one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(
            f"{what} {name!r} fails{_line(name, error)}: {reason}; correct the file"
        ) from error


def _line(name: str, error: BaseException) -> str:
    """Where in the file it was; a SyntaxError says so itself."""
    path = os.path.abspath(name)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == path]
    return f" in line {lines[-1]}" if lines else ""


def docstring(path: str | Path) -> str:
    """The docstring of a Python file, which is not run.

    Raises:
      OSError, SyntaxError, ValueError: it cannot be read, or is not Python.
    """
    # Bytes: with whatever encoding they declare.
    return ast.get_docstring(ast.parse(Path(path).read_bytes(), str(path))) or ""


def listing(folder: str) -> list[tuple[str, str]]:
    """The Python files of a folder such as "configs/studies", each with the first line of its
    docstring: that of the working directory, else the one that came with the source."""
    beside = Path(__file__).resolve().parent.parent / folder
    found = Path(folder) if Path(folder).is_dir() else beside
    return [(os.path.relpath(path), _title(path)) for path in sorted(found.glob("*.py"))]


def _title(path: Path) -> str:
    try:
        return docstring(path).split("\n")[0]
    except (OSError, SyntaxError, ValueError) as error:
        return f"(cannot be read: {' '.join(str(error).split())})"
