"""A model that one can look into: a run's own, or anybody's flax model, with one way to call it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen import dtypes
from ml_collections import ConfigDict

from bnresearch.batchnorm import feature_axes, features_back, features_last, whole_mask
from bnresearch.errors import UserError
from bnresearch.kinds.batch import normalise
from bnresearch.layers import site_inputs
from bnresearch.sets import Scope, Stats
from bnresearch.step import SIDE_INPUTS, build_model
from bnresearch.watch import NOBODY, SEEN, Seen, Watch, current, noted, seen_in, watching

Tree = Any
# (variables, batch, train=, rngs=, mutable=) -> (output, mutated)
Call = Callable[..., tuple[Any, Mapping[str, Any]]]

IMAGES, LABELS = ("image", "inputs", "input", "x"), ("label", "labels", "targets", "y")
# Arguments that tell a flax model whether it trains, and what they are in training.
SWITCHES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Applied(NamedTuple):
    """What one pass gave: the model's output, what was observed by site, changed collections."""

    output: Any
    seen: dict[str, tuple[dict[str, Any], ...]]
    mutated: Mapping[str, Any]


@dataclass(frozen=True)
class Net:
    """A model to look into.

    Attributes:
      call: ``(variables, batch, train=, rngs=, mutable=) -> (output, mutated)``, traceable.
      losses: ``(output, batch) -> [batch]``, the loss of each example; None where nobody knows it.
    """

    call: Call
    losses: Callable[[Any, Any], jax.Array] | None = None

    def apply(
        self,
        variables: Tree,
        batch: Any,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        watch: Watch = NOBODY,
        mutable: tuple[str, ...] = (),
    ) -> Applied:
        """One pass; traceable. ``train`` is what the model is told, which decides on dropout; with
        ``watch.use`` the statistics that normalise are chosen apart from that.

        Args:
          variables: {"params": ..., "batch_stats": ...} and what else the model has.
          batch: as ``call`` takes it.
          key: for dropout and norms that draw; fixed where it is None.
          mutable: further collections that may change.
        """
        key = jax.random.key(0) if key is None else key
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(("dropout", "norm"))}
        wanted = [*mutable, *([SEEN] if watch.observe is not None else [])]
        with watching(watch), nn.intercept_methods(_intercept):
            output, mutated = self.call(variables, batch, train=train, rngs=rngs, mutable=wanted)
        return Applied(output, seen_in(mutated), mutated)

    def sites(self, variables: Tree, batch: Any) -> list[str]:
        """The paths of all norms, in order of execution; nothing is computed."""
        watch = Watch()
        jax.eval_shape(lambda v, b: self.apply(v, b, watch=watch).output, variables, batch)
        return watch.sites


# ---- The model of a run


def of_run(
    config: ConfigDict,
    num_classes: int,
    numbers: Mapping[str, Any] | None = None,
    scope: Scope = Scope(),
) -> Net:
    """The model of a config. Its batches are those of a dataset; ``numbers`` may be traced."""

    def call(variables: Tree, batch: Any, *, train: bool, rngs: Any, mutable: Any) -> Any:
        use = "batch" if train else "running"
        model = build_model(config, num_classes, use=use, numbers=numbers, scope=scope)
        with site_inputs(**{name: batch[name] for name in SIDE_INPUTS if name in batch}):
            return model.apply(variables, batch["image"], train=train, rngs=rngs, mutable=mutable)

    return Net(call, cross_entropy)


# ---- Anybody's flax model


def of_model(
    model: nn.Module,
    call: Call | None = None,
    losses: Callable[[Any, Any], jax.Array] | None = None,
) -> Net:
    """Any linen model.

    Args:
      model: it may have norms of flax, of this project, or both.
      call: how to apply it, for models that are not called ``model(x)`` with one of the switches
        train, training, is_training, deterministic, use_running_average:
        ``lambda variables, batch, train, **rest: model.apply(variables, batch["x"], train,
        **rest)``, where the rest is ``rngs`` and ``mutable``.
      losses: ``(output, batch) -> [batch]``; by default cross-entropy, where a batch has labels.

    Raises:
      UserError: the model is no linen module, or cannot be called without being told how.
    """
    return Net(call or plain_call(model), losses or cross_entropy)


