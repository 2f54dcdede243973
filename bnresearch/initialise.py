"""Initialisers that redraw or rescale what a model starts from.

A model comes with its own start: He et al. (2015) for hidden layers, zeros for biases. What is here
changes kernels and nothing else, and only before the first step.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.errors import UserError
from bnresearch.models.blocks import in_head

Tree = Any


def he(params: Tree, key: jax.Array) -> Tree:
    """The model's own start: He et al. (2015), but where a model says otherwise."""
    del key
    return params


def orthogonal(params: Tree, key: jax.Array, *, gain: float = 2**0.5) -> Tree:
    """Orthogonal initialisation (Saxe et al., 2014).

        W' W = gain^2 I   (fan_in >= out; else W W' = gain^2 I)

    Every ``kernel`` outside of the head, taken as a matrix ``[fan_in, out]``, becomes a uniformly
    drawn matrix with orthogonal columns (or rows) of length ``gain``; the default is He's for relu.
    The head, biases and everything a norm owns stay as they are. What is drawn for a kernel depends
    on ``key`` and its path alone, so that it is bitwise the same whatever stands between.

    Citation: Saxe, McClelland & Ganguli (2014), Exact solutions to the nonlinear dynamics of
    learning in deep linear neural networks, ICLR, arXiv:1312.6120.
    """
    draw = nn.initializers.orthogonal(gain)

    def replace(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[-1].key != "kernel" or in_head(path):
            return leaf
        name = "/".join(part.key for part in path)
        return draw(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)


class Lsuv(NamedTuple):
    """What `lsuv` gives back.

    Attributes:
      params: with kernels rescaled.
      before, after: standard deviation of the output of each linear layer by its path, in the order
        of execution, with the given and with the new kernels.
      passes: how many times the model was run.
    """

    params: Tree
    before: dict[str, float]
    after: dict[str, float]
    passes: int


def lsuv(
    apply: Callable[..., Any],
    params: Tree,
    *inputs: Any,
    tolerance: float = 0.01,
    most_passes: int = 10,
) -> Lsuv:
    """Layer-sequential unit-variance initialisation (Mishkin & Matas, 2016).

        kernel <- kernel / std(output of its layer),  layer after layer

    The standard deviation is one number per layer, over a batch, all positions and all features.
    All of flax's Conv and Dense layers are rescaled, the head too. As the paper does, begin with
    orthogonal kernels: ``orthogonal(params, key, gain=1.0)``.

    One run of the model does all layers: on its way each layer hands on what it would have computed
    with the rescaled kernel, so that the next one sees what it will see. The second run confirms
    it; where biases are not 0 it takes a few more.

    Args:
      apply: ``apply(params, *inputs)`` runs the model on a batch. It is compiled once per function,
        so pass the same one again, and what changes as inputs.
      params: of the model.
      inputs: of apply; arrays.
      tolerance: how far from 1 a standard deviation may end.
      most_passes: how many times the model may be run.

    Raises:
      UserError: a layer gives the same output everywhere, or does not come to 1, as happens if the
        length of its kernel has no effect (weight norm, weight standardisation).

    Citation: Mishkin & Matas (2016), All you need is a good init, ICLR, arXiv:1511.06422.
    """
    before: dict[str, float] = {}
    last: dict[str, float] = {}
    for passes in range(1, most_passes + 1):
        rescaled, seen = _pass(apply, params, *inputs)
        after = {path: float(std) for (_, path), std in sorted(seen.items())}
        before = before or after
        off = {path: std for path, std in after.items() if not abs(std - 1) <= tolerance}
        if not off:
            return Lsuv(params, before, after, passes)
        flat = {path: std for path, std in off.items() if not 1e-12 < std < float("inf")}
        stuck = {path: off[path] for path in off.keys() & last if _same(off[path], last[path])}
        if flat or stuck or passes == most_passes:
            raise UserError(_cannot(flat or stuck or off, passes))
        params, last = rescaled, after
    raise AssertionError


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * abs(b)


def _cannot(off: Mapping[str, float], passes: int) -> str:
    path, std = next(iter(off.items()))
    return (
        f"LSUV: after {passes} passes the output of {path} still has standard deviation {std:.3g}, "
        f"not 1 (of {len(off)} such layers the first); choose init.name=he or orthogonal. A kernel "
        "of zeros cannot be rescaled, and under weight norm or weight standardisation the length "
        "of a kernel has no effect"
    )


@partial(jax.jit, static_argnums=0)
def _pass(
    apply: Callable[..., Any], params: Tree, *inputs: Any
) -> tuple[Tree, dict[tuple[int, str], jax.Array]]:
    """Parameters with every kernel divided by the standard deviation its layer's output has when
    all layers before are rescaled already; and these, by number in the order of execution and path
    (jit does not keep the order of a dict)."""
    stds: dict[tuple[str, ...], jax.Array] = {}

    def rescale(following: Callable, arguments: Any, keywords: Any, context: Any) -> Any:
        y = following(*arguments, **keywords)
        module = context.module
        if not isinstance(module, nn.Conv | nn.Dense) or context.method_name != "__call__":
            return y
        # A layer that is used again is rescaled by its first use.
        std = stds.setdefault(module.path, jnp.std(y.astype(jnp.float32)))
        return (y / std).astype(y.dtype)

    with nn.intercept_methods(rescale):
        apply(params, *inputs)
    kernels = flatten_dict(params)
    for path, std in stds.items():
        kernels[(*path, "kernel")] = kernels[(*path, "kernel")] / std
    return unflatten_dict(kernels), {
        (i, "/".join(path)): std for i, (path, std) in enumerate(stds.items())
    }


class Init(NamedTuple):
    """A row of INITS.

    Attributes:
      draw: ``draw(params, key) -> params``.
      fit: ``fit(apply, params, *inputs)`` with the parameters that ``draw`` made and a first batch;
        None where the start does not depend on data.
    """

    draw: Callable[[Tree, jax.Array], Tree]
    fit: Callable[..., Lsuv] | None = None


INITS: Mapping[str, Init] = {
    "he": Init(he),
    "orthogonal": Init(orthogonal),
    "lsuv": Init(partial(orthogonal, gain=1.0), lsuv),
}
