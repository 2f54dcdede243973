"""Statistics at prediction time: those of training and of what is to be predicted, put together.

Functions of one site, ``(running, x, ...) -> running``, for `watch.Watch.statistics`: they take the
running statistics, ``[features]``, and the input ``[batch, ..., features]`` at inference, and give
what to normalise with in their place. `tent` moves parameters as well.

They are for kinds whose inference is ``(x - mean) / sqrt(var + epsilon) * scale + bias`` with the
running mean and variance: NORMALISING, and the norms of flax.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.errors import UserError
from bnresearch.moments import moments
from bnresearch.net import Net
from bnresearch.norm import NORMS
from bnresearch.pooled import set_moments
from bnresearch.precise import Site
from bnresearch.sets import Scope, Sets
from bnresearch.watch import Seen, Watch

Tree = Any

NORMALISING = (
    "batch",
    "conditional",
    "cross_iteration",
    "ghost",
    "noisy",
    "regularized",
    "renorm",
    "stop_gradient",
    "virtual",
)


def check_sites(sites: Mapping[str, Site], what: str) -> None:
    """Refuse sites whose statistics at inference cannot be replaced by a mean and a variance.

    Raises:
      UserError: the first such site, its kind, and what can be done instead.
    """
    # `corrected` needs the population: what has an update of its own is not taken anew.
    takes = [k for k in NORMALISING if what != "corrected" or NORMS[k].update is not None]
    for path, site in sites.items():
        if site.how != "kept" and site.kind in NORMS and site.kind not in takes:
            raise UserError(
                f"{what} puts a mean and a variance together, but site {path} is of kind "
                f"{site.kind}, which does not normalise with such two at inference; it can be "
                f"evaluated with running, batch or precise statistics (kinds that take {what}: "
                f"{', '.join(takes)})"
            )


def blend(running: Any, x: jax.Array, mask: Any, source: Any) -> Any:
    """Source and batch blended (Schneider et al., 2020).

        mean = a * running mean + (1 - a) * batch mean,  a = N / (N + n)

    and the variance likewise, where n is the number of examples in the batch and N, ``source``,
    what the running statistics count as. N = 0 is prediction with the statistics of the batch
    (Nado et al., 2020).

    Args:
      mask: which examples of the batch there are, booleans ``[batch]``, or None. Padding counts
        neither in n nor in the statistics.

    Citation: Schneider, Rusak, Eck, Bringmann, Brendel & Bethge (2020), Improving robustness
    against common corruptions by covariate shift adaptation, NeurIPS, arXiv:2006.16971.
    """
    mean, var, _ = set_moments(x, mask)
    n = len(x) if mask is None else mask.sum()
    a = source / (source + n)
    return running._replace(
        mean=a * running.mean + (1 - a) * mean, var=a * running.var + (1 - a) * var
    )


def with_example(running: Any, x: jax.Array, weight: Any) -> Any:
    """Inference example weighing (Summers & Dinneen, 2020).

        mean = (1 - w) * rm + w * m_i,  E[x^2] = (1 - w) * r2 + w * E_i[x^2],  var = E[x^2] - mean^2

    m_i and E_i are over the positions of example i, r2 = rv + rm^2. Computed as a merge of
    variances, ``(1 - w) rv + w v_i + w (1 - w) (m_i - rm)^2``, which neither cancels nor comes
    below 0. No example sees another one.

    Returns:
      Statistics of each example, ``[batch, 1, ..., features]``.

    Citation: Summers & Dinneen (2020), Four Things Everyone Should Know to Improve Batch
    Normalization, ICLR, arXiv:1906.03548.
    """
    mean, var = _of_examples(x)
    away = mean - running.mean
    return running._replace(
        mean=running.mean + weight * away,
        var=(1 - weight) * running.var + weight * var + weight * (1 - weight) * jnp.square(away),
    )


def corrected(running: Any, x: jax.Array, size: Any, spread: jax.Array) -> Any:
    """Statistics as if the example stood in a training batch; after EvalNorm (Singh & Shrivastava,
    2019).

        E[m_B | i] = a_i / B + (B - 1) / B * mu,   E[q_B | i] likewise of E_i[x^2]
        E[v_B | i] = E[q_B | i] - E[m_B | i]^2 - (B - 1) / B^2 * tau^2

    Mean and variance of a batch of B examples, given that example i, of mean a_i, is one of them
    and the others are drawn from the population (mean mu, variance between the means of examples
    tau^2). **This correction is derived here:** the paper's statistics have the same two parts, but
    it fits their weights to the batches of training.

    Args:
      running: of the population, as precise as can be.
      size: B.
      spread: tau^2, ``[features]``.

    Citation: Singh & Shrivastava (2019), EvalNorm: Estimating Batch Normalization Statistics for
    Evaluation, ICCV, arXiv:1904.06031.
    """
    weight = 1 / size
    stats = with_example(running, x, weight)
    return stats._replace(var=jnp.maximum(stats.var - weight * (1 - weight) * spread, 0))


def _of_examples(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each example over its positions, ``[batch, 1, ..., features]``."""
    shape = (len(x), *(1,) * (x.ndim - 2), x.shape[-1])
    mean, var = moments(Sets(x, Scope(splits=len(x))))
    return mean.reshape(shape), var.reshape(shape)