def plain_call(model: nn.Module) -> Call:
    """How to call a model that takes its input and at most a switch and a mask; see `of_model`.
    Equal models get the same function, so that what is compiled for it is found again."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the model is a {type(model).__name__}, not a flax.linen module; give the module "
            "itself (not its class, not model.apply), or say how to call it with call="
        )
    try:
        return _known_call(model)
    except TypeError:  # a field that cannot be hashed
        return _known_call.__wrapped__(model)


@functools.lru_cache(maxsize=64)
def _known_call(model: nn.Module) -> Call:
    arguments = plain_arguments(model)

    def call(variables: Tree, batch: Any, *, train: bool, rngs: Any, mutable: Any) -> Any:
        x, more = arguments(batch, train)
        return model.apply(variables, x, rngs=rngs, mutable=mutable, **more)

    return call


def first_of(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def switch_of(model: nn.Module) -> str | None:
    """The argument that tells the model whether it trains, or None."""
    names = inspect.signature(type(model).__call__).parameters
    return next((name for name in SWITCHES if name in names), None)


def plain_arguments(model: nn.Module) -> Callable[[Any, bool], tuple[Any, dict[str, Any]]]:
    """``(batch, train) -> (input, keywords)`` of a model that takes nothing else; UserError for one
    that does."""
    _, first, *others = inspect.signature(type(model).__call__).parameters.values()
    names, switch = {first.name, *(p.name for p in others)}, switch_of(model)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p for p in others if p.default is p.empty and p.kind in named]
    unknown = [p.name for p in needed if p.name not in (switch, "mask")]
    if unknown:
        raise UserError(
            f"{type(model).__name__}.__call__ needs {', '.join(unknown)} beside its input; say how "
            "to call it: call=lambda variables, batch, train, **rest: model.apply(variables, "
            "batch[...], ..., **rest)"
        )

    def arguments(batch: Any, train: bool) -> tuple[Any, dict[str, Any]]:
        more: dict[str, Any] = {} if switch is None else {switch: train == SWITCHES[switch]}
        if "mask" in names and isinstance(batch, Mapping) and "mask" in batch:
            more["mask"] = batch["mask"]
        return inputs_of(batch), more

    return arguments


def inputs_of(batch: Any) -> Any:
    """What a model is called with: an entry of a dict (see IMAGES), the first of a tuple, or the
    batch itself."""
    if isinstance(batch, Mapping):
        for name in IMAGES:
            if name in batch:
                return batch[name]
        raise UserError(
            f"a batch has {', '.join(map(str, batch)) or 'nothing'}, but none of "
            f"{', '.join(IMAGES)}; rename the model's input, or say how to call it with call="
        )
    return batch[0] if isinstance(batch, tuple | list) else batch


def labels_of(batch: Any) -> Any:
    """The labels of a batch: an entry of a dict (see LABELS), the second of a tuple, or None."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def cross_entropy(output: Any, batch: Any) -> jax.Array:
    """The cross-entropy of each example, ``[batch]``, for logits ``[batch, ..., classes]`` and
    integer labels ``[batch, ...]``, averaged over the axes between; negative labels, and positions
    outside a "mask" of the shape of the labels, do not count.

    Raises:
      UserError: the batch has no such labels, or the output is no such array.
    """
    labels, shape = labels_of(batch), getattr(output, "shape", None)
    whole = labels is not None and jnp.issubdtype(jnp.result_type(labels), jnp.integer)
    if not whole or shape is None or jnp.shape(labels) != shape[:-1]:
        found = "no labels" if labels is None else f"labels of shape {jnp.shape(labels)}"
        raise UserError(
            f"the loss is unknown: batches have {found}, the model gives "
            f"{'no array' if shape is None else shape}. Name integer "
            f"labels one of {', '.join(LABELS)}, or give losses=(output, batch) -> [batch]"
        )
    counted = labels >= 0  # negative ones mean: none
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    if mask is not None and jnp.shape(mask) == jnp.shape(labels):
        counted = counted & (jnp.asarray(mask) > 0)
    logits = output.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    losses, counted = (x.reshape(len(logits), -1) for x in (losses, counted))
    return jnp.where(counted, losses, 0).sum(1) / jnp.maximum(counted.sum(1), 1)


