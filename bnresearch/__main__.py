"""The command line: ``python -m bnresearch VERB --flags``."""

import gc
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from bnresearch import arguments, processes
from bnresearch.errors import Diverged, RunsFailed, Stopped, UserError, lookup
from bnresearch.imports import without_gc
from bnresearch.listing import LISTS, summary

USAGE = """\
bnresearch: a laboratory for Batch Normalization in JAX.

  python -m bnresearch train --config=configs/digits_mlp.py --workdir=runs/a
  python -m bnresearch train --config=configs/digits_mlp.py --workdir=runs/b --config.norm.kind=none
  python -m bnresearch eval  --workdir=runs/a --stats=batch
  python -m bnresearch study configs/studies/bn_vs_none.py --scale=quick --out=runs/bn_vs_none
  python -m bnresearch report runs/bn_vs_none
  python -m bnresearch list  norms
  python -m bnresearch doctor --workdir=runs/a

{verbs}

`python -m bnresearch VERB --help` explains a verb.
Exit codes: 0 done; 2 the input was wrong; 3 the run diverged; 75 stopped after saving, the same
command goes on; 1 anything else."""


def _train_flags(argv: list[str], values: flags.FlagValues) -> None:
    from bnresearch import config

    config.define_flag(argv, values)
    flags.DEFINE_string("workdir", None, "run folder: made, or continued", flag_values=values)
    _progress_flag(values)


def _progress_flag(values: flags.FlagValues) -> None:
    help_text = "how to show that it moves; auto: a bar on a terminal, lines elsewhere"
    kinds = ["auto", "bar", "lines", "off"]
    flags.DEFINE_enum("progress", "auto", kinds, help_text, flag_values=values)


def _train(values: flags.FlagValues, argv: list[str]) -> None:
    """Train a config to its end; the same command again goes on where it was.

    Any value of the config can be overridden: --config.optim.learning_rate=0.3. All keys and their
    defaults are in bnresearch/config.py; `--config=FILE --help` prints those of a file."""
    with without_gc():
        from bnresearch import distributed, processes, train
    from bnresearch.rundir import finite

    for flag in ("config", "workdir"):
        _require(values, flag)
    command = ["python", "-m", "bnresearch", *sys.argv[1:]]
    plan = processes.plan(values.config.distributed)
    if plan and not processes.is_child():  # the config file says so
        raise SystemExit(supervised(values.workdir, plan.coordinator))
    with distributed.joined(plan):
        result = train.run(values.config, values.workdir, show=values.progress, command=command)
        if distributed.is_first():
            print(json.dumps(finite({"workdir": values.workdir, **result})))


def _eval_flags(argv: list[str], values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "the folder of a training run", flag_values=values)
    help_text = (
        "statistics that normalise: running (of training), batch (of the evaluation batch), "
        "precise, blend:N, examples[:w], corrected or tent[:LR]; see `list stats` and "
        "docs/evaluation.md; by default running, and precise for averaged weights"
    )
    flags.DEFINE_string("stats", None, help_text, flag_values=values)
    flags.DEFINE_string("split", "test", "train, validation or test", flag_values=values)
    help_text = "training batches over which statistics are taken anew"
    flags.DEFINE_integer("batches", None, f"{help_text} (100)", flag_values=values)
    help_text = "with --stats=precise: a folder to be made, the run with these statistics"
    flags.DEFINE_string("save", None, help_text, flag_values=values)
    help_text = "raw, or averaged: the average that the run kept (train.average)"
    flags.DEFINE_string("weights", "raw", help_text, flag_values=values)
    _progress_flag(values)


def _eval(values: flags.FlagValues, argv: list[str]) -> None:
    """Evaluate the newest checkpoint of a run; prints one JSON object and changes nothing there."""
    from bnresearch import evaluate, train
    from bnresearch.rundir import finite

    _require(values, "workdir")
    train.enable_compilation_cache()
    found = evaluate.evaluate_run(
        values.workdir,
        values.stats,
        values.split,
        batches=values.batches,
        save=values.save,
        weights=values.weights,
        show=values.progress,
    )
    print(json.dumps(finite(found)))


