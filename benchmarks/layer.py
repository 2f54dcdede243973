"""BatchNorm with what stands behind it, in every library: time, and memory for the backward pass.

The forward pass gives output and running statistics; the backward pass besides these the gradients
of input, parameters and what is added, for a given gradient of the output. Temporary is what the
compiled program needs beyond its arguments and results; kept are the distinct buffers that wait for
the backward pass, as the library's own rules of differentiation choose them, the input among them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.measure import Spread, exact, in_turn, installed, missing, ratios, say, spread, text
from benchmarks.peers import JAX, LINEN, OURS, TORCH
from benchmarks.picture import Bars

PEERS = [name for name in (*JAX, TORCH) if name != OURS]
PASSES = ("forward", "forward and backward")
HEADER = (
    *("input", "layer", "pass", "ms, bnresearch"),
    *(f"{name.removeprefix('bnresearch, ')} / bnresearch" for name in PEERS),
    *("temporary / input: bnresearch, flax.linen", "kept / input: bnresearch, flax.linen", "n"),
)

SHAPES = (
    *((60, 100), (128, 100)),
    *((128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 256)),
    *((64, 56, 56, 64), (64, 14, 14, 1024)),
)
ON_GPU = ((256, 56, 56, 64), (256, 14, 14, 1024))
QUICK = ((60, 100), (16, 8, 8, 32))
ELEMENTS = 2_000_000  # per timing: small inputs are normalised many times


def run(quick: bool) -> dict[str, Any]:
    """A row per input, layer and pass, with the ratios of all libraries to ours."""
    on_cpu = jax.default_backend() == "cpu"
    shapes = QUICK if quick else SHAPES if on_cpu else ON_GPU
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    repeats = 2 if quick else 15
    rows = []
    for shape in shapes:
        say(f"  {list(shape)}")
        for what in peers.BEHIND:
            rows += measure(shape, dtype, what, repeats)
    return {"rows": rows, "left_out": missing([name for name in PEERS if name in LAZY])}


LAZY = ("equinox", "haiku", TORCH)  # may be missing


def measure(shape: tuple[int, ...], dtype: Any, what: str, repeats: int) -> list[dict[str, Any]]:
    """The two rows of one layer on one input."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, t, other = (jax.random.normal(key, shape, dtype) for key in keys)
    added = [other] if "add" in what else []
    calls = max(1, min(50, ELEMENTS // x.size))
    names = [name for name in (*JAX, TORCH) if name not in LAZY or installed(name)]
    work: dict[str, dict[str, Callable[[], None]]] = {name: {} for name in PASSES}
    memory: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == TORCH:
            one = peers.Torch(what, x, t, added)
            passes: Sequence[Callable[[int], None]] = (one.forward, one.both)
            memory[name] = {"temporary": [None, None], "kept": one.kept() / x.nbytes}
        else:
            passes, memory[name] = compiled(JAX[name](x, what), x, t, added)
        for which, function in zip(PASSES, passes, strict=True):
            work[which][name] = lambda function=function: function(calls)
    rows = []
    for index, which in enumerate(PASSES):
        seconds = in_turn(work[which], repeats)
        rows.append(
            {
                "input": f"{list(shape)} {x.dtype}",
                "layer": what,
                "pass": which,
                "seconds": {name: per_call(values, calls) for name, values in seconds.items()},
                "over_ours": {name: ratios(v, seconds[OURS]) for name, v in seconds.items()},
                "temporary": {name: memory[name]["temporary"][index] for name in names},
                "kept": {name: memory[name]["kept"] for name in names},
            }
        )
    return rows


def per_call(values: Sequence[float], calls: int) -> Spread:
    """Seconds of one call."""
    return spread([value / calls for value in values])


def compiled(
    layer: peers.Layer, x: jax.Array, t: jax.Array, added: Sequence[jax.Array]
) -> tuple[list[Callable[[int], None]], dict[str, Any]]:
    """Both passes, ``(calls)`` times, each from the statistics that the one before left; and their
    memory as a part of the bytes of the input."""
    if layer.features_first:
        x, t, *added = (jnp.moveaxis(array, -1, 1) for array in (x, t, *added))

    def both(params: Any, stats: Any, x: jax.Array, *rest: jax.Array) -> Any:
        t, *added = rest
        y, back, new = jax.vjp(
            lambda params, *inputs: layer.apply(params, stats, *inputs),
            *(params, x, *added),
            has_aux=True,
        )
        return (y, back(t)), new

    passes, temporary = [], []
    for function, inputs in ((layer.apply, (x, *added)), (both, (x, t, *added))):
        program = jax.jit(function).lower(layer.params, layer.stats, *inputs).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes / x.nbytes)

        def work(calls: int, program: Any = program, inputs: Any = inputs) -> None:
            stats = layer.stats
            for _ in range(calls):
                y, stats = program(layer.params, stats, *inputs)
            jax.block_until_ready((y, stats))

        passes.append(work)
    return passes, {"temporary": temporary, "kept": kept(layer, x, added) / x.nbytes}


def kept(layer: peers.Layer, x: jax.Array, added: Sequence[jax.Array]) -> int:
    """Bytes of what the backward pass is given: distinct buffers only."""
    _, back, _ = jax.vjp(
        lambda params, *inputs: layer.apply(params, layer.stats, *inputs),
        *(layer.params, x, *added),
        has_aux=True,
    )
    leaves = [leaf for leaf in jax.tree.leaves(back) if isinstance(leaf, jax.Array)]
    return sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in leaves}.values())


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per input, layer and pass."""
    return [
        (
            *(row["input"], row["layer"], row["pass"]),
            text(row["seconds"][OURS], 1e3, 3),
            *(text(row["over_ours"][name]) if name in row["over_ours"] else "" for name in PEERS),
            ", ".join(f"{row['temporary'][name]:.2f}" for name in (OURS, LINEN)),
            ", ".join(f"{row['kept'][name]:.2f}" for name in (OURS, LINEN)),
            str(row["seconds"][OURS]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """How much longer the others take for both passes, and what they keep between them."""
    rows = [row for row in result["rows"] if row["pass"] == PASSES[1]]
    found = []
    for what in peers.BEHIND:
        mine = {row["input"]: row for row in rows if row["layer"] == what}
        ratio = {
            where.split("]")[0] + "]": {
                name: value for name, value in row["over_ours"].items() if name != OURS
            }
            for where, row in mine.items()
        }
        title = f"{what}, {PASSES[1]}"
        found.append(Bars(title, "time / time of bnresearch", ratio, log=True, rule=1.0))
    last = {row["layer"]: row["kept"] for row in rows}
    held = {
        what: {name: exact(value) for name, value in values.items()}
        for what, values in last.items()
    }
    return [*found, Bars("kept for the backward pass", "bytes / bytes of the input", held)]
