"""Command-line flags of absl, with every complaint as a UserError. Imports no jax."""

import re
from collections.abc import Callable

from absl import flags

from bnresearch.errors import UserError


def see_help(complaint: str) -> str:
    return f"{complaint}; see --help"


def parse(
    argv: list[str], values: flags.FlagValues, explain: Callable[[str], str] = see_help
) -> list[str]:
    """Parse ``argv`` (with the program's name) into ``values``; returns what are no flags.

    ``explain`` rewords absl's complaint about the value of a flag.
    """
    refuse_flagfile(argv)
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}; see --help") from None
    except flags.Error as error:
        raise UserError(explain(str(error))) from None


def refuse_flagfile(argv: list[str]) -> None:
    """absl would read flags from files, past all checks of what was given."""
    if any(re.match(r"--?flagfile(=|$)", item) for item in argv):
        raise UserError("--flagfile is not read here; write its flags on the command line")


def refuse_others(others: list[str]) -> None:
    """For commands that take flags only."""
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; options start with --; see --help")
