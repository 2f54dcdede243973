"""Checkpoints: the whole state of a run, saved beside the training, restored bit for bit.

Orbax writes them: asynchronously, each appearing under its final name by one atomic rename, so that
a run killed at any moment leaves a whole checkpoint, or a temporary folder that the next removes.
What orbax does not notice is a damaged array (a flipped bit restores as another number), so every
checkpoint carries the digest of its state, and ``restore`` compares. A damaged checkpoint is moved
aside, never deleted, and the one before is used.

    checkpoints/
      400/              state/ (nested dicts of arrays), about/ (step, digest, names, shapes)
      600/
      damaged-800/      what could not be read
"""

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnresearch.errors import UserError
from bnresearch.leaves import Leaf, arrays_of, digest_of, leaves_of, named, nest

SCHEMA = 1
SHOWN = 10  # how many differing leaves a message lists


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says how it shows."""


def digest(state: Any) -> str:
    """The sha256 of all leaves of a pytree, as hex: equal for equal bits, on whatever devices.

    Hashed are, in the order of the leaves' path names: the path, the dtype, the shape and the bytes
    in C order. The sign of zero and the payload of NaN count; types of containers, shardings and
    weak types do not.
    """
    return digest_of(arrays_of(state))


class Checkpoints:
    """The checkpoints of one run in one folder, the newest ``keep`` of them kept.

    One process at a time writes to a folder (the lock of the run folder sees to that).

    Args:
      directory: where they lie; made at the first save.
      keep: how many of the newest stay, at least 1; with 1 there is none to fall back to.
      read_only: for looking into a run that may be running; nothing is moved, removed or saved.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise UserError(f"checkpoints to keep: {keep} given, at least 1 needed")
        self.directory = Path(directory).absolute()
        self.keep, self.read_only = keep, read_only
        self._manager: Any = None  # made by the first save: runs that only read need none
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """The steps whose checkpoints are on disk, oldest first, whether or not they are sound."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def save(self, step: int, state: Any) -> None:
        """Saves ``state`` as step ``step``, writing to disk beside the training.

        It returns when the values are read off the devices. Saving a step again does nothing where
        the state is the same, and is a RuntimeError where it is not: the state is a function of the
        step, so something is wrong. A save that failed raises in ``wait`` or at the next save.
        """
        if self.read_only:
            raise RuntimeError(f"{self.directory} was opened to read only")
        self.wait()
        arrays = arrays_of(state)
        about = _describe(step, arrays)
        if step in self.steps() and self._is_saved(step, about["digest"]):
            return
        ocp = _orbax()
        # Orbax refuses arrays without elements; the description is enough to rebuild them.
        full = nest({name: array for name, array in arrays.items() if array.size})
        items = {"state": ocp.args.StandardSave(full), "about": ocp.args.JsonSave(about)}
        self._saving = step
        # force: the manager would otherwise only accept steps beyond the newest one.
        self._open_manager().save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Waits until everything saved is on disk; raises what went wrong while writing it."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._manager = None  # it would raise this again for ever; the next save tries anew
            error.add_note(f"while writing checkpoint {self.directory / str(self._saving)}")
            raise

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """The newest sound checkpoint as (step, state), or None where none was ever saved.

        Args:
          template: a state as built for this run; its values do not matter. The result has its
            pytree types, and each leaf its dtype, shape and placement: jax arrays get the
            template's sharding (uncommitted ones stay so), numpy arrays stay numpy arrays.

        Raises:
          UserError: the checkpoint is sound, but its names, shapes or dtypes are not those of the
            template; running statistics are not float32 (in lower precision they stall); or all
            checkpoints are damaged.
        """
        self.wait()
        _check_statistics(leaves_of(template), "the state to restore into")
        damaged = []
        for step in reversed(self.steps()):
            folder = self.directory / str(step)
            try:
                arrays = _read(folder, template)
            except Damaged as error:
                if self.read_only and not folder.exists():
                    return self.restore(template)  # the run removed it: there are newer ones
                self._set_aside(step, error)
                damaged.append(step)
            else:
                return step, _place(arrays, template)
        if damaged:
            raise UserError(_all_damaged(self.directory, damaged, self.read_only))
        if any(self.directory.glob("damaged-*")):
            _warn(f"{self.directory} holds damaged checkpoints only: starting from the beginning")
        return None

    def discard(self) -> None:
        """Removes them all, sound or not."""
        self.close()
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def close(self) -> None:
        """Waits for what is being saved and ends the writing threads."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_manager(self) -> Any:
        if self._manager is None:
            ocp = _orbax()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                cleanup_tmp_directories=True,  # what killed runs left behind
                lightweight_initialize=True,  # else it parses every old checkpoint, sound or not
                # Made beside the training, a folder that cannot be made ends in a wait of 300 s.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                create=False,
                multiprocessing_options=_alone(),
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _is_saved(self, step: int, wanted: str) -> bool:
        try:
            found = _read_about(self.directory / str(step))["digest"]
        except Damaged as error:
            self._set_aside(step, error)
            return False
        if found != wanted:
            raise RuntimeError(f"{self.directory} already has step {step}, with another state")
        return True

    def _set_aside(self, step: int, error: Damaged) -> None:
        source = self.directory / str(step)
        if self.read_only:
            _warn(f"checkpoint {source} is damaged ({error}); trying the one before")
            return
        # The same step can be damaged more than once: damaged-7, damaged-7.1, ...
        names = (f"damaged-{step}" + (f".{n}" if n else "") for n in itertools.count())
        target = next(path for name in names if not (path := self.directory / name).exists())
        source.rename(target)
        if self._manager is not None:
            self._manager.reload()
        _warn(
            f"checkpoint {source} is damaged ({error}); moved to {target.name}, "
            "trying the one before"
        )


