"""Importing jax and what stands on it, as fast as it goes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """For a block of imports: they make hundreds of thousands of objects and no garbage; looking
    for some takes a tenth of their time. Nor is any looked for among them later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
