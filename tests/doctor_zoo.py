"""Models of three families with BatchNorm, trained on the digits, for the tests of the doctor.

They are plain flax, as somebody else would write them. What a fault changes inside a model is data
of it, its ``plan``, so that a healthy model and a planted one share everything else.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from sklearn.datasets import load_digits

import bnresearch
from bnresearch.layers import make_norm
from bnresearch.net import inputs_of, of_model

BATCH, COUNT, EVAL_COUNT = 64, 20, 5  # examples in a batch, training batches, evaluation batches
LIBRARIES = {"flax": nn.BatchNorm, "ours": bnresearch.BatchNorm}
# What a plan can say of a site, beside fields of BatchNorm: a bias of the linear map before it, a
# dropout rate before it, a second norm behind it, no mask, or statistics ("batch" or "running",
# whatever the model is told; "swapped": the other ones).
PLANNED = ("bias", "dropout", "double", "unmasked", "use")


class Zoo(nn.Module):
    """What the models have in common.

    Attributes:
      plan: (path of a site or "*", what, value), see PLANNED.
      library: of LIBRARIES, or a kind of bnresearch.norm.NORMS, with ``options``.
      decay: of the running statistics.
      dropout: the rate behind the last norm.
    """

    plan: tuple[tuple[str, str, Any], ...] = ()
    library: str = "flax"
    options: tuple[tuple[str, Any], ...] = ()
    decay: float = 0.9
    dropout: float = 0.0

    def planned(self, name):
        path = "/".join((*self.path, name))
        return {what: value for site, what, value in self.plan if site in (path, "*")}

    def biased(self, name):
        """Whether the linear map before a site has a bias."""
        return "bias" in self.planned(name)

    def norm(self, name, x, train, mask=None):
        """The site ``name`` of this module."""
        if self.library not in LIBRARIES:
            use = "batch" if train else "running"
            return make_norm(self.library, dict(self.options), use=use)(name=name)(x, mask=mask)
        plan = self.planned(name)
        fields = {k: v for k, v in plan.items() if k not in PLANNED}
        if "dropout" in plan:
            x = nn.Dropout(plan["dropout"], deterministic=not train)(x)
        mask = None if mask is None or "unmasked" in plan else mask[..., None]
        running = {"batch": False, "running": True, "swapped": train}.get(
            plan.get("use"), not train
        )
        for again in ("", "_again")[: 1 + ("double" in plan)]:
            module = LIBRARIES[self.library](name=name + again, **{"momentum": self.decay} | fields)
            x = module(x, use_running_average=running, mask=mask)
        return x

    def shared(self):
        """The fields for a part of this model."""
        return {field: getattr(self, field) for field in ("plan", "library", "options", "decay")}


class MLP(Zoo):
    """Dense layers with norms before or after the ReLU."""

    widths: tuple[int, ...] = (32, 32, 32)
    after: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            biased = self.after or self.biased(f"norm{i}")
            x = nn.Dense(width, use_bias=biased, name=f"dense{i}")(x)
            x = nn.relu(x) if self.after else x
            x = self.norm(f"norm{i}", x, train)
            x = x if self.after else nn.relu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


class Block(Zoo):
    """A residual block of half the size of its input, post- or pre-activation (He et al., 2016);
    the shortcut has no parameters."""

    width: int = 16
    pre: bool = False

    @nn.compact
    def __call__(self, x, train):
        def conv(name, x, stride=1, bias=False):
            return nn.Conv(self.width, (3, 3), (stride, stride), use_bias=bias, name=name)(x)

        short = x[:, ::2, ::2]
        if self.pre:
            x = conv("conv1", nn.relu(self.norm("norm1", x, train)), 2)
            return short + conv("conv2", nn.relu(self.norm("norm2", x, train)))
        x = conv("conv1", x, 2, self.biased("norm1"))
        x = conv("conv2", nn.relu(self.norm("norm1", x, train)))
        return nn.relu(self.norm("norm2", x, train) + short)


class ResNet(Zoo):
    """A stem and stages of one block: 4x4, 2x2, 1 pixels."""

    width: int = 16
    depth: int = 1
    pre: bool = False

    @nn.compact
    def __call__(self, x, train):
        stem = nn.Conv(self.width, (3, 3), (2, 2), use_bias=self.biased("norm"), name="stem")
        x = nn.relu(self.norm("norm", stem(x), train))
        for i in range(1, self.depth + 1):
            x = Block(width=self.width, pre=self.pre, **self.shared(), name=f"stage{i}")(x, train)
        if self.pre:
            x = nn.relu(self.norm("last_norm", x, train))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10, name="head")(x)


class Layer(Zoo):
    """A layer of a transformer encoder with BatchNorm in the place of LayerNorm."""

    post: bool = False  # Vaswani et al., 2017; else the norms stand inside the branches

    @nn.compact
    def __call__(self, x, mask, train):
        norm = functools.partial(self.norm, train=train, mask=mask)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        pairs = nn.make_attention_mask(mask, mask)
        if self.post:
            x = norm("norm1", x + attention(x, mask=pairs))
            return norm("norm2", x + self.feed(x))
        x = x + attention(norm("norm1", x), mask=pairs)
        return x + self.feed(norm("norm2", x))

    def feed(self, x):
        y = nn.relu(nn.Dense(2 * x.shape[-1], name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(y)


class Encoder(Zoo):
    """A transformer encoder over the rows of a digit, the last of which may be missing."""

    width: int = 16
    depth: int = 1
    post: bool = False

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        x = nn.Dense(self.width, use_bias=self.biased("norm"), name="embed")(x)
        x = self.norm("norm", x, train, mask)
        x = x + self.param("position", nn.initializers.normal(), x.shape[1:])
        for i in range(1, self.depth + 1):
            x = Layer(post=self.post, **self.shared(), name=f"layer{i}")(x, mask, train)
        if not self.post:
            x = self.norm("last_norm", x, train, mask)
        x = jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdims=True)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


# ---- Data


@functools.cache
def digits():
    """Images in [0, 1], labels, and how many rows each image is read to as a sequence; shuffled."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return images, labels[order].astype(np.int32), rng.integers(5, 9, len(images))


