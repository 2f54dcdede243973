"""Every kind of norm by itself, against flax.linen.BatchNorm: one training pass through one site.

A pass is the forward in training, the gradient with respect to the input and the parameters, and
the new running statistics. The deviation is the largest of output and gradient of a small float32
input on this device, from the same function in float64 on the CPU, relative to the largest value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.measure import in_turn, ratios, spread, text
from benchmarks.picture import Bars
from bnresearch.layers import make_norm
from bnresearch.norm import NORMS

HEADER = ("kind", "input", "ms per pass", "kind / flax BatchNorm", "n", "deviation: y", "dx")
FLAX = "flax.linen.BatchNorm"

# No linear map stands before a site by itself.
OPTIONS: dict[str, dict[str, Any]] = {"cross_iteration": {"compensation": "none"}}


def run(quick: bool) -> dict[str, Any]:
    """Milliseconds per pass of every kind and the ratio to flax, round by round."""
    on_cpu = jax.default_backend() == "cpu"
    shape, dtype = ((64, 16, 16, 32), jnp.float32) if on_cpu else ((256, 56, 56, 64), jnp.bfloat16)
    calls, repeats = (1, 2) if quick else ((5, 15) if on_cpu else (10, 12))
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    t = jax.random.normal(jax.random.key(1), shape, dtype)
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9)
    rows = []
    # flax runs anew beside every kind, so that both see the machine at the same time.
    for kind in NORMS:
        site = make_norm(kind, OPTIONS.get(kind))(name="norm", activation_follows=True)
        work = {FLAX: passes(flax, x, t, calls), kind: passes(site, x, t, calls)}
        seconds = in_turn(work, repeats)
        rows.append(
            {
                "kind": kind,
                "input": f"{list(shape)} {dtype.__name__}",
                "seconds": spread([value / calls for value in seconds[kind]]),
                "over_flax": ratios(seconds[kind], seconds[FLAX]),
                "flax_seconds": spread([value / calls for value in seconds[FLAX]]),
                "deviation": deviation(site),
            }
        )
    return {"rows": rows}


def passes(site: nn.Module, x: jax.Array, t: jax.Array, calls: int) -> Callable[[], None]:
    """``calls`` training passes, each from the statistics that the one before left."""
    variables = site.init(jax.random.key(0), x)
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})

    @jax.jit
    def one(params: Any, stats: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            collections = {"params": params, "batch_stats": stats}
            y, new = site.apply(
                collections, x, mutable=["batch_stats"], rngs={"norm": jax.random.key(0)}
            )
            return (y * t).sum(dtype=jnp.float32), new.get("batch_stats", {})

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    def work() -> None:
        new = stats
        for _ in range(calls):
            gradients, new = one(params, new, x)
        jax.block_until_ready((gradients, new))

    return work


def deviation(site: nn.Module) -> list[float]:
    """Of the output, and of the gradient with respect to the input."""
    x, t = np.random.default_rng(0).normal(size=(2, 32, 6, 6, 64))

    def outcome(dtype: Any, device: jax.Device) -> tuple[np.ndarray, np.ndarray]:
        with jax.default_device(device), jax.enable_x64(dtype == np.float64):
            here = jnp.asarray(x, dtype)
            variables = site.init(jax.random.key(0), here)

            def value(x: jax.Array) -> tuple[jax.Array, jax.Array]:
                rngs = {"norm": jax.random.key(0)}
                y, _ = site.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
                return (y * jnp.asarray(t, dtype)).sum(), y

            gradient, y = jax.jit(jax.grad(value, has_aux=True))(here)
            return np.asarray(y, np.float64), np.asarray(gradient, np.float64)

    found = outcome(np.float32, jax.devices()[0])
    exact = outcome(np.float64, jax.devices("cpu")[0])
    return [
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        for a, b in zip(found, exact, strict=True)
    ]


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per kind."""
    return [
        (
            row["kind"],
            row["input"],
            text(row["seconds"], 1e3, 2),
            text(row["over_flax"]),
            str(row["seconds"]["n"]),
            *(f"{value:.1e}" for value in row["deviation"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """The ratios, in two columns of about as many kinds."""
    rows = result["rows"]
    half = -(-len(rows) // 2)
    return [
        Bars(
            "one training pass",
            f"time / time of {FLAX}",
            {row["kind"]: {"": row["over_flax"]} for row in part},
            log=True,
            rule=1.0,
        )
        for part in (rows[:half], rows[half:])
    ]
