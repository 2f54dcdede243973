"""What is asked of SLURM for each run of a study."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from bnresearch.errors import UserError

# What is set here, by submitit or by how runs are followed: as options they would break both.
TAKEN = {
    "array": "--launcher.parallel",
    "cpus-per-task": "--launcher.cores",
    "dependency": "",
    "error": "",
    "export": "",
    "gpus-per-node": "--launcher.gpus",
    "job-name": "",
    "no-requeue": "",
    "nodes": "--launcher.nodes",
    "ntasks": "--launcher.nodes",
    "ntasks-per-node": "--launcher.nodes",
    "open-mode": "",
    "output": "",
    "partition": "--launcher.partition",
    "requeue": "",
    "signal": "",
    "time": "--launcher.minutes",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What each run gets, and how many run at a time.

    Attributes:
      partition: "": the default one.
      minutes: time limit; a run that reaches it saves, is queued again and goes on.
      cores: per node; 0: what the partition gives, usually one.
      gpus: per node.
      nodes: over which one run is spread, a process on each.
      parallel: how many jobs may run at a time; 0: as many as SLURM lets.
      further: more options of sbatch, as "name=value" without the dashes.
    """

    partition: str = ""
    minutes: int = 60
    cores: int = 0
    gpus: int = 0
    nodes: int = 1
    parallel: int = 0
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        least = {"minutes": 1, "cores": 0, "gpus": 0, "nodes": 1, "parallel": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"launcher.{name}={getattr(self, name)}: give {bound} or more")
        self.named()

    def named(self) -> dict[str, Any]:
        """``further`` as name -> value; UserError for what is none of it, or is set elsewhere."""
        found: dict[str, Any] = {}
        for text in self.further:
            name, equals, value = text.strip().lstrip("-").partition("=")
            name = name.replace("_", "-")
            if not name or (equals and not value):
                raise UserError(
                    f"launcher.option={text!r} is no option of sbatch: give name=value, such as "
                    "account=physics, or a name alone, such as exclusive"
                )
            if name in TAKEN:
                instead = f": give {TAKEN[name]}" if TAKEN[name] else " and cannot be changed"
                raise UserError(f"launcher.option={text!r} is set by the launcher{instead}")
            found[name] = value if equals else True
        return found


# flag -> its default, its bound (None: text) and its help
FLAGS: dict[str, tuple[Any, int | None, str]] = {
    "partition": ("", None, "partition; by default that of the cluster"),
    "minutes": (60, 1, "time limit of a job; its run is saved, queued again and goes on"),
    "cores": (0, 0, "cores per node; 0: what the partition gives"),
    "gpus": (0, 0, "GPUs per node"),
    "nodes": (1, 1, "nodes that one run is spread over"),
    "parallel": (0, 0, "jobs that may run at a time; 0: no limit"),
}


def define_flags(values: flags.FlagValues) -> None:
    """``--launcher.partition`` and so on, and ``--cancel``."""
    for name, (default, bound, text) in FLAGS.items():
        flag, text = f"launcher.{name}", f"slurm: {text}"
        if bound is None:
            flags.DEFINE_string(flag, default, text, flag_values=values)
        else:
            flags.DEFINE_integer(flag, default, text, bound, flag_values=values)
    text = "slurm: a further option of sbatch, as account=physics; may be given several times"
    flags.DEFINE_multi_string("launcher.option", [], text, flag_values=values)
    text = "slurm: cancel the jobs of the study in --out, and do nothing else"
    flags.DEFINE_boolean("cancel", False, text, flag_values=values)


def from_flags(values: flags.FlagValues) -> Options | None:
    """What the flags ask for; None where another launcher is chosen.

    Raises:
      UserError: a flag of this launcher without it.
    """
    names = [*(f"launcher.{name}" for name in FLAGS), "launcher.option", "cancel"]
    if values.launcher != "slurm":
        if given := [name for name in names if values[name].present]:
            raise UserError(f"--{given[0]} is for SLURM: add --launcher=slurm, or leave it out")
        return None
    chosen: dict[str, Any] = {name: values[f"launcher.{name}"].value for name in FLAGS}
    return Options(**chosen, further=tuple(values["launcher.option"].value or ()))
