"""The command line: ``python -m bnresearch VERB --flags``."""

import ast
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from bnresearch.errors import Diverged, Stopped, UserError, lookup

USAGE = """\
bnresearch: a laboratory for Batch Normalization in JAX.

  python -m bnresearch train --config=configs/digits_mlp.py --workdir=runs/a
  python -m bnresearch train --config=configs/digits_mlp.py --workdir=runs/b --config.norm.kind=none
  python -m bnresearch eval  --workdir=runs/a --stats=batch
  python -m bnresearch list  norms

{verbs}

`python -m bnresearch VERB --help` explains a verb.
Exit codes: 0 done; 2 the input was wrong; 3 the run diverged; 75 stopped after saving, the same
command goes on; 1 anything else."""


def _train_flags(argv: list[str], values: flags.FlagValues) -> None:
    from bnresearch import config

    config.define_flag(argv, values)
    flags.DEFINE_string("workdir", None, "run folder: made, or continued", flag_values=values)
    help_text = "how to show that it moves; auto: a bar on a terminal, lines elsewhere"
    kinds = ["auto", "bar", "lines", "off"]
    flags.DEFINE_enum("progress", "auto", kinds, help_text, flag_values=values)


def _train(values: flags.FlagValues, argv: list[str]) -> None:
    """Train a config to its end; the same command again goes on where it was.

    Any value of the config can be overridden: --config.optim.learning_rate=0.3. All keys and their
    defaults are in bnresearch/config.py; `--config=FILE --help` prints those of a file."""
    from bnresearch import train
    from bnresearch.rundir import finite

    for flag in ("config", "workdir"):
        _require(values, flag)
    command = ["python", "-m", "bnresearch", *sys.argv[1:]]
    result = train.run(values.config, values.workdir, show=values.progress, command=command)
    print(json.dumps(finite({"workdir": values.workdir, **result})))


def _eval_flags(argv: list[str], values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "the folder of a training run", flag_values=values)
    help_text = (
        "statistics that normalise: running (of training) or batch (of the evaluation batch)"
    )
    flags.DEFINE_string("stats", "running", help_text, flag_values=values)
    flags.DEFINE_string("split", "test", "train, validation or test", flag_values=values)


def _eval(values: flags.FlagValues, argv: list[str]) -> None:
    """Evaluate the newest checkpoint of a run; prints one JSON object and changes nothing."""
    from bnresearch import evaluate, train
    from bnresearch.rundir import finite

    _require(values, "workdir")
    train.enable_compilation_cache()
    print(json.dumps(finite(evaluate.evaluate_run(values.workdir, values.stats, values.split))))


def _no_flags(argv: list[str], values: flags.FlagValues) -> None:
    """The verb takes no flags."""


def _list(values: flags.FlagValues, argv: list[str]) -> None:
    """List what can be chosen in a config: norms | presets | weights | models | inits | datasets |
    tasks | optimizers | schedules | modes | stats | configs."""
    what, *others = argv or [""]
    make = lookup(LISTS, what, "thing to list")
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; list takes one thing at a time")
    rows = make()
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:{width}s}  {summary}")


def _summary(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].split("\n")[0]


def _norms() -> list[tuple[str, str]]:
    from bnresearch.handbook import listing

    return listing()


def _weights() -> list[tuple[str, str]]:
    from bnresearch.reparam import REPARAMS

    return [(name, _summary(function)) for name, function in REPARAMS.items()]


def _presets() -> list[tuple[str, str]]:
    from bnresearch.conventions import PRESETS

    return [
        (name, ", ".join(f"{key}={value}" for key, value in preset.options.items()))
        for name, preset in PRESETS.items()
    ]


def _inits() -> list[tuple[str, str]]:
    from bnresearch.initialise import INITS

    return [(name, _summary(entry.fit or entry.draw)) for name, entry in INITS.items()]


def _models() -> list[tuple[str, str]]:
    from bnresearch.models import MODELS

    return [(name, _summary(entry.module)) for name, entry in MODELS.items()]


def _datasets() -> list[tuple[str, str]]:
    from bnresearch.data import describe

    return describe()


def _tasks() -> list[tuple[str, str]]:
    from bnresearch.tasks import TASKS

    return [(name, _summary(task)) for name, task in TASKS.items()]


