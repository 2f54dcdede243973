"""scikit-learn's handwritten digits: 1,797 pictures of 8x8 pixels with values 0..16.

The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998.
It comes without a split: ``base.divide`` draws test (15 %) and validation by data.split_seed.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np


class Digits:
    """A ``base.Source``; read through the cache, because importing scikit-learn takes a second."""

    name, version = "digits", "1"
    shape, num_classes = (8, 8, 1), 10
    lengths: Mapping[str, int] = MappingProxyType({"train": 1797})

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return images.astype(np.uint8).reshape(-1, *self.shape), labels

    def read(self, split: str, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """See ``base.Source.read``."""
        images, labels = self._arrays
        return [(images[i], int(labels[i])) for i in indices]
