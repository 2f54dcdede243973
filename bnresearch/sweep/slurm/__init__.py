"""The launcher that hands the runs of a study to SLURM, as job arrays, through submitit.

options.py    what is asked of SLURM for each run, and the flags for it
launch.py     submits, follows, leaves or cancels: runs where the study was started
task.py       carries out one run: runs on the nodes
record.py     which job does which run, kept beside the runs
commands.py   sbatch, squeue and scancel

A run's own folder is the truth about it; SLURM is asked only which jobs wait, run, or are gone. So
nothing needs an accounting database, and whoever started a study may log out: the next call of the
same command reads the record and the folders, and goes on following.
"""

from bnresearch.sweep.slurm.launch import cancel, slurm
from bnresearch.sweep.slurm.options import Options

__all__ = ["Options", "cancel", "slurm"]
