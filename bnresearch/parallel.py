"""Devices, the mesh (group, replica), the three modes, and the scope of statistics in each.

A mode says how one pure step runs on all devices. The step itself only asks its layout for the rows
of the batch that it handles, for the scope of its norms, and where to average. Which average is the
right one depends on how the mode transposes collectives, and the wrong one is silent (parameters
are far off after five steps), so it is decided here and nowhere else:

=========  =====================  ====================================================
mode       what the step sees     the gradient of the mean loss
=========  =====================  ====================================================
jit        the whole batch        of the loss as it is
shard_map  its device's rows      of ``pmean(loss)``: with check_vma=True the transpose
                                  of the replicated parameters already sums
pmap       its device's rows      ``psum`` of the gradients of the local losses' shares
=========  =====================  ====================================================
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnresearch.errors import UserError, lookup
from bnresearch.placing import addressable, pick_devices, placed
from bnresearch.sets import Scope

AXES = ("group", "replica")
PMAP_AXIS = "device"


class Sharing(NamedTuple):
    """What a scope asks for: statistics shared by so many devices, or by so many examples; both
    None for the whole batch."""

    devices: int | None = None
    examples: int | None = None


def parse_scope(text: str) -> Sharing:
    """What ``global``, ``device``, ``group:N`` (devices) or ``ghost:N`` (examples) asks for.

    Raises:
      UserError: anything else.
    """
    if text in ("global", "device"):
        return Sharing(devices=1 if text == "device" else None)
    match = re.fullmatch(r"(group|ghost):(\d+)", text)
    if not match or int(match[2]) < 1:
        raise UserError(
            f"unknown norm.scope {text!r}; choose global, device, group:N (N devices share "
            "statistics) or ghost:N (N examples do)"
        )
    count = int(match[2])
    return Sharing(devices=count) if match[1] == "group" else Sharing(examples=count)


def _groups(scope: str, devices: int) -> int:
    size = parse_scope(scope).devices or devices
    if devices % size:
        raise UserError(
            f"norm.scope={scope} on {devices} devices: groups of {size} do not divide them; "
            f"choose N among {[n for n in range(1, devices + 1) if devices % n == 0]}"
        )
    return devices // size


def _check_ghost(scope: str, size: int, batch: int) -> None:
    if batch % size:
        raise UserError(
            f"norm.scope={scope}: sets of {size} examples do not divide the {batch} of a "
            f"(micro)batch; choose N among {[n for n in range(2, batch + 1) if batch % n == 0]}"
        )


def _ghosts_on_devices(scope: str, size: int, local: int, devices: int) -> tuple[int, int]:
    """Groups of devices and sets per device, for sets of ``size`` examples where every device
    holds ``local``: several devices per set, or several sets per device."""
    if size % local == 0 and devices % (size // local) == 0:
        return devices // (size // local), 1
    if local % size == 0:
        return devices, local // size
    raise UserError(
        f"norm.scope={scope}: with {local} examples on each of {devices} devices a set would cover "
        "part of a device; choose another N or number of devices, or parallel.mode=jit"
    )


class Layout(ABC):
    """How arrays lie on the devices and how a step runs over them; one subclass per mode.

    Attributes:
      mesh: ``[groups, devices per group]``; statistics are merged within a group.
      batch_size: examples per optimizer step on all devices together.
      accumulate: microbatches per step.
      scope: what to hand to the norms of a model that runs inside the step.
    """

    def __init__(self, scope: str, devices: int, batch_size: int, accumulate: int = 1):
        found = pick_devices(devices)
        groups = _groups(scope, len(found))
        self.batch_size, self.accumulate = batch_size, accumulate
        if batch_size % (len(found) * accumulate):
            raise UserError(
                f"data.batch_size={batch_size} does not divide into {len(found)} devices x "
                f"{accumulate} microbatches (train.accumulate); choose a multiple of "
                f"{len(found) * accumulate}, or fewer devices (parallel.devices)"
            )
        splits, size = 1, parse_scope(scope).examples
        if size is not None:
            _check_ghost(scope, size, self.microbatch)
            groups, splits = self._ghosts(scope, size, len(found))
        self.mesh = Mesh(np.array(found).reshape(groups, -1), AXES)
        self.scope = self._make_scope(groups, splits)

    def _ghosts(self, scope: str, size: int, devices: int) -> tuple[int, int]:
        """Groups of devices and sets per device for sets of ``size`` examples."""
        return _ghosts_on_devices(scope, size, self.microbatch // devices, devices)

    @abstractmethod
    def _make_scope(self, groups: int, splits: int) -> Scope:
        """The scope of statistics for ``groups`` groups of devices, ``splits`` sets on each."""

    @property
    def device_count(self) -> int:
        return self.mesh.size

    @property
    def shares(self) -> int:
        """In how many parts, handled by as many calls of the step, a batch comes."""
        return self.device_count

    @property
    def microbatch(self) -> int:
        """Examples per microbatch on all devices together."""
        return self.batch_size // self.accumulate

    # What the step calls, traced.
    def rows(self) -> jax.Array:
        """Positions within the microbatch that this call of the step handles, ``[rows]`` int32."""
        local = self.microbatch // self.shares
        return self._share() * local + jnp.arange(local)

    @abstractmethod
    def _share(self) -> jax.Array | int:
        """Which of the ``shares`` this call of the step handles."""

    def fold_key(self, key: jax.Array) -> jax.Array:
        """A random key of this device's own, for masks that are drawn per device (dropout)."""
        return key if self.shares == 1 else jax.random.fold_in(key, self._share())

    def constrain(self, batch: Any) -> Any:
        """Spread a batch made inside the step over the devices."""
        return batch

    def mean_loss(self, loss: jax.Array) -> jax.Array:
        """Applied to the loss before it is differentiated."""
        return loss

    def mean_over_devices(self, tree: Any) -> Any:
        """Applied to gradients and metrics after differentiation."""
        return tree

    # What the loop calls.
    @abstractmethod
    def compile(
        self, step: Callable[..., Any], *, sharded_feed: bool, donate: bool = True
    ) -> Callable[..., Any]:
        """Compile ``step(state, feed, numbers, count) -> tree`` for all devices.

        The feed is a batch from ``put_batch`` if ``sharded_feed``, else a tree from ``put``. The
        result is the same on every device. ``donate`` gives the state's memory to the result.
        """

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any) -> Any:
        """Copy a tree to every device, as the compiled step takes it."""
        return placed(tree, self.replicated())

    def like(self, tree: Any) -> Any:
        """What ``put`` would make of a tree of shapes: shapes and shardings, without values."""
        sharding = self.replicated()
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def get(self, tree: Any) -> Any:
        """The one tree of which ``put`` made copies, for evaluation and for checkpoints."""
        return tree

    def put_batch(self, batch: Any) -> Any:
        """Spread a host batch ``[batch_size, ...]`` over the devices, by microbatch first; of
        several processes each gives its own rows (`data.base.Share`)."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXES))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                sharding, x.reshape(self.accumulate, -1, *x.shape[1:])
            ),
            batch,
        )

    def put_rows(self, batch: Any) -> Any:
        """Spread a host batch for evaluation over the devices; of several processes each gives its
        own rows. On one process a batch of any size lies on every device."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.replicated())
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class JitLayout(Layout):
    """One program over the whole batch, which the compiler splits: the default."""

    def _ghosts(self, scope: str, size: int, devices: int) -> tuple[int, int]:
        # The compiler spreads any sets over the devices; the mesh stays one group.
        return 1, self.microbatch // size

    def _make_scope(self, groups: int, splits: int) -> Scope:
        sets, devices = groups * splits, self.device_count
        if devices == 1:
            return Scope(splits=sets)
        # Sets of several devices are cut where the devices' shares end.
        parts = devices // sets if devices % sets == 0 else 1
        mesh = Mesh(self.mesh.devices.reshape(-1, parts), AXES)
        return Scope(splits=sets, parts=parts, mesh=mesh)

    @property
    def shares(self) -> int:
        return 1

    def _share(self) -> int:
        return 0

    def constrain(self, batch: Any) -> Any:
        if self.device_count == 1:
            return batch
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        return jax.lax.with_sharding_constraint(batch, sharding)

    def compile(
        self, step: Callable[..., Any], *, sharded_feed: bool, donate: bool = True
    ) -> Callable[..., Any]:
        donated = (0,) if donate else ()
        return jax.jit(step, donate_argnums=donated, out_shardings=self.replicated())