def _study_flags(argv: list[str], values: flags.FlagValues) -> None:
    from bnresearch.sweep.slurm import options

    flags.DEFINE_string("scale", None, "smoke, quick or full", flag_values=values)
    flags.DEFINE_string("out", None, "the study's folder: made, or continued", flag_values=values)
    help_text = (
        "inline: in this process; local: worker processes; population: runs that differ in numbers "
        "only as one vmapped program; slurm: jobs of a cluster; auto: what suits"
    )
    flags.DEFINE_string("launcher", "auto", help_text, flag_values=values)
    help_text = "worker processes (population: runs at a time); 0: one per GPU or core"
    flags.DEFINE_integer("launcher.workers", 0, help_text, 0, flag_values=values)
    help_text = "runs per arm and point, instead of the scale's"
    flags.DEFINE_integer("seeds", None, help_text, 1, flag_values=values)
    flags.DEFINE_boolean("yes", False, "do not ask before a great many runs", flag_values=values)
    options.define_flags(values)
    _progress_flag(values)


def _study(values: flags.FlagValues, argv: list[str]) -> None:
    """Run a study: what is missing of its runs, then verdicts and a page; the same command goes on.

    Runs that diverge are results; runs that fail are named, left out, and tried again by the next
    call. `list studies` shows those that come with the source; docs/own_study.md writes one."""
    from bnresearch import sweep
    from bnresearch.sweep.slurm import cancel, options

    if len(argv) != 1:
        raise UserError(f"study takes one study file, {len(argv)} given; see --help")
    for flag in ("scale", "out"):
        _require(values, flag)
    workers, cluster = values["launcher.workers"].value or 0, options.from_flags(values)
    sweep.check_options(values.launcher, workers, values.progress, cluster)
    if values.cancel:
        print(f"jobs cancelled: {cancel(os.path.join(values.out, 'runs'))}")
        return
    with sweep.started_early(values.launcher, workers):
        with without_gc():
            from bnresearch import lab, study
            from bnresearch.verdict import table
        runs = study.count(study.load(argv[0]), values.scale, values.seeds)
        outcome = lab.conduct(
            argv[0],
            values.scale,
            values.out,
            launcher=values.launcher,
            workers=workers,
            seeds=values.seeds,
            show=values.progress,
            confirmed=values.yes or _agreed(runs),
            command=["python", "-m", "bnresearch", *sys.argv[1:]],
            cluster=cluster,
        )
    table.show(outcome.definition)
    print(f"\nPage: {outcome.page}")
    if lost := {**outcome.damaged, **outcome.counts.failed}:
        raise RunsFailed(lost)


def _agreed(runs: int) -> bool:
    """Whether somebody at a terminal wants that many runs; elsewhere nobody can be asked."""
    from bnresearch.study.planning import LIMIT

    if runs <= LIMIT or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{runs:,} runs: go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _report_flags(argv: list[str], values: flags.FlagValues) -> None:
    help_text = "where the site goes (default: report/ in the folder)"
    flags.DEFINE_string("out", None, help_text, flag_values=values)


def _report(values: flags.FlagValues, argv: list[str]) -> None:
    """Write the site of a study folder, or of all studies below it, from their files alone."""
    from pathlib import Path

    from bnresearch import records, report

    if len(argv) != 1:
        raise UserError(f"report takes one folder, {len(argv)} given; see --help")
    results = [records.load_study(folder) for folder in records.find_studies(argv[0])]
    out = Path(values.out or Path(argv[0]) / "report")
    print(f"Page: {report.write(results, out)}")


def _doctor_flags(argv: list[str], values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "the folder of a training run", flag_values=values)
    help_text = "where the page goes (default: doctor/ in the workdir)"
    flags.DEFINE_string("out", None, help_text, flag_values=values)
    help_text = "training batches to look at"
    flags.DEFINE_integer("batches", 50, help_text, flag_values=values)
    help_text = "on which evaluation is looked at: train, validation or test"
    flags.DEFINE_string("split", "validation", help_text, flag_values=values)
    help_text = "over what statistics were meant to be taken: global or device; as the config says"
    flags.DEFINE_string("scope", "", help_text, flag_values=values)


