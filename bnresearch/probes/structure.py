"""In which order a net's layers are executed, and which weights stand in front of which norm."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.net import Net
from bnresearch.watch import Watch

Tree = Any


class Structure(NamedTuple):
    """A net in order of execution.

    Attributes:
      sites: the paths of its norms.
      layers: the names of its layers. They divide the parameters: a layer begins with a module
        that has a weight (an array of two axes or more) and has all that follows up to the next
        one. It is called by its first site, or, if it has none, by the path of that module.
      layer_of: the number of the layer of each parameter, in the shape of the tree of parameters.
      weights: site -> path of the weight whose linear map made the site's input. Sites that read
        something else (a sum, an activation) are not in it.
      depths: of sites and layers: one more than the number of sites executed before.
    """

    sites: tuple[str, ...]
    layers: tuple[str, ...]
    layer_of: Tree
    weights: dict[str, str]
    depths: dict[str, int]


def structure(net: Net, variables: Tree, batch: Any) -> Structure:
    """The structure of a net, found while it is applied: use it inside what is traced."""
    params = flatten_dict(variables["params"])
    modules: list[str] = []
    made: list[tuple[str, Any]] = []  # by modules with a weight
    weights: dict[str, str] = {}
    weighted = {"/".join(path[:-1]): path for path, leaf in params.items() if leaf.ndim > 1}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if path not in modules:
            modules.append(path)
        for name, y in made:
            if args and y is args[0]:
                weights.setdefault(path, name)
        y = call(*args, **kwargs)
        if path in weighted:
            made.append((path, y))
        return y

    watch = Watch()
    with nn.intercept_methods(record):
        net.apply(variables, batch, train=True, watch=watch)
    layers, layer_of = _layers(modules, watch.sites, params, weighted)
    return Structure(
        sites=tuple(watch.sites),
        layers=tuple(layers),
        layer_of=unflatten_dict(layer_of),
        weights={
            site: "/".join(weighted[maker])
            for site, maker in weights.items()
            if site in watch.sites and maker not in watch.sites
        },
        depths=_depths(modules, watch.sites),
    )


def _layers(
    modules: Iterable[str], sites: list[str], params: Tree, weighted: Iterable[str]
) -> tuple[list[str], dict[tuple[str, ...], int]]:
    """The names of the layers, and the number of the layer of each parameter."""
    owned: dict[str, list[tuple[str, ...]]] = {}
    for path in params:
        owned.setdefault(_owner(path, modules), []).append(path)
    names: list[str] = []
    layer_of: dict[tuple[str, ...], int] = {}
    for module in modules:
        # Norms may have arrays of two axes as well: a scale for each domain.
        if module in weighted and module not in sites:
            names.append(module)
        if names and module in sites and names[-1] not in sites:
            names[-1] = module
        # What is executed before the first weight belongs to the first layer.
        layer_of |= dict.fromkeys(owned.get(module, ()), max(0, len(names) - 1))
    return names, layer_of


def _owner(path: tuple[str, ...], modules: Iterable[str]) -> str:
    """The innermost module that a parameter lies in."""
    prefixes = ["/".join(path[:end]) for end in range(len(path) - 1, -1, -1)]
    return next(prefix for prefix in prefixes if prefix in modules)


def _depths(modules: Iterable[str], sites: list[str]) -> dict[str, int]:
    depths, before = {"": 0}, 0
    for module in modules:
        depths.setdefault(module, before + 1)
        before += module in sites
    return depths
