"""A laboratory for Batch Normalization in JAX/Flax: a claim about BatchNorm is a program.

``bnresearch.config`` has every option, ``bnresearch.train.run`` trains one config, and
``python -m bnresearch`` is the command line. ``bnresearch.BatchNorm`` stands in for
flax.linen.BatchNorm. Nothing is imported before it is asked for, so that tools which only read run
folders need not wait for jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnresearch.batchnorm import BatchNorm

__all__ = ["BatchNorm"]


def __getattr__(name: str) -> Any:
    if name != "BatchNorm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bnresearch.batchnorm import BatchNorm

    return BatchNorm
