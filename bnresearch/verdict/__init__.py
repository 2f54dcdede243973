"""Claims and values make verdicts. Reads frames; knows neither files nor models nor pictures.

deciding.py   decide(): the verdicts on the claims of a study
cases.py      what each kind of claim asks of its numbers: comparisons, and the answers it can get
options.py    such an answer: when it is shown, how likely by chance, with how many seeds
samples.py    one number per seed: pairs, bounds, what is lost
evidence.py   the interval and the tests that fit a sample
estimate.py   intervals and p-values from scipy and statsmodels;   power.py   seeds that are enough
wording.py    claims in words and their units;   table.py   verdicts for a terminal
"""

from bnresearch.verdict.deciding import Verdict, answer, cells, decide

__all__ = ["Verdict", "answer", "cells", "decide"]
