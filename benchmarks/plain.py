"""The nets and the training loop that one would write with flax.linen and optax alone.

Nothing here comes from bnresearch: this is what its speed is held against.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

Tree = Any
BatchNorm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)


class MLP(nn.Module):
    """Hidden layers of 100 with BatchNorm between the dense map and relu."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for _ in range(3):
            x = nn.relu(BatchNorm()(nn.Dense(100, use_bias=False)(x)))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """He et al. (2016), section 4.2: 3 stages of (depth - 2) / 6 blocks, shortcuts without
    parameters."""

    depth: int = 20

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False)
        x = nn.relu(BatchNorm()(conv(16)(x)))
        for features in (16, 32, 64):
            for block in range((self.depth - 2) // 6):
                stride = 2 if block == 0 and features > 16 else 1
                y = nn.relu(BatchNorm()(conv(features, strides=stride)(x)))
                y = BatchNorm()(conv(features)(y))
                missing = features - x.shape[-1]
                x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, missing)))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class ResNet50(nn.Module):
    """He et al. (2016), table 1, with the stride on the 3x3 and projections as shortcuts."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normed(y: jax.Array, features: int, size: int, stride: int = 1) -> jax.Array:
            conv = nn.Conv(
                features,
                (size, size),
                stride,
                padding=size // 2,
                use_bias=False,
                dtype=self.dtype,
            )
            return BatchNorm(dtype=self.dtype)(conv(y))

        x = nn.relu(normed(x, 64, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, blocks in enumerate((3, 4, 6, 3)):
            features = 64 * 2**stage
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                y = nn.relu(normed(x, features, 1))
                y = nn.relu(normed(y, features, 3, stride))
                y = normed(y, 4 * features, 1)
                x = normed(x, 4 * features, 1, stride) if block == 0 else x
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2), dtype=jnp.float32))


class TrainState(train_state.TrainState):
    """flax's, with the running statistics, and sums for the log."""

    batch_stats: Tree
    loss: jax.Array
    gradient_norm: jax.Array


def make_state(model: nn.Module, shape: tuple[int, ...], optimizer: Any) -> TrainState:
    """The state before the first step."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, *shape)))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optimizer,
        loss=jnp.zeros(()),
        gradient_norm=jnp.zeros(()),
    )
    return state.replace(step=jnp.int32(0))


def make_step(
    batch: int, mean: tuple[float, ...], std: tuple[float, ...], log_norm: bool
) -> Callable[[TrainState, Mapping[str, jax.Array]], TrainState]:
    """One step on ``batch`` examples of a set that lives on the device: {"image": uint8
    [N, H, W, C], "label": int32 [N], "order": int32 [n], "first": the step that starts it}."""

    def step(state: TrainState, data: Mapping[str, jax.Array]) -> TrainState:
        start = (state.step - data["first"]) * batch
        index = jax.lax.dynamic_slice(data["order"], (start,), (batch,))
        image = (data["image"][index].astype(jnp.float32) - jnp.array(mean)) / jnp.array(std)
        label = data["label"][index]

        def loss_of(params: Tree) -> tuple[jax.Array, Tree]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, image, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            return loss, new["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        norm = optax.global_norm(gradient) if log_norm else 0.0
        return state.apply_gradients(
            grads=gradient,
            batch_stats=stats,
            loss=state.loss + loss,
            gradient_norm=state.gradient_norm + norm,
        )

    return step


@partial(jax.jit, static_argnums=(1, 2))
def shuffled(seed: int, epochs: int, count: int) -> jax.Array:
    """As many random orders of ``range(count)``, one behind the other."""
    keys = jax.random.split(jax.random.key(seed), epochs)
    return jax.vmap(lambda key: jax.random.permutation(key, count))(keys).reshape(-1)


def dispatched(step: Callable) -> Callable[[TrainState, Any, int], TrainState]:
    """``(state, data, count)``: one compiled call per step."""
    compiled = jax.jit(step, donate_argnums=0)

    def run(state: TrainState, data: Any, count: int) -> TrainState:
        for _ in range(count):
            state = compiled(state, data)
        return state

    return run


def scanned(step: Callable) -> Callable[[TrainState, Any, int], TrainState]:
    """``(state, data, count)``: one compiled call for all steps."""

    @partial(jax.jit, static_argnums=2, donate_argnums=0)
    def run(state: TrainState, data: Any, count: int) -> TrainState:
        return jax.lax.scan(lambda s, _: (step(s, data), None), state, length=count)[0]

    return run