def _doctor(values: flags.FlagValues, argv: list[str]) -> None:
    """Say what is wrong with the norms of a run, with evidence, and what mends it; and a page.

    The newest checkpoint is looked at and nothing of the run is changed. For a flax model of your
    own: bnresearch.doctor.diagnose(model, variables, batches)."""
    from pathlib import Path

    from bnresearch import train
    from bnresearch.doctor.run import diagnose_run

    _require(values, "workdir")
    train.enable_compilation_cache()
    report = diagnose_run(
        values.workdir, batches=values.batches, split=values.split, scope=values.scope
    )
    print(report.table())
    print(f"Page: {report.write(values.out or Path(values.workdir) / 'doctor')}")


def _no_flags(argv: list[str], values: flags.FlagValues) -> None:
    """The verb takes no flags."""


def _list(values: flags.FlagValues, argv: list[str]) -> None:
    """List what can be chosen in a config: norms | presets | weights | models | inits | datasets |
    tasks | optimizers | schedules | averages | probes | modes | stats | configs | studies."""
    what, *others = argv or [""]
    make = lookup(LISTS, what, "thing to list")
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; list takes one thing at a time")
    rows = make() or [("(none)", "")]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}s}  {text}".rstrip())


class Verb(NamedTuple):
    """A verb: how it is called, its flags, and what it does with them and the other arguments."""

    usage: str
    define: Callable[[list[str], flags.FlagValues], None]
    run: Callable[[flags.FlagValues, list[str]], None]
    positional: bool = False  # whether it takes any


VERBS = {
    "train": Verb("train --config=FILE --workdir=DIR [--config.a.b=v ...]", _train_flags, _train),
    "eval": Verb(
        "eval --workdir=DIR [--stats=running] [--split=test] [--weights=raw] [--save=DIR]",
        _eval_flags,
        _eval,
    ),
    "study": Verb(
        "study FILE --scale=smoke|quick|full --out=DIR [--launcher=local] [--launcher.workers=N]",
        _study_flags,
        _study,
        positional=True,
    ),
    "doctor": Verb("doctor --workdir=DIR [--out=DIR] [--split=validation]", _doctor_flags, _doctor),
    "report": Verb("report DIR [--out=DIR]", _report_flags, _report, positional=True),
    "list": Verb(f"list {' | '.join(LISTS)}", _no_flags, _list, positional=True),
}


def _require(values: flags.FlagValues, flag: str) -> None:
    if not values[flag].value:
        raise UserError(f"--{flag} is missing; see --help")


def _overview() -> str:
    lines = [f"  {name:8s} {summary(verb.run)}" for name, verb in VERBS.items()]
    return USAGE.format(verbs="\n".join(lines))


def _help(verb: Verb, values: flags.FlagValues) -> str:
    lines = [f"python -m bnresearch {verb.usage}", "", inspect.getdoc(verb.run) or "", ""]
    for name in sorted(values):
        if not name.startswith("config."):
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
    given, others = ["bnresearch", *rest], list[str]()
    values = flags.FlagValues()
    verb.define(given, values)
    if "config" in values:
        from bnresearch.config import parse_flags

        parse_flags(given, values)
    else:
        others = arguments.parse(given, values)
    if wants_help:
        print(_help(verb, values))
        return
    if not verb.positional:
        arguments.refuse_others(others)
    verb.run(values, others)


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
    except RunsFailed as error:
        print(error, file=sys.stderr)
        return 1
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


def main_with_others() -> None:
    """The same for one of several processes, which end together."""
    from bnresearch.distributed import leave

    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def supervised(workdir: str, coordinator: str = "") -> int:
    """This very command as the child of a supervisor; its exit code."""
    from bnresearch.supervise import supervise

    flags = [f"--config.distributed.coordinator={coordinator}"] if coordinator else []
    child = [sys.executable, *sys.orig_argv[1:]]
    return supervise(child, workdir, [*sys.argv, *flags])


def main_or_supervisor() -> int:
    """`main`, in a child of its own where it may be one of several processes."""
    workdir = processes.flag(sys.argv, "workdir")
    if sys.argv[1:2] == ["train"] and workdir and processes.given(sys.argv):
        return supervised(workdir)
    return main()


if __name__ == "__main__":
    if processes.is_child():
        main_with_others()
    code = main_or_supervisor()
    gc.freeze()  # or python looks through all that jax has made before it ends: a third of a second
    sys.exit(code)