def _optimizers() -> list[tuple[str, str]]:
    from bnresearch.optim import OPTIMIZERS

    return [(name, f"options {dict(entry.options)}") for name, entry in OPTIMIZERS.items()]


def _schedules() -> list[tuple[str, str]]:
    from bnresearch.optim import SCHEDULES

    return [(name, f"options {dict(entry.options)}") for name, entry in SCHEDULES.items()]


def _modes() -> list[tuple[str, str]]:
    from bnresearch.parallel import MODES

    return [(name, _summary(layout)) for name, layout in MODES.items()]


def _stats() -> list[tuple[str, str]]:
    from bnresearch.evaluate import STATS

    return [(name, _summary(make)) for name, make in STATS.items()]


def _configs() -> list[tuple[str, str]]:
    beside = Path(__file__).resolve().parent.parent / "configs"
    folder = Path("configs") if Path("configs").is_dir() else beside
    rows = []
    for path in sorted(folder.glob("*.py")):
        rows.append((os.path.relpath(path), _first_doc_line(path)))
    return rows


def _first_doc_line(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes(), path.name)  # bytes: with whatever encoding they declare
    except (OSError, SyntaxError, ValueError) as error:
        return f"(cannot be read: {' '.join(str(error).split())})"
    return (ast.get_docstring(tree) or "").split("\n")[0]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "norms": _norms,
    "presets": _presets,
    "weights": _weights,
    "models": _models,
    "inits": _inits,
    "datasets": _datasets,
    "tasks": _tasks,
    "optimizers": _optimizers,
    "schedules": _schedules,
    "modes": _modes,
    "stats": _stats,
    "configs": _configs,
}


class Verb(NamedTuple):
    """A verb: how it is called, its flags, and what it does with them and the other arguments."""

    usage: str
    define: Callable[[list[str], flags.FlagValues], None]
    run: Callable[[flags.FlagValues, list[str]], None]
    positional: bool = False


VERBS = {
    "train": Verb("train --config=FILE --workdir=DIR [--config.a.b=v ...]", _train_flags, _train),
    "eval": Verb("eval --workdir=DIR [--stats=running] [--split=test]", _eval_flags, _eval),
    "list": Verb(f"list {' | '.join(LISTS)}", _no_flags, _list, positional=True),
}


def _require(values: flags.FlagValues, flag: str) -> None:
    if not values[flag].value:
        raise UserError(f"--{flag} is missing; see --help")


def _overview() -> str:
    lines = [f"  {name:8s} {_summary(verb.run)}" for name, verb in VERBS.items()]
    return USAGE.format(verbs="\n".join(lines))


def _help(verb: Verb, values: flags.FlagValues) -> str:
    lines = [f"python -m bnresearch {verb.usage}", "", inspect.getdoc(verb.run) or "", ""]
    for name in sorted(values):
        if "." not in name:
            lines.append(f"  --{name:10s} {values[name].help}  (default: {values[name].default})")
    if "config" in values and values["config"].value is not None:
        from bnresearch.config import flatten

        lines += ["", "Keys of this config, after the overrides given:"]
        lines += [f"  --config.{key}={value}" for key, value in flatten(values.config).items()]
    return "\n".join(lines)


def run(argv: list[str]) -> None:
    """Carry out ``argv`` (without the program's name)."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return
    verb = lookup(VERBS, argv[0], "verb")
    wants_help = any(item in ("--help", "-h", "--helpfull") for item in argv)
    rest = [item for item in argv[1:] if item not in ("--help", "-h", "--helpfull")]
    positional = [item for item in rest if not item.startswith("-")] if verb.positional else []
    given = ["bnresearch", *(item for item in rest if item not in positional)]
    values = flags.FlagValues()
    verb.define(given, values)
    from bnresearch.config import parse_flags

    parse_flags(given, values)
    if wants_help:
        print(_help(verb, values))
    else:
        verb.run(values, positional)


def main() -> int:
    """Run the command line and turn what happened into an exit code."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(error, file=sys.stderr)
        return 3
    except Stopped as error:
        print(error, file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 75
    except BrokenPipeError:
        # Somebody reads the first lines only (| head); python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
