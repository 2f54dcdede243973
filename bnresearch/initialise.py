"""Initialisers that redraw or rescale what a model starts from.

A model comes with its own start: He et al. (2015) for hidden layers, zeros for biases. What is here
changes it, and only before the first step: kernels, and for ``matched`` the biases behind them.
"""

import zlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.errors import UserError
from bnresearch.kinds.batch import activated
from bnresearch.layers import Norm
from bnresearch.models.blocks import in_head
from bnresearch.norm import NORMS

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


class Matched(NamedTuple):
    """What `matched` gives back.

    Attributes:
      params: with kernels rescaled and biases set.
      mean, std: of each feature that comes to a site, by the path of the site, in the order of
        execution, with the given kernels and everything before normalised.
    """

    params: Tree
    mean: dict[str, jax.Array]
    std: dict[str, jax.Array]


def matched(apply: Callable[..., Any], params: Tree, *inputs: Any) -> Matched:
    """The start that BatchNorm would give this net, for sites of kind "none" (Salimans & Kingma).

        kernel[..., c] <- scale_c * kernel[..., c] / s_c,    bias_c <- -scale_c * m_c / s_c

    with m_c and s_c = sqrt(v_c + 1e-5) the mean and standard deviation, over the first batch and
    all positions, of what feature c of the linear layer in front of a site puts out, layer after
    layer. On that batch the net is then the function that its twin with ``norm.kind=batch`` (same
    seed, training mode) starts as: a comparison with and without BatchNorm does not also compare
    two initialisations. Kernels are those of every other arm up to the length of each feature.
    scale_c is 1; with zero_gamma it is 0 at the end of a branch, and the kernel with it: branches
    begin to learn as in Fixup.

    Only for ``placement=before_act``, where a linear layer leads straight to each site, and the
    kind "none" is its bias. What follows an activation, or reads a residual trunk (ResNet v2),
    cannot be normalised by any change of one layer. A net without norms has no need of the other
    placement: it is the same net under both.

    Args:
      apply: ``apply(params, *inputs)`` runs the model on a batch, with every site in training mode.
        It is compiled once per function, so pass the same one again.
      params: of the model; biases of sites of kind "none" are not looked at.
      inputs: of apply; arrays.

    Raises:
      UserError: a site of kind "none" that does not directly follow a linear layer; no such site; a
        feature that is the same everywhere in the batch.

    Citation: Salimans & Kingma (2016), Weight Normalization, NeurIPS, arXiv:1602.07868, section 3.
    Per feature also: Kraehenbuehl, Doersch, Donahue & Darrell (2016), Data-dependent
    Initializations of Convolutional Neural Networks, ICLR, arXiv:1511.06856.
    """
    new, seen = _match(apply, params, *inputs)
    moments = {path: (mean, var) for (_, path), (mean, var) in sorted(seen.items())}
    for path, (_, var) in moments.items():
        flat = int((var < FLAT).sum())
        if flat:
            raise UserError(
                f"init.name=matched: {flat} of the {var.size} features that come to {path} are the "
                "same everywhere in the first batch and have no length to be matched; take a "
                "larger data.batch_size or init.name=he"
            )
    means = {path: mean for path, (mean, _) in moments.items()}
    return Matched(new, means, {path: jnp.sqrt(var + EPS) for path, (_, var) in moments.items()})


EPS = NORMS["batch"].options["epsilon"]  # that of the twin
FLAT = 1e-10  # far below EPS: the rounding of a constant


@partial(jax.jit, static_argnums=0)
def _match(
    apply: Callable[..., Any], params: Tree, *inputs: Any
) -> tuple[Tree, dict[tuple[int, str], tuple[jax.Array, jax.Array]]]:
    """The new parameters, and mean and variance by number and path of the site."""
    last: list[tuple[jax.Array, tuple[str, ...]]] = []
    flat = flatten_dict(params)
    seen: dict[tuple[int, str], tuple[jax.Array, jax.Array]] = {}

    def replace(following: Callable, arguments: Any, keywords: Any, context: Any) -> Any:
        module = context.module
        called = context.method_name == "__call__"
        if called and isinstance(module, Norm) and module.chosen.kind == "none":
            x = arguments[0]
            made = [path for y, path in last if y is x]
            own_bias = any((*path, "bias") in flat for path in made)
            if not made or own_bias or (*module.path, "bias") not in flat:
                raise UserError(_not_behind_a_linear_layer(module))
            mean, var = _moments(x)
            std = jnp.sqrt(var + EPS)
            scale = jnp.ones_like(std)
            if module.scale_init is not None:
                scale = module.scale_init(jax.random.key(0), std.shape, std.dtype)
            flat[(*made[0], "kernel")] = flat[(*made[0], "kernel")] * (scale / std)
            flat[(*module.path, "bias")] = -mean * scale / std
            seen[len(seen), "/".join(module.path)] = mean, var
            y = (x - mean) / std * scale
            behind = (keywords.get(name) for name in ("activation", "add"))
            return activated(y, *behind).astype(x.dtype)
        y = following(*arguments, **keywords)
        if called and isinstance(module, nn.Conv | nn.Dense):
            last[:] = [(y, module.path)]
        return y

    with nn.intercept_methods(replace):
        apply(params, *inputs)
    if not seen:
        raise UserError(NOTHING_TO_MATCH)
    return unflatten_dict(flat), seen


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each feature of ``[batch, ..., features]``, in float32."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return x.mean(0), x.var(0)


def check_matched(options: Mapping[str, Any], kinds: Collection[str]) -> None:
    """Raises UserError where `matched` could only fail: for a model with these options, whose sites
    have these kinds of norm."""
    if "none" not in kinds:
        raise UserError(NOTHING_TO_MATCH)
    if options.get("placement") == "after_act":
        raise UserError(
            "init.name=matched normalises what linear layers put out, but under "
            "placement=after_act an activation stands between them and the norms; choose "
            "placement=before_act: without norms it is the same net"
        )
    if options.get("version") == "v2":
        raise UserError(
            "init.name=matched cannot stand for norms that read a residual trunk, as those of "
            "model.resnet.version=v2 do; choose version=v1 or init.name=he"
        )


NOTHING_TO_MATCH = (
    "init.name=matched starts sites of norm.kind=none as batch norm would, but there is none here; "
    "choose norm.kind=none (or a rule that says so), or init.name=he"
)


def _not_behind_a_linear_layer(module: Norm) -> str:
    return (
        f"init.name=matched: the site {'/'.join(module.path)} of kind none does not directly "
        "follow a linear layer without a bias of its own, so that no kernel and no bias can do its "
        "work; choose init.name=he, or a model whose norms stand before the activation"
    )


class Init(NamedTuple):
    """A row of INITS.

    Attributes:
      draw: ``draw(params, key) -> params``.
      fit: ``fit(apply, params, *inputs).params`` are the parameters that ``draw`` made, fitted to a
        first batch; None where the start does not depend on data.
      check: ``check(options, kinds)`` raises UserError for options of a model, or kinds of norm,
        that it can do nothing with.
    """

    draw: Callable[[Tree, jax.Array], Tree]
    fit: Callable[..., Lsuv | Matched] | None = None
    check: Callable[[Mapping[str, Any], Collection[str]], None] | None = None


INITS: Mapping[str, Init] = {
    "he": Init(he),
    "orthogonal": Init(orthogonal),
    "lsuv": Init(partial(orthogonal, gain=1.0), lsuv),
    "matched": Init(he, matched, check_matched),
}
