"""SLURM's commands; where they refuse, their own words are passed on."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import signals
from bnresearch.errors import UserError
from bnresearch.sweep.slurm.options import Options

NEEDED = ("sbatch", "scancel", "scontrol", "squeue", "srun")
DEADLINE = 60.0  # seconds that a command may take: a busy controller does
TIMED_OUT = (124, 137)  # exit codes of timeout(1)
LARGEST = 1000  # jobs of an array; SLURM's own default for MaxArraySize is 1001
NOTE = "BNRESEARCH_AGAIN"  # in the environment of a job: the file by which it asks to go on later
NOTICE = 90  # seconds before the time limit at which a run is told to save


class Queued(NamedTuple):
    """A job that SLURM has not done with.

    Attributes:
      state: SLURM's word for it.
      reason: why it waits, in SLURM's word for that.
    """

    state: str
    reason: str

    @property
    def running(self) -> bool:
        """It has nodes; otherwise it waits."""
        return self.state not in ("PENDING", "REQUEUED", "REQUEUE_HOLD")


def check() -> None:
    """UserError where SLURM or submitit is not at hand."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise UserError(
            f"--launcher=slurm: {missing[0]} is not on PATH; start the study where SLURM's "
            "commands are: on a login node (there may be a module to load)"
        )
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise UserError(
            "--launcher=slurm needs submitit; install it: pip install -e '.[slurm]'"
        ) from None


def ask(*command: str) -> str:
    """What a command prints; UserError with its complaint if it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for this process
        )
    except subprocess.TimeoutExpired:
        raise _no_answer(command[0]) from None
    if done.returncode:
        raise UserError(f"SLURM refuses: {_words(done.stderr or done.stdout)}")
    return done.stdout


def _no_answer(command: str) -> UserError:
    return UserError(
        f"{command} gave no answer within {DEADLINE:.0f} s: is SLURM's controller up? The same "
        "command goes on later"
    )


def queued(name: str) -> dict[str, Queued]:
    """The jobs of this user and name that wait or run, by their ids: "17", or "18_3" in arrays."""
    listed = ask(
        *("squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--name={name}"),
        "--format=%i|%T|%r",
    )
    found = {}
    for line in listed.splitlines():
        job, state, reason = line.strip().split("|", 2)
        found[job] = Queued(state, reason)
    return found


def cancel(jobs: Iterable[str]) -> None:
    """Ends jobs; no complaint about those that have ended. Of an array, all of them."""
    arrays = sorted({job.partition("_")[0] for job in jobs})
    if arrays:
        ask("scancel", "--quiet", *arrays)


def largest_array() -> int:
    """How many jobs one array may have here."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return max(1, min(LARGEST, int(match[1]))) if match else LARGEST


def submit(
    function: Callable[..., Any],
    arguments: Sequence[Sequence[Any]],
    options: Options,
    folder: Path,
    name: str,
    after: str,
) -> list[str]:
    """An array of jobs, each of which calls ``function(*arguments[i])``.

    Args:
      folder: for scripts, pickles and what jobs print: shared with the nodes.
      name: of the jobs.
      after: the array that has to have ended first, if any.

    Returns:
      The ids of the jobs, in the order of ``arguments``.

    Raises:
      UserError: SLURM takes none of them.
      OSError: there is no room for scripts and pickles.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    before = set(folder.iterdir())
    try:
        executor = SlurmExecutor(folder)
        executor.update_parameters(**_parameters(options, folder, name, len(arguments), after))
        # stderr is where submitit says what it raises, too.
        with _limited(SlurmExecutor), signals.put_off(), redirect_stderr(StringIO()):
            jobs = executor.map_array(function, *zip(*arguments, strict=True))
    except (FailedJobError, OSError) as error:
        for path in set(folder.iterdir()) - before:
            # Scripts and pickles of jobs that will never be; what else is new is of running ones.
            if re.fullmatch(r"\.?submission_file_\w+\.sh|[0-9a-f]{32}\.pkl", path.name):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        if getattr(error.__cause__, "returncode", None) in TIMED_OUT:
            raise _no_answer("sbatch") from None
        raise UserError(f"SLURM refuses: {_words(str(error))}") from None
    return [job.job_id for job in jobs]


@contextmanager
def _limited(executor: Any) -> Iterator[None]:
    """submitit waits for sbatch without a limit, and lets Ctrl-C reach it: ``timeout`` has the one,
    and a process group of its own. (For arrays it makes executors itself, so that a class derived
    from its own would not be asked.)"""
    plain = executor._make_submission_command

    def limited(self: Any, path: Path) -> list[str]:
        return ["timeout", "--kill-after=5", f"{DEADLINE:.0f}", *plain(self, path)]

    executor._make_submission_command = limited
    try:
        yield
    finally:
        executor._make_submission_command = plain


def _parameters(
    options: Options, folder: Path, name: str, count: int, after: str
) -> dict[str, Any]:
    """What submitit writes into the script for sbatch."""
    per_task = [f"--cpus-per-task={options.cores}"] if options.cores else []  # not inherited
    found = {
        "job_name": name,
        "time": options.minutes,
        "nodes": options.nodes,
        "ntasks_per_node": 1,
        "array_parallelism": options.parallel or count,
        # A process that fails takes the others along, which would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *per_task],
        **_going_on_later(folder),
        "wckey": None,  # submitit has one of its own, which clusters that check them refuse
        "additional_parameters": {
            "requeue": True,
            "signal": f"TERM@{min(NOTICE, 15 * options.minutes)}",  # what all runs listen to
            **options.named(),
        },
    }
    if options.partition:
        found["partition"] = options.partition
    if options.cores:
        found["cpus_per_task"] = options.cores
    if options.gpus:
        found["gpus_per_node"] = options.gpus
    if after:
        found["dependency"] = f"afterany:{after}"
    return found


def _going_on_later(folder: Path) -> dict[str, list[str]]:
    """Lines of the job's script around srun: a run that has saved itself is queued again.

    Not by submitit's own checkpoints: it gives up after three preemptions of short jobs, and saves
    inside a signal handler of the first process, where the others cannot take part. Here each
    process ends its run as always, the first one leaves a note (`task.py`), and this script finds
    it: SLURM's signals before the time limit and at preemption do not reach the script. What does
    is what ends the job for good, or queues it by itself (scancel, scontrol requeue): then the
    script is gone before that line.

    Not by an exit code: with --kill-on-bad-exit the first process to end with one would take the
    others along while they save.
    """
    note = f"export {NOTE}={shlex.quote(str(folder))}/$SLURM_JOB_ID.again"
    again = f'if [ -e "${NOTE}" ]; then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi'
    return {"setup": [note, f'rm -f "${NOTE}"'], "teardown": ["code=$?", again, 'exit "$code"']}


def _words(text: str) -> str:
    """The lines of a complaint that say something, as one."""
    lines = [line.strip() for line in text.strip().splitlines()]
    said = [line for line in lines if line.startswith(("sbatch:", "squeue:", "scancel:"))] or lines
    return "; ".join(dict.fromkeys(line for line in said if line)) or "no reason given"