def batch_of(rows, sequences):
    """The batch of these rows of the digits, padded with zeros where they are sequences."""
    images, labels, lengths = (array[rows] for array in digits())
    if not sequences:
        return {"image": images, "label": labels}
    mask = np.arange(8) < lengths[:, None]
    return {"x": images[..., 0] * mask[..., None], "label": labels, "mask": mask}


def batches_of(rows, size, sequences):
    return [batch_of(rows[i : i + size], sequences) for i in range(0, len(rows), size)]


TRAINED_ON = np.arange(COUNT * BATCH)
HELD_OUT = np.arange(COUNT * BATCH, (COUNT + EVAL_COUNT) * BATCH)


# ---- Training


@contextlib.contextmanager
def compiled_for(model):
    """Dense models are compiled without optimisation, in half the time: they run briefly."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or not isinstance(model, ResNet))
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class Healthy(NamedTuple):
    """A trained model; ``early``: its variables after an eighth of the training."""

    model: Any
    variables: Any
    early: Any
    batches: list
    eval_batches: list


def optimizer_of(name, steps):
    rate = optax.cosine_decay_schedule(0.01, steps)
    made = {"adam": optax.adam, "sgd": lambda r: optax.sgd(lambda s: 20 * r(s), 0.9)}[name](rate)
    return optax.flatten(made)  # compiles faster


def put(variables, path, change):
    """The variables with ``change`` of the array at "params/site/scale" in its place, or a new
    array, if ``change`` is one."""
    flat = flatten_dict(variables, sep="/")
    value = change(np.asarray(flat[path])) if callable(change) else change
    return unflatten_dict({**flat, path: jnp.asarray(value)}, sep="/")


CONSTANTS = {"scale": 1, "bias": 0, "mean": 0, "var": 1}


def start(model, batch, seed):
    """Variables before training: kernels from N(0, 1 / fan in). Nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, fan_in = path[-1].key, np.prod(leaf.shape[:-1])
        if name in CONSTANTS:
            return jnp.full(leaf.shape, CONSTANTS[name], leaf.dtype)
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    inputs = inputs_of(batch)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def steps_of(model, name, steps, variables, state, batches, key):
    """One step of training for each of the batches (stacked)."""
    net, optimizer = of_model(model), optimizer_of(name, steps)

    def step(carry, batch):
        variables, state, key = carry
        key, dropout = jax.random.split(key)

        def loss(params):
            output, new = net.call(
                {**variables, "params": params},
                batch,
                train=True,
                rngs={"dropout": dropout},
                mutable=["batch_stats"],
            )
            return net.losses(output, batch).mean(), new

        gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, "params": params, **new}, state, key), None

    # A convolution in a loop is slow on CPUs: such a model gets one batch at a time, unrolled.
    length = len(batches["label"])
    (variables, state, _), _ = jax.lax.scan(
        step, (variables, state, key), batches, unroll=length == 1
    )
    return variables, state


def trained(model, **how):
    """A `Healthy` one; see `_trained`."""
    with compiled_for(model):
        return _trained(model, **how)


def _trained(model, *, size=BATCH, epochs=8, optimizer="adam", seed=0, zero=()):
    """The model after so many epochs; the scales at the sites ``zero`` start at zero."""
    sequences, dense = isinstance(model, Encoder), not isinstance(model, ResNet)
    steps = epochs * (len(TRAINED_ON) // size)
    rng, taken, early = np.random.default_rng(seed), [], None
    for _ in range(epochs):
        taken += batches_of(rng.permutation(TRAINED_ON), size, sequences)[: steps // epochs]
    variables = start(model, taken[0], seed)
    for site in zero:
        variables = put(variables, f"params/{site}/scale", np.zeros_like)
    state = optimizer_of(optimizer, steps).init(variables["params"])
    chunk = steps // 8 if dense else 1
    for first in range(0, steps - chunk + 1, chunk):
        stacked = jax.tree.map(lambda *x: np.stack(x), *taken[first : first + chunk])
        key = jax.random.fold_in(jax.random.key(seed), first)
        variables, state = steps_of(model, optimizer, steps, variables, state, stacked, key)
        early = variables if first + chunk <= steps // 8 else early
    training = batches_of(np.random.default_rng(seed + 1).permutation(TRAINED_ON), size, sequences)
    return Healthy(model, variables, early, training, batches_of(HELD_OUT, size, sequences))


@functools.partial(jax.jit, static_argnums=0)
def moved(model, variables, batch, key):
    """The running statistics after one more batch."""
    rngs = {"dropout": key}
    call = of_model(model).call
    return call(variables, batch, train=True, rngs=rngs, mutable=["batch_stats"])[1]["batch_stats"]


def refreshed(model, variables, batches, times=1):
    """The variables after so many passes in training over the batches, with fixed parameters."""
    for i in range(times):
        for j, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(i), j)
            variables = {**variables, "batch_stats": moved(model, variables, batch, key)}
    return variables


FAMILIES = {"mlp": MLP(), "resnet": ResNet(), "encoder": Encoder()}


EPOCHS = {"mlp": 8, "resnet": 12, "encoder": 20}


@functools.cache
def family(name):
    """The healthy model that faults are planted in; trained once per process."""
    return trained(FAMILIES[name], epochs=EPOCHS[name])
