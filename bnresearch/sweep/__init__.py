"""Runs brought to their ends: skipped if done, resumed if stopped, here or in worker processes.

run.py         sweep(): from jobs to counts
jobs.py        what is to be done, and who does what next
launchers.py   where jobs run
population.py  in this process, runs of one program as one vmapped program
slurm/         as jobs of a cluster
worker.py      carries them out
board.py       the live table
"""

from bnresearch.sweep.jobs import Job
from bnresearch.sweep.launchers import started_early
from bnresearch.sweep.run import Counts, check_options, sweep

__all__ = ["Counts", "Job", "check_options", "started_early", "sweep"]
