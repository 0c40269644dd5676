"""The search: breadth first through every state, then backwards from the ends."""

import gc
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from tests.model import invariants
from tests.model.compiled import Model, Parts, Row
from tests.model.parts import Violation
from tests.model.world import World


@dataclass(frozen=True)
class Result:
    """The result of a search."""

    world: str
    states: int
    steps: int
    depth: int
    """Steps from the beginning to the farthest state."""
    ends: int
    whole: bool
    """Whether every state was explored."""
    seconds: float
    taken: frozenset[Row]
    """Rows of the machines' tables that were used."""
    rule: str | None
    """The invariant that does not hold."""
    trace: tuple[tuple[str, Parts], ...]
    """The shortest trace to a state in which it does not."""

    @property
    def good(self) -> bool:
        return self.rule is None

    def __str__(self) -> str:
        what = "whole" if self.whole else "not whole"
        verdict = "good" if self.good else f"BROKEN after {len(self.trace) - 1} steps: {self.rule}"
        return (
            f"{self.world:<24} {self.states:>9,} states {self.steps:>10,} steps  depth {self.depth:>3} {self.seconds:6.1f} s "
            f"{self.states / max(self.seconds, 1e-9):>9,.0f}/s  {what}: {verdict}"
        )


def explore(world: World, limit: int | None = None) -> Result:
    """Search a world; with a limit, at most that many states."""
    with _no_collection():
        return _Search(world, limit).run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch off the search for garbage cycles: there are none, and it takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Search:
    def __init__(self, world: World, limit: int | None) -> None:
        self._model = Model(world)
        self._limit = limit
        self._states: list[int] = []
        self._parents = array("i")
        self._edges = array("I")
        """Targets of the steps without a fault, in the order of their sources."""
        self._offsets = array("L", [0])
        self._ends = bytearray()
        """For each explored state, whether it is an end."""
        self._steps = 0
        self._depth = 0

    def run(self) -> Result:
        began = time.perf_counter()
        rule, found, last = self._forward()
        looked_at = len(self._ends)
        whole = looked_at == len(self._states)
        if rule is None:
            rule, found = self._backward()
        trace = () if found is None else (*self._way(found), *(((last, self._model.parts(self._states[found])),) if last else ()))
        return Result(
            self._model.world.name,
            looked_at,
            self._steps,
            self._depth,
            sum(self._ends),
            whole,
            time.perf_counter() - began,
            frozenset(self._model.taken),
            rule,
            trace,
        )

    def _forward(self) -> tuple[str | None, int | None, str]:
        """Explore every state. Return the broken rule, the number of the state, and the last step if that leads to no state."""
        model, states, parents, edges = self._model, self._states, self._parents, self._edges
        first = model.start()
        numbers = {first: 0}
        states.append(first)
        parents.append(-1)
        level_end, at = 1, 0
        while at < len(states) and at != self._limit:
            if at == level_end:
                self._depth += 1
                level_end = len(states)
            state = states[at]
            try:
                steps = model.steps(state)
            except Violation as violation:
                return violation.rule, at, str(violation)
            self._steps += len(steps)
            for cost, _, after in steps:
                number = numbers.setdefault(after, len(states))
                if number == len(states):
                    states.append(after)
                    parents.append(at)
                    if (rule := model.wrong(after)) is not None:
                        return rule, number, ""
                if cost < 0:
                    edges.append(number)
            self._offsets.append(len(edges))
            self._ends.append(model.is_end(state))
            at += 1
        return None, None, ""

    def _backward(self) -> tuple[str | None, int | None]:
        """Return the first state from which an end, or a cancel, is not possible, and the rule that this breaks."""
        model = self._model
        if model.world.checked(invariants.STUCK):
            found = self._reaching(self._ends).find(0)
            if found >= 0:
                return invariants.STUCK, found
        cancelled = [n for n in range(len(self._ends)) if model.is_cancelled(self._states[n])]
        if cancelled and model.world.checked(invariants.CANCEL):
            home = bytearray(end and model.is_home(state) for end, state in zip(self._ends, self._states, strict=False))
            reaching = self._reaching(home)
            found = next((n for n in cancelled if not reaching[n]), -1)
            if found >= 0:
                return invariants.CANCEL, found
        return None, None

    def _reaching(self, ends: bytearray) -> bytearray:
        """Return for each state whether an end can be reached without a further fault. True for states that were not explored."""
        edges, offsets = self._edges, self._offsets
        good = ends + b"\x01" * (len(self._states) - len(ends))
        left = [n for n in range(len(ends) - 1, -1, -1) if not good[n]]
        before = -1
        while len(left) != before:
            before, rest = len(left), []
            for n in left:
                for target in edges[offsets[n] : offsets[n + 1]]:
                    if good[target]:
                        good[n] = 1
                        break
                else:
                    rest.append(n)
            left = rest
        return good

    def _way(self, number: int) -> Iterator[tuple[str, Parts]]:
        """Yield the steps to a state, each with the parts of the state after it."""
        way = []
        while number >= 0:
            way.append(self._states[number])
            number = self._parents[number]
        way.reverse()
        yield "the beginning", self._model.parts(way[0])
        for before, after in pairwise(way):
            label = next(label for _, label, state in self._model.steps(before) if state == after)
            yield label, self._model.parts(after)
