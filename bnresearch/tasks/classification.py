"""Single-label classification with softmax cross-entropy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = Mapping[str, jax.Array]

BINS = 15  # of confidence, equally wide, for the calibration error


class Classification:
    """Single-label classification with softmax cross-entropy.

    A batch is ``image`` ``[batch, height, width, channels]`` and ``label`` ``[batch]`` int32.
    """

    OPTIONS: Mapping[str, Any] = dict(label_smoothing=0.0)
    METRICS = ("loss", "accuracy", "ece", "count")  # the keys of what `metrics` returns

    @staticmethod
    def loss(logits: jax.Array, batch: Batch, label_smoothing: Any) -> jax.Array:
        """Mean cross-entropy (nats) with smoothed labels: ``(1 - a) * onehot + a / classes``
        (Szegedy et al., 2016). ``logits`` is ``[batch, classes]`` float32."""
        classes = logits.shape[1]
        # One-hot: on CPU the gradient of an indexed look-up is a slow scatter.
        target = jax.nn.one_hot(batch["label"], classes, dtype=logits.dtype)
        target = (1 - label_smoothing) * target + label_smoothing / classes
        return optax.softmax_cross_entropy(logits, target).mean()

    @staticmethod
    def sums(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the examples where ``batch["mask"]`` is true: to be added up over batches.

        The loss is the plain cross-entropy, without label smoothing.
        """
        mask = batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = jnp.argmax(logits, axis=1) == batch["label"]
        # The largest softmax, without the others.
        confidence = 1 / jnp.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        index = jnp.ceil(confidence * BINS).astype(jnp.int32) - 1  # an edge belongs to its left
        inside = jax.nn.one_hot(index, BINS)
        gap = jnp.where(mask, correct - confidence, 0.0)
        return {
            "loss": jnp.where(mask, loss, 0.0).sum(),
            "correct": (correct & mask).sum(),
            # No product of matrices: accelerators round its factors.
            "gaps": (gap[:, None] * inside).sum(0),
            "count": mask.sum(),
        }

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Of summed ``sums``: mean loss (nats), accuracy, the expected calibration error, both in
        [0, 1], and the number of examples.

        The calibration error (Guo et al., 2017) is ``sum over bins of n_bin / n * |accuracy -
        confidence|``, both in the bin, where a prediction's confidence is its probability and the
        BINS bins ``(i / BINS, (i + 1) / BINS]`` divide [0, 1]. n_bin cancels: all that is needed of
        a bin is its sum of ``correct - confidence``.
        """
        count = int(sums["count"])
        return {
            "loss": float(sums["loss"]) / count,
            "accuracy": float(sums["correct"]) / count,
            "ece": float(np.abs(sums["gaps"]).sum()) / count,
            "count": count,
        }
