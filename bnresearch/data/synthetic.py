"""Made-up pictures: a smooth pattern per class under noise, a function of (seed, index) alone.

For smoke runs, benchmarks and tests: any shape, any number of classes, sizes that vary as
photographs do.
"""

from collections.abc import Sequence

import numpy as np

from bnresearch.errors import UserError

# A pattern is a coarse grid of this many cells per side, enlarged: it survives crops and resizing.
GRID = 4


class Synthetic:
    """A ``base.Source`` that computes its pictures.

    Pixel = 128 + pattern[class] + noise, cut to 0..255, where patterns are Gaussian with standard
    deviation 32 per cell and channel and the noise is Gaussian with standard deviation 24. Labels
    go round the classes.
    """

    name, version = "synthetic", ""

    def __init__(self, seed: int, shape: Sequence[int], classes: int, examples: int, vary: float):
        _check(shape, classes, examples, vary)
        height, width, channels = shape
        self.shape = (None, None, channels) if vary else (height, width, channels)
        self.num_classes = classes
        self.lengths = {"train": examples, "test": max(1, examples // 4)}
        self._seed, self._size, self._vary = seed, (height, width), vary
        grid = (classes, GRID, GRID, channels)
        self._patterns = 32 * np.random.default_rng([seed, 0]).standard_normal(grid, np.float32)

    def read(self, split: str, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """See ``base.Source.read``."""
        return [self._make(("train", "test").index(split), int(i)) for i in indices]

    def _make(self, part: int, index: int) -> tuple[np.ndarray, int]:
        # PCG64 is seeded by all four numbers: no two pictures share their noise.
        rng = np.random.default_rng([self._seed, 1, part, index])
        label = index % self.num_classes
        scale = 1 + self._vary * rng.uniform(-1, 1, 2) if self._vary else np.ones(2)
        height, width = (max(1, round(n * s)) for n, s in zip(self._size, scale, strict=True))
        rows, columns = (np.arange(n) * GRID // n for n in (height, width))
        image = 128 + self._patterns[label][rows[:, None], columns]
        image += 24 * rng.standard_normal(image.shape, np.float32)
        return image.clip(0, 255).astype(np.uint8), label


def _check(shape: Sequence[int], classes: int, examples: int, vary: float) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(
            f"data.synthetic.shape is {tuple(shape)}, but must be (height, width, channels)"
        )
    if classes < 1:
        raise UserError(f"data.synthetic.classes is {classes}, but must be at least 1")
    if examples < 2:
        raise UserError(f"data.synthetic.examples is {examples}, but must be at least 2")
    if not 0 <= vary < 1:
        raise UserError(f"data.synthetic.vary is {vary}, but must be at least 0 and below 1")