# ---- Norms of flax

_alone_now: ContextVar[bool] = ContextVar("alone_now", default=False)

KEEPERS = (nn.BatchNorm,)  # of statistics
WITHOUT = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


def _intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    known = isinstance(module, (*KEEPERS, *WITHOUT))
    passed = context.method_name != "__call__" or _alone_now.get()
    if passed or not known or module.is_initializing():
        return call(*args, **kwargs)
    path = "/".join(module.path)
    if isinstance(module, WITHOUT):
        y = call(*args, **kwargs)
        return noted(Seen(path, module, first_of(args, kwargs), y, kwargs.get("mask"), "", None))
    return _batch_norm(module, path, *args, **kwargs)


def _batch_norm(
    module: nn.BatchNorm,
    path: str,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: Any = None,
) -> jax.Array:
    """A flax BatchNorm as the watch wants it, on one device: named axes, which nobody has bound
    here, are left out, so that the batch given is the whole batch."""
    running = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    watch, axes = current(), feature_axes(module.axis, x.ndim)
    use = watch.use or ("running" if running else "batch")
    # As it is where that will do: who looks at it may want to know the very array.
    plain = axes == (x.ndim - 1,) and x.ndim > 1
    flat = x if plain else features_last(x, axes)
    flat_mask = None if mask is None else features_last(whole_mask(mask, x.shape, axes), axes)
    before = Stats(*(module.get_variable("batch_stats", n).reshape(-1) for n in ("mean", "var")))
    if use == "running" and watch.statistics is not None:
        stats = watch.statistics(path, before, flat, flat_mask)
        y = _normalised(module, x, axes, flat, stats)
    else:
        y = _alone(module, x, use == "running", mask)
    if plain:
        return noted(Seen(path, module, flat, y, flat_mask, use, before))
    seen = Seen(path, module, flat, features_last(y, axes), flat_mask, use, before)
    return features_back(noted(seen), axes, x.shape)


def _alone(module: nn.BatchNorm, x: jax.Array, running: bool, mask: Any) -> jax.Array:
    """What the module itself does, with its own arithmetic and without its named axes."""
    alone = module.clone(
        parent=None, name=None, use_running_average=None, axis_name=None, axis_index_groups=None
    )
    own = {name: tree for name, tree in module.variables.items() if name != SEEN}
    token = _alone_now.set(True)
    try:
        how = {"use_running_average": running, "mask": mask}
        y, new = alone.apply(own, x, **how, mutable=["batch_stats"])
    finally:
        _alone_now.reset(token)
    if not running and module.is_mutable_collection("batch_stats"):
        for name, value in new["batch_stats"].items():
            module.put_variable("batch_stats", name, value)
    return y


def _normalised(
    module: nn.BatchNorm, x: jax.Array, axes: tuple[int, ...], flat: jax.Array, stats: Any
) -> jax.Array:
    params: list[Any] = [module.get_variable("params", name, None) for name in ("scale", "bias")]
    scale, bias = (v if v is None else v.reshape(-1) for v in params)
    y = normalise(flat.astype(jnp.float32), stats, scale, bias, module.epsilon)
    dtype = dtypes.canonicalize_dtype(x, *params, dtype=module.dtype)
    return features_back(y, axes, x.shape).astype(dtype)
