"""Single-label classification with softmax cross-entropy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]


class Classification:
    """Single-label classification with softmax cross-entropy.

    A batch is ``image`` ``[batch, height, width, channels]`` and ``label`` ``[batch]`` int32.
    """

    OPTIONS: Mapping[str, Any] = dict(label_smoothing=0.0)
    METRICS = ("loss", "accuracy", "count")  # the keys of what `metrics` returns

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
        return {
            "loss": jnp.where(mask, loss, 0.0).sum(),
            "correct": (correct & mask).sum(),
            "count": mask.sum(),
        }

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Mean loss (nats), accuracy in [0, 1] and the number of examples, of summed ``sums``."""
        count = int(sums["count"])
        return {
            "loss": float(sums["loss"]) / count,
            "accuracy": float(sums["correct"]) / count,
            "count": count,
        }