class ShardMapLayout(Layout):
    """The per-device view, written out with named axes on the mesh (group, replica)."""

    def _make_scope(self, groups: int, splits: int) -> Scope:
        if groups == self.device_count > 1:
            return Scope(pool=AXES, splits=splits)
        return Scope(merge=AXES) if groups == 1 else Scope(merge="replica", pool="group")

    def _share(self) -> jax.Array:
        return jax.lax.axis_index(AXES)

    def mean_loss(self, loss: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss, AXES)

    def compile(
        self, step: Callable[..., Any], *, sharded_feed: bool, donate: bool = True
    ) -> Callable[..., Any]:
        everywhere = PartitionSpec()
        feed = PartitionSpec(None, AXES) if sharded_feed else everywhere
        mapped = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(everywhere, feed, everywhere, everywhere),
            out_specs=everywhere,
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())


class PmapLayout(Layout):
    """The mode of the field's older code: one program per device, arrays stacked by device."""

    def _make_scope(self, groups: int, splits: int) -> Scope:
        if groups == 1 and splits == 1:
            return Scope(merge=PMAP_AXIS)
        if groups == self.device_count:
            return Scope(pool=PMAP_AXIS, splits=splits)
        indices = np.arange(self.device_count).reshape(groups, -1)
        merged = tuple(tuple(row) for row in indices.tolist())
        return Scope(merge=PMAP_AXIS, merge_groups=merged, pool=PMAP_AXIS)

    def _share(self) -> jax.Array:
        return jax.lax.axis_index(PMAP_AXIS)

    def mean_loss(self, loss: jax.Array) -> jax.Array:
        # Its share of the mean over all devices: then what norms see in their backward pass is as
        # large as in the other modes.
        return loss / self.device_count

    def mean_over_devices(self, tree: Any) -> Any:
        return jax.lax.psum(tree, PMAP_AXIS)

    @cached_property
    def _own(self) -> np.ndarray:
        """The devices of this process: of several, pmap takes and gives what is on those."""
        own = jax.process_index()
        return np.array([d for d in self.mesh.devices.flat if d.process_index == own])

    def _stacked(self) -> NamedSharding:
        return NamedSharding(Mesh(self._own, PMAP_AXIS), PartitionSpec(PMAP_AXIS))

    def compile(
        self, step: Callable[..., Any], *, sharded_feed: bool, donate: bool = True
    ) -> Callable[..., Any]:
        return jax.pmap(
            step,
            axis_name=PMAP_AXIS,
            devices=list(self.mesh.devices.flat),
            in_axes=(0, 0, None, None),
            donate_argnums=(0,) if donate else (),
        )

    def put(self, tree: Any) -> Any:
        whole = NamedSharding(Mesh(self._own, PMAP_AXIS), PartitionSpec())
        return self._stack(jax.device_put(jax.tree.map(addressable, tree), whole))

    @cached_property
    def _stack(self) -> Callable[[Any], Any]:
        def stack(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self._own), *x.shape)), tree)

        return jax.jit(stack, out_shardings=self._stacked())

    def like(self, tree: Any) -> Any:
        sharding, count = self._stacked(), len(self._own)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding), tree
        )

    def get(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    def put_batch(self, batch: Any) -> Any:
        def stack(x: np.ndarray) -> Any:
            local = self.microbatch // self.device_count
            x = x.reshape(self.accumulate, len(self._own), local, *x.shape[1:])
            return jax.device_put(x.swapaxes(0, 1), self._stacked())

        return jax.tree.map(stack, batch)


MODES: dict[str, type[Layout]] = {"jit": JitLayout, "shard_map": ShardMapLayout, "pmap": PmapLayout}


def make_layout(
    mode: str, scope: str, devices: int, batch_size: int, accumulate: int = 1
) -> Layout:
    """The layout of ``mode`` on the first ``devices`` devices (0: all).

    Raises:
      UserError: unknown mode or scope, too few devices, or a batch that does not divide.
    """
    kind = lookup(MODES, mode, "parallel.mode")
    return kind(scope, devices, batch_size, accumulate)