def example_moments(seen: Seen) -> dict[str, tuple[jax.Array, ...]]:
    """What `corrected` has to know of the population: the moments of a site's input, and those of
    the means of its examples."""
    means = _of_examples(seen.x)[0].reshape(len(seen.x), -1)
    return {"input": set_moments(seen.x, seen.mask), "examples": set_moments(means)}


# ---- Test entropy minimisation


class Adapted(NamedTuple):
    """Scale and bias of the norms as they have been adapted, and the state of the optimizer."""

    affine: Tree
    opt_state: Any


def tent_start(params: Tree, sites: Iterable[str], rate: float) -> Adapted:
    """The scales and biases of the sites, before the first batch.

    Raises:
      UserError: the sites have none.
    """
    names = {(*path.split("/"), name) for path in sites for name in ("scale", "bias")}
    affine = {path: leaf for path, leaf in flatten_dict(params).items() if path in names}
    if not affine:
        raise UserError(
            "tent adapts scale and bias of the norms, and these have neither; evaluate with batch"
        )
    tree = unflatten_dict(affine)
    return Adapted(tree, optax.adam(rate).init(tree))


def tent(
    net: Net, variables: Tree, batch: Mapping[str, Any], adapted: Adapted, rate: Any
) -> tuple[jax.Array, Adapted]:
    """Test entropy minimisation on one batch (Wang et al., 2021).

        scale, bias <- one step of Adam down the mean entropy of the predictions

    Normalised with the statistics of the batch; traceable. The predictions are those before the
    step. Padding (``batch["mask"]``) counts in the statistics, as with those of the batch alone,
    but not in the entropy.

    Returns:
      Logits, and what the next batch is predicted with.

    Citation: Wang, Shelhamer, Liu, Olshausen & Darrell (2021), Tent: Fully Test-Time Adaptation by
    Entropy Minimization, ICLR, arXiv:2006.10726.
    """

    def entropy(affine: Tree) -> tuple[jax.Array, jax.Array]:
        params = unflatten_dict(flatten_dict(variables["params"]) | flatten_dict(affine))
        given = {**variables, "params": params}
        logits = net.apply(given, batch, watch=Watch(use="batch")).output
        log_p = jax.nn.log_softmax(logits)
        each = -(jnp.exp(log_p) * log_p).sum(-1)
        return jnp.where(batch["mask"], each, 0).sum() / batch["mask"].sum(), logits

    gradient, logits = jax.grad(entropy, has_aux=True)(adapted.affine)
    updates, opt_state = optax.adam(rate).update(gradient, adapted.opt_state, adapted.affine)
    return logits, Adapted(optax.apply_updates(adapted.affine, updates), opt_state)
