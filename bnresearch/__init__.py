"""A laboratory for Batch Normalization in JAX/Flax: a claim about BatchNorm is a program.

``bnresearch.config`` has every option, ``bnresearch.train.run`` trains one config, and
``python -m bnresearch`` is the command line. ``bnresearch.BatchNorm`` stands in for
flax.linen.BatchNorm; ``bnresearch.recalibrate`` takes the running statistics of any flax model
anew; ``bnresearch.load_study`` reads a study folder into pandas frames. Nothing is imported before
it is asked for, so that tools which only read run folders need not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnresearch.batchnorm import BatchNorm
    from bnresearch.recalibration import recalibrate
    from bnresearch.records import load_study

__all__ = ["BatchNorm", "load_study", "recalibrate"]

HOMES = {
    "BatchNorm": "bnresearch.batchnorm",
    "load_study": "bnresearch.records",
    "recalibrate": "bnresearch.recalibration",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