def _orbax() -> Any:
    """Orbax, imported when first needed: refusing bad input need not wait for it."""
    import orbax.checkpoint as ocp

    return ocp


def _alone() -> Any:
    """Of several processes only one has to do with a folder: it waits for no other."""
    own = jax.process_index()
    return _orbax().options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def _reader(handler: Callable[..., Any]) -> Any:
    options = _alone()
    return _orbax().Checkpointer(
        handler(multiprocessing_options=options), multiprocessing_options=options
    )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _all_damaged(directory: Path, steps: list[int], read_only: bool) -> str:
    listed = ", ".join(str(step) for step in sorted(steps))
    advice = "" if read_only else ", or run the same command again to start from the beginning"
    return (
        f"all checkpoints in {directory} are damaged (steps {listed}): put a sound copy back under "
        f"its step number{advice}"
    )


# ---- What a checkpoint says about itself


def _describe(step: int, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    about = {
        "schema": SCHEMA,
        "step": step,
        "digest": digest_of(arrays),
        "leaves": {name: [str(a.dtype.name), list(a.shape)] for name, a in arrays.items()},
    }
    return about | {"check": _check(about)}


def _check(about: Mapping[str, Any]) -> str:
    """Without it a flipped bit in a shape would read as "this checkpoint is of another model"."""
    content = {key: value for key, value in about.items() if key != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_about(folder: Path) -> dict[str, Any]:
    ocp = _orbax()
    about = _try(lambda: _reader(ocp.JsonCheckpointHandler).restore(folder / "about"))
    if not isinstance(about, dict) or about.get("check") != _check(about):
        raise Damaged("its description is not what was written")
    if about["schema"] != SCHEMA:
        raise UserError(
            f"{folder} has checkpoint schema {about['schema']}, this version reads {SCHEMA}: "
            "use the version of bnresearch that wrote it (status.json of the run names it)"
        )
    if str(about["step"]) != folder.name:
        raise Damaged(f"it holds step {about['step']}")
    return about


def _read(folder: Path, template: Any) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by path name, proven to be those that were saved."""
    about = _read_about(folder)
    saved = {name: Leaf(dtype, tuple(shape)) for name, (dtype, shape) in about["leaves"].items()}
    _check_statistics(saved, str(folder))
    _check_same(saved, leaves_of(template), folder)
    ocp = _orbax()
    empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in saved.items()}
    full = nest({name: array for name, array in empty.items() if array.size})
    args = ocp.args.StandardRestore(full)
    reader = _reader(ocp.StandardCheckpointHandler)
    arrays = empty | named(_try(lambda: reader.restore(folder / "state", args=args)))
    if digest_of(arrays) != about["digest"]:
        raise Damaged("its values are not those that were saved")
    return arrays


def _try(read: Callable[[], Any]) -> Any:
    """``read()``, where whatever a broken file makes orbax raise means: damaged."""
    with _stragglers_ignored():
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        # Here nothing refers to the error any more: what it held can report itself, and be ignored.
        time.sleep(0.2)
        gc.collect()
    raise Damaged(reason)


@contextlib.contextmanager
def _stragglers_ignored() -> Iterator[None]:
    """Keeps stderr to one line for a damaged checkpoint.

    When one array cannot be read, orbax closes its event loop under the reads of the others; these
    report from threads of tensorstore, and from asyncio once collected, where nobody can catch.
    """
    report, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def report_others(what: "sys.UnraisableHookArgs") -> None:
        if str(what.exc_value) != "Event loop is closed":
            report(what)

    def others(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = report_others
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
        sys.unraisablehook = report


def _check_statistics(leaves: Mapping[str, Leaf], where: str) -> None:
    for name, leaf in leaves.items():
        inexact = jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
        if "batch_stats" in name.split("/") and inexact and leaf.dtype != "float32":
            raise UserError(
                f"{where}: running statistics must be float32, {name} is {leaf.dtype}. In lower "
                "precision the moving average stalls before it arrives; convert and save again."
            )


def _check_same(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], folder: Path) -> None:
    names = sorted(saved.keys() | wanted.keys())
    differing = [name for name in names if saved.get(name) != wanted.get(name)]
    if not differing:
        return
    lines = [
        f"  {name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in differing[:SHOWN]
    ]
    if len(differing) > SHOWN:
        lines.append(f"  ... and {len(differing) - SHOWN} more")
    if all(name.startswith("batch_stats/") for name in differing):
        what = "misses running statistics of the model, or has some that are not in it"
    else:
        what = "is of another model or optimizer"
    raise UserError(
        f"checkpoint {folder} {what}; use the config it was trained with:\n" + "\n".join(lines)
    )


def _place(arrays: Mapping[str, np.ndarray], template: Any) -> Any:
    leaves = [arrays[name] for name in named(template)]
    return placed_as(jax.tree.unflatten(jax.tree.structure(template), leaves), template)


def placed_as(arrays: Any, template: Any) -> Any:
    """A tree of numpy arrays, each leaf placed as that of the template is; see ``restore``."""
    return jax.tree.map(_place_leaf, arrays, template)


def _place_leaf(array: np.ndarray, like: Any) -> Any:
    if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return array
    # A leaf that was free to move between devices must stay so, or the step compiles anew.
    committed = getattr(like, "committed", True)
    return jax.device_put(array, like.sharding if committed else None)
