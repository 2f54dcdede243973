"""Runs that differ in numbers only, trained together: their compiled calls are made as one.

A *member* is a run like any other, with its own loop, folder, checkpoints and end, in a thread of
its own. Threads only serve to leave a loop in the middle: one at a time goes on, up to its next
call of a compiled function, and once all wait, calls of one function are made as one vmapped call.
So the loop knows nothing of populations, and what it uses need not be made for threads.

A vmapped call is always of the same size, empty places filled with repetitions: then it compiles
once, and the bits of a member depend neither on the others nor on how many there are.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bnresearch import experiment as experiments
from bnresearch.experiment import Experiment, Program
from bnresearch.models import MODELS
from bnresearch.parallel import JitLayout

Tree = Any

MEMBERS = 16  # of a population where nobody says how many


def size(config: ConfigDict) -> int:
    """How many runs of a program train together where nobody says how many: the rule.

    MEMBERS for models without convolutions on an accelerator, where a small net's step takes as
    long as starting its kernels, however many members each is for. 1 otherwise: on CPU members gain
    nothing (docs/sweeps.md has the measurements), and vmapped convolutions are grouped ones.

    Raises:
      UserError: what is wrong with the config.
    """
    program = experiments.prepare(config).program
    small = MODELS[config.model.name].dense and _platform(program) != "cpu"
    return MEMBERS if small and possible(program) else 1


def _platform(program: Program) -> str:
    return program.layout.mesh.devices.flat[0].platform


def possible(program: Program) -> bool:
    """Whether runs of a program can be vmapped: on one device, with the data on it."""
    layout = program.layout
    alone = isinstance(layout, JitLayout) and layout.device_count == 1
    return alone and not program.dataset.sharded_feed


class Left(KeyboardInterrupt):
    """A member is to end at once: raised where it waits."""


class Call(NamedTuple):
    """One member's share of a vmapped call.

    Attributes:
      function: (shares, common) -> a result for each share.
      own: the member's own arguments.
      feed: arrays that are the very same for all calls made together.
      step: of the evaluation, equal for all calls made together.
    """

    function: Callable[[Sequence[Tree], Tree], Sequence[Tree]]
    own: Tree
    feed: dict[str, jax.Array]
    step: int = 0

    def key(self) -> tuple[Any, ...]:
        """Equal for calls that can be made together. One member may be at another split."""
        return self.function, self.step, *map(id, self.feed.values())


class Member:
    """A run that waits at every compiled call.

    Args:
      work: carries out the run, given the function to prepare its experiment with.
      members: how many share a call.
    """

    def __init__(self, work: Callable[[Any], Any], members: int):
        self.members = members
        self.call: Call | None = None  # at which it waits
        self.answer: Any = None
        self.result: Any = None
        self._work, self._going = work, False
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waits: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def advance(self) -> bool:
        """Lets it go on with ``answer``; whether it waits at another ``call``, or has ended."""
        self.call = None
        if self._thread.ident is None:
            self._thread.start()
        self._going = True
        self._turn.put(None)
        self._return()
        if self.call is None:
            self._thread.join()
        return self.call is not None

    def _return(self) -> None:
        self._waits.get()
        self._going = False

    def leave(self) -> None:
        """Ends it where it waits; its newest checkpoint is left."""
        if self._going:  # whoever let it go on was interrupted
            self._return()
        while self.call is not None:
            self.answer = Left()
            self.advance()

    def _live(self) -> None:
        self._turn.get()
        try:
            self.result = self._work(self.prepare)
        except BaseException as error:
            self.result = error
        self._waits.put(None)

    def _wait(self, call: Call) -> Any:
        self.call = call
        self._waits.put(None)
        self._turn.get()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def prepare(self, config: ConfigDict) -> Experiment:
        """``experiment.prepare``, with a program whose compiled calls wait for those of others. One
        that cannot be vmapped is left alone: its members run one after the other."""
        experiment = experiments.prepare(config)
        program = experiment.program
        if self.members == 1 or not possible(program):
            return experiment
        # Of its own is the order of its epochs, which a dataset keeps for one run at a time.
        dataset = copy.copy(program.dataset)
        fixed = _fixed(program)
        train, evaluate = _train(program, self.members), _evaluate(experiment, self.members)

        def train_call(state: Tree, feed: Tree, numbers: Tree, count: Any) -> Tree:
            own = {name: value for name, value in feed.items() if name not in fixed}
            same = {name: feed[name] for name in fixed}
            return self._wait(Call(train, (state, own, numbers, count), same))

        def eval_call(params: Tree, batch_stats: Tree, feed: Tree, step: Any) -> Tree:
            return self._wait(Call(evaluate, (params, batch_stats), feed, int(step)))

        vmapped = program._replace(
            dataset=dataset, train=train_call, eval_steps={"running": eval_call}
        )
        return experiment._replace(program=vmapped, members=self.members)


class Population:
    """Runs whose compiled calls are made together, up to ``members`` of them at a time."""

    def __init__(self, members: int):
        self.size = members
        self.members: list[Member] = []

    def __len__(self) -> int:
        return len(self.members)

    def add(self, work: Callable[[Any], Any]) -> None:
        """One more run; ``work`` carries it out, given a function to prepare its experiment."""
        self.members.append(Member(work, self.size))

    def advance(self) -> Iterator[Any]:
        """Every member goes on to its next compiled call; then these are made. Yields what ``work``
        returned, for those that have come to their end.

        Raises whatever ended a member's work.
        """
        for member in list(self.members):
            if not member.advance():
                self.members.remove(member)
                if isinstance(member.result, BaseException):
                    raise member.result
                yield member.result
        waiting: dict[Any, list[Member]] = {}
        for member in self.members:
            assert member.call is not None
            waiting.setdefault(member.call.key(), []).append(member)
        for together in waiting.values():
            _answer(together)

    def close(self) -> None:
        """Ends those that are left, at once."""
        for member in self.members:
            member.leave()
        self.members.clear()


def _answer(members: Sequence[Member]) -> None:
    calls = [member.call for member in members if member.call is not None]
    try:
        first = calls[0]
        common = first.feed, np.int32(first.step)
        answers = first.function([call.own for call in calls], common)
    except Exception as error:  # each is told, and fails with its own traceback
        reason = f"{type(error).__name__}: {error}"
        text = f"{members[0].members} members together: {reason}"
        answers = [RuntimeError(text) for _ in members]
    for member, answer in zip(members, answers, strict=False):
        member.answer = answer


# ---- What is kept with a program


def _fixed(program: Program) -> tuple[str, ...]:
    """What in a feed is the same array for every seed and step."""
    if ("fixed", 0) not in program.together:
        first, other = program.dataset.feed(0, 0), program.dataset.feed(1, 0)
        same = tuple(name for name in first if first[name] is other[name])
        program.together["fixed", 0] = same
    return program.together["fixed", 0]


def _train(program: Program, members: int) -> Callable[..., Any]:
    def train(own: Tree, common: Tree) -> Tree:
        state, feed, numbers, count = own
        return program.train(state, {**common[0], **feed}, numbers, count)

    return _kept(program, ("train", members), train)


def _evaluate(experiment: Experiment, members: int) -> Callable[..., Any]:
    step = experiments.eval_step(experiment, "running")

    def evaluate(own: Tree, common: Tree) -> Tree:
        return step(*own, *common)

    return _kept(experiment.program, ("running", members), evaluate)


def _kept(
    program: Program, key: tuple[str, int], function: Callable[..., Any]
) -> Callable[..., Any]:
    if key not in program.together:
        program.together[key] = vmapped(function, key[1], program.layout.replicated())
    return program.together[key]


def vmapped(function: Callable[[Tree, Tree], Tree], members: int, sharding: Any) -> Any:
    """``(owns, common) -> [function(own, common) for own in owns]``, for up to ``members`` owns, as
    one compiled call over all of them stacked. Stacking is part of it: a state has dozens of small
    arrays, each of which would be a call by itself."""

    def stacked(owns: Sequence[Tree], common: Tree) -> list[Tree]:
        own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owns)
        results = jax.vmap(function, in_axes=(0, None))(own, common)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(members)]

    # Nothing is donated: what fills empty places would be given away more than once.
    compiled = jax.jit(stacked, out_shardings=sharding)

    def call(owns: Sequence[Tree], common: Tree) -> list[Tree]:
        owns = list(owns)
        return compiled(owns + owns[-1:] * (members - len(owns)), common)[: len(owns)]

    return call
