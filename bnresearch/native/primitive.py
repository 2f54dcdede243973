"""A function of jax that the library of C++ computes where it can: a primitive with a reference.

The reference, in jax's own words, is what is computed under ``vmap``, on other platforms, where the
compiler shares an array among devices, and where there is no library; derivatives of a primitive
that has no rules of its own are those of its reference.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bnresearch.native import build


def make(
    target: str,
    reference: Callable[..., Any],
    shape: Callable[..., Any],
    attributes: Callable[..., Mapping[str, Any]] = dict,
    multiple: bool = False,
) -> Primitive:
    """A primitive that gives an array of the dtype of its first argument, or several.

    Args:
      target: the handler in the library; "" for one that the reference always computes.
      reference: ``reference(*arrays, **static)``, what it computes.
      shape: ``shape(*arrays, **static)``: that of the result.
      attributes: ``attributes(**static)``: what the handler is told of the static arguments.
      multiple: reference and shape give lists.
    """
    primitive = Primitive(f"native_{target or reference.__name__}")
    primitive.multiple_results = multiple

    @primitive.def_abstract_eval
    def aval(first: Any, *rest: Any, **static: Any) -> Any:
        found = shape(first, *rest, **static)
        avals = [first.update(shape=s, weak_type=False) for s in (found if multiple else [found])]
        return avals if multiple else avals[0]

    @functools.cache
    def compiled(**static: Any) -> Callable[..., Any]:
        return jax.jit(lambda *arrays: primitive.bind(*arrays, **static))

    primitive.def_impl(lambda *arrays, **static: compiled(**static)(*arrays))

    def batched(arrays: Any, dims: Any, **static: Any) -> Any:
        results = jax.vmap(functools.partial(reference, **static), in_axes=dims)(*arrays)
        return results, [0] * len(results) if multiple else 0

    batching.primitive_batchers[primitive] = batched

    def jvp(primals: Any, tangents: Any, **static: Any) -> Any:
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(reference, **static), (*primals,), (*tangents,))

    ad.primitive_jvps[primitive] = jvp

    by_xla = mlir.lower_fun(reference, multiple_results=multiple)
    mlir.register_lowering(primitive, by_xla)
    if target:
        native = jax.ffi.ffi_lowering(f"bnresearch_{target}")

        def lower(ctx: Any, *arrays: Any, **static: Any) -> Any:
            if not _alone(ctx) or not build.ready():
                return by_xla(ctx, *arrays, **static)
            return native(ctx, *arrays, **attributes(**static))

        mlir.register_lowering(primitive, lower, platform="cpu")
    return primitive


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, varying along the same axes of the mesh, as primitives want them in shard_map."""
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    missing = [tuple(sorted(every - axes)) for axes in own]
    return [
        jax.lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(arrays, missing, strict=True)
    ]


def _alone(ctx: Any) -> bool:
    """Whether what is lowered runs on whole arrays of one device: a custom call is a closed box to
    the partitioner of jit over several devices. In shard_map and pmap every device has its own."""
    axes = ctx.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return frozenset(axes.manual_axes) == frozenset(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) in (None, 1)
