"""Whether variables and batches fit a model, in words, before anything is compiled."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bnresearch.errors import UserError
from bnresearch.leaves import Leaf, leaves_of
from bnresearch.net import Net

Tree = Any

COLLECTIONS = ("params", "batch_stats")
SHOWN = 10  # leaves that a message lists


def check_fit(net: Net, variables: Tree, batch: Any) -> None:
    """Refuse variables that are not those of the model, or a batch that it does not take.

    Raises:
      UserError: parameters or running statistics are missing, of another shape, or of nothing in
        the model: each is named with what was given and what is wanted; or the model fails.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else "no dict"
        raise UserError(
            f'the variables are {{"params": ..., "batch_stats": ...}}, not {found or "empty"}; '
            "give what model.init returned, with the trained values"
        )
    given = _leaves(variables)
    wanted = _wanted(net, batch, train=False)
    if given.keys() - wanted.keys():  # an auxiliary head, say, is called in training only
        wanted = _wanted(net, batch, train=True) | wanted
    differing = [
        name
        for name in sorted(given.keys() | wanted.keys())
        if _shape(given, name) != _shape(wanted, name)
    ]
    if not differing:
        return
    lines = [
        f"  {name}: given {given.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in differing[:SHOWN]
    ]
    if len(differing) > SHOWN:
        lines.append(f"  ... and {len(differing) - SHOWN} more")
    raise UserError(
        f"the variables do not fit the model on batches of {shapes(batch)}; give those of this "
        "very model, and batches like those it was trained on:\n" + "\n".join(lines)
    )


def _leaves(variables: Tree) -> dict[str, Leaf]:
    return leaves_of({name: variables[name] for name in COLLECTIONS if name in variables})


def _shape(leaves: Mapping[str, Leaf], name: str) -> tuple[int, ...] | None:
    return leaves[name].shape if name in leaves else None


def _wanted(net: Net, batch: Any, train: bool) -> dict[str, Leaf]:
    """The leaves that the model makes where it is called without any."""

    def call(batch: Any) -> Any:
        rngs = {name: jax.random.key(0) for name in ("params", "dropout", "norm")}
        return net.call({}, batch, train=train, rngs=rngs, mutable=True)[1]

    try:
        return _leaves(jax.eval_shape(call, batch))
    except UserError:
        raise
    except Exception as error:  # whatever the model raises
        raise does_not_go_through(batch, 0, error) from error


def does_not_go_through(batch: Any, index: int, error: Exception) -> UserError:
    """What to tell somebody whose model raises ``error`` for the batch of that number."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(
        f"batch {index}, {shapes(batch)}, does not go through the model ({reason}); give batches "
        "like those it was trained on, or say how to call it with call="
    )


def shapes(batch: Any) -> str:
    """The shapes of a batch's arrays, for messages."""
    found = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}{list(np.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    return ", ".join(found) or "nothing"
