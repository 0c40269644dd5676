"""The search: breadth first through every state, then backwards from the ends.

A state is five small numbers: source, destination, hypervisors, drivers with their messages, and the budget of faults. Each
number names a part (`tests.model.parts`). The rules are run once for each pair of parts that they look at, and their outcome is
kept; so the loop over millions of steps only looks up and puts together.
"""

import gc
import time
from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.model import destination_agent, hosts, invariants, network, source_agent
from tests.model.parts import Agent, Budget, Cost, Guest, Hosts, Talk, Violation
from tests.model.world import World

P = TypeVar("P", bound=Hashable)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

State = tuple[int, int, int, int, int]
Pair = tuple[int, int]
Two = tuple[tuple[str, int, int, int], ...]
"""Steps that change two parts: label, the parts after, the cost."""
One = tuple[tuple[str, int, int], ...]


class Names(Generic[P]):
    """Numbers for parts, and parts for numbers."""

    def __init__(self) -> None:
        self.parts: list[P] = []
        self._numbers: dict[P, int] = {}

    def __call__(self, part: P) -> int:
        number = self._numbers.setdefault(part, len(self.parts))
        if number == len(self.parts):
            self.parts.append(part)
        return number


class Table(dict[K, V]):
    """What a rule says, asked once for each key."""

    def __init__(self, rule: Callable[[K], V]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, key: K) -> V:
        value = self[key] = self._rule(key)
        return value


class Model:
    """One world, compiled as it is explored."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.agents: Names[Agent] = Names()
        self.hosts: Names[Hosts] = Names()
        self.talks: Names[Talk] = Names()
        self.budgets: Names[Budget] = Names()
        self._source_hosts: Table[Pair, Two] = Table(lambda k: self._agent_hosts(source_agent.steps, k))
        self._destination_hosts: Table[Pair, Two] = Table(lambda k: self._agent_hosts(destination_agent.steps, k))
        self._hosts: Table[int, One] = Table(self._of_hosts)
        self._talk: Table[int, One] = Table(self._of_talk)
        self._talk_source: Table[Pair, Two] = Table(lambda k: self._talk_agent(network.at_source, k))
        self._talk_destination: Table[Pair, Two] = Table(lambda k: self._talk_agent(network.at_destination, k))
        self._asks: Table[Pair, One] = Table(self._of_asks)
        self._spend: Table[Pair, int] = Table(self._spent)
        self._broken: Table[tuple[int, int, int], tuple[str, ...]] = Table(self._is_broken)
        self._told: Table[int, frozenset[tuple[int, str]]] = Table(lambda t: invariants.told(self.talks.parts[t]))
        self._told_wrong: Table[Pair, bool] = Table(self._is_told_wrong)
        self._settled: Table[tuple[int, int, int], bool] = Table(self._is_settled)
        self._idle: Table[Pair, bool] = Table(lambda k: invariants.nobody_drives(self.agents.parts[k[0]], self.talks.parts[k[1]]))

    def start(self) -> State:
        agent = self.agents(Agent())
        return agent, agent, self.hosts(Hosts(Guest.HELD) if self.world.user_paused else Hosts()), self.talks(network.start(self.world)), self.budgets(self.world.budget)

    def steps(self, state: State) -> list[tuple[int, str, State]]:
        """Every step from a state: its cost, what happens, the state after it. Raises `Violation`."""
        s, d, h, t, b = state
        spend = self._spend
        out: list[tuple[int, str, State]] = []
        add = out.append
        for label, one, two, cost in self._source_hosts[s, h]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (one, d, two, t, left)))
        for label, one, two, cost in self._destination_hosts[d, h]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (s, one, two, t, left)))
        for label, one, cost in self._hosts[h]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (s, d, one, t, left)))
        for label, one, cost in self._talk[t]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (s, d, h, one, left)))
        for label, one, two, cost in self._talk_source[t, s]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (two, d, h, one, left)))
        for label, one, two, cost in self._talk_destination[t, d]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (s, two, h, one, left)))
        for label, one, cost in self._asks[s, d]:
            if (left := b if cost < 0 else spend[b, cost]) >= 0:
                add((cost, label, (s, one, h, t, left)))
        return out

    def wrong(self, state: State) -> str | None:
        """The first invariant that a state breaks."""
        s, d, h, t, _ = state
        if names := self._broken[s, d, h]:
            return names[0]
        if self._told[t] and self._told_wrong[t, d] and self.world.checked(invariants.TOLD):
            return invariants.TOLD
        return None

    def is_end(self, state: State) -> bool:
        s, d, h, t, _ = state
        return self._settled[s, d, h] and self._idle[s, t]

    def parts(self, state: State) -> tuple[Agent, Agent, Hosts, Talk, Budget]:
        s, d, h, t, b = state
        return self.agents.parts[s], self.agents.parts[d], self.hosts.parts[h], self.talks.parts[t], self.budgets.parts[b]

    # ---- the rules, by number

    def _agent_hosts(self, rule: Callable[[World, Agent, Hosts], Iterable[tuple[str, Agent, Hosts, Cost]]], key: Pair) -> Two:
        steps = rule(self.world, self.agents.parts[key[0]], self.hosts.parts[key[1]])
        return tuple((label, self.agents(agent), self.hosts(after), int(cost)) for label, agent, after, cost in steps)

    def _talk_agent(self, rule: Callable[[World, Talk, Agent], Iterable[tuple[str, Talk, Agent, Cost]]], key: Pair) -> Two:
        steps = rule(self.world, self.talks.parts[key[0]], self.agents.parts[key[1]])
        return tuple((label, self.talks(talk), self.agents(agent), int(cost)) for label, talk, agent, cost in steps)

    def _of_hosts(self, key: int) -> One:
        return tuple((label, self.hosts(after), int(cost)) for label, after, cost in hosts.happens(self.world, self.hosts.parts[key]))

    def _of_talk(self, key: int) -> One:
        return tuple((label, self.talks(after), int(cost)) for label, after, cost in network.steps(self.world, self.talks.parts[key]))

    def _of_asks(self, key: Pair) -> One:
        steps = destination_agent.asks(self.world, self.agents.parts[key[0]], self.agents.parts[key[1]])
        return tuple((label, self.agents(after), int(cost)) for label, after, cost in steps)

    def _spent(self, key: Pair) -> int:
        """The budget after one more fault; -1 when there is none left."""
        left = list(self.budgets.parts[key[0]])
        left[key[1]] -= 1
        return -1 if left[key[1]] < 0 else self.budgets(tuple(left))

    def _is_broken(self, key: tuple[int, int, int]) -> tuple[str, ...]:
        s, d, h = key
        names = invariants.broken(self.agents.parts[s], self.agents.parts[d], self.hosts.parts[h])
        return tuple(name for name in names if self.world.checked(name))

    def _is_told_wrong(self, key: Pair) -> bool:
        return invariants.told_wrong(self.agents.parts[key[1]], self._told[key[0]])

    def _is_settled(self, key: tuple[int, int, int]) -> bool:
        s, d, h = key
        return invariants.settled(self.agents.parts[s], self.agents.parts[d], self.hosts.parts[h])


@dataclass
class Result:
    """What a search found."""

    world: World
    states: int
    steps: int
    depth: int
    """Steps from the beginning to the farthest state."""
    seconds: float
    whole: bool
    """Every state that there is was looked at."""
    ends: int
    rule: str | None = None
    """The invariant that does not hold."""
    trace: list[tuple[str, tuple[Agent, Agent, Hosts, Talk, Budget]]] | None = None
    """The shortest way to where it does not."""

    @property
    def good(self) -> bool:
        return self.rule is None

    def __str__(self) -> str:
        what = "the whole space" if self.whole else "stopped at the limit"
        rate = f"{self.states / max(self.seconds, 1e-9):,.0f}/s"
        verdict = "good" if self.good else f"BROKEN: {self.rule}, after {len(self.trace or ()) - 1} steps"
        return (
            f"{self.world.name:<24} {self.states:>9,} states {self.steps:>10,} steps  depth {self.depth:>3}  {self.seconds:6.1f} s "
            f"({rate}, {what}): {verdict}"
        )


class Search:
    """One search through one world."""

    def __init__(self, world: World, limit: int | None = None) -> None:
        self.model = Model(world)
        self._limit = limit
        self._states: list[State] = []
        self._parents = array("i")
        self._edges = array("I")
        """Targets of the steps without a fault, in the order of their sources."""
        self._offsets = array("L", [0])
        self._ends = bytearray()
        self._count = 0
        self._depth = 0

    def run(self) -> Result:
        began = time.perf_counter()
        collecting = gc.isenabled()
        gc.disable()  # nothing here makes garbage with cycles, and looking for some takes a third of the time
        try:
            return self._run(began)
        finally:
            if collecting:
                gc.enable()

    def _run(self, began: float) -> Result:
        rule, found, last = self._forward()
        whole = len(self._ends) == len(self._states)
        if rule is None and self.model.world.checked(invariants.STUCK):
            found = self._stuck()
            rule = invariants.STUCK if found is not None else None
        result = Result(
            self.model.world, len(self._states), self._count, self._depth, time.perf_counter() - began, whole, sum(self._ends), rule
        )
        if found is not None:
            result.trace = self._trace(found)
            if last:
                result.trace.append((last, self.model.parts(self._states[found])))
        return result

    def _forward(self) -> tuple[str | None, int | None, str]:
        """Look at every state. Where something is wrong: which rule, the number of the state, and a last step if it has no state."""
        model, states, parents = self.model, self._states, self._parents
        first = model.start()
        numbers: dict[State, int] = {first: 0}
        states.append(first)
        parents.append(-1)
        level_end, at = 1, 0
        limit = self._limit if self._limit is not None else 1 << 31
        while at < len(states) and at < limit:
            if at == level_end:
                self._depth += 1
                level_end = len(states)
            state = states[at]
            try:
                steps = model.steps(state)
            except Violation as violation:
                return violation.rule, at, str(violation)
            self._count += len(steps)
            edges = self._edges
            for cost, _, after in steps:
                number = numbers.get(after)
                if number is None:
                    number = numbers[after] = len(states)
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

    def _stuck(self) -> int | None:
        """The first state from which no end can be reached without further faults. States that were not looked at may reach one."""
        edges, offsets = self._edges, self._offsets
        good = bytearray(self._ends) + bytearray(b"\x01" * (len(self._states) - len(self._ends)))
        left = [n for n in range(len(self._ends) - 1, -1, -1) if not good[n]]
        while left:
            rest = []
            for n in left:
                for target in edges[offsets[n] : offsets[n + 1]]:
                    if good[target]:
                        good[n] = 1
                        break
                else:
                    rest.append(n)
            if len(rest) == len(left):
                return rest[-1]
            left = rest
        return None

    def _trace(self, number: int) -> list[tuple[str, tuple[Agent, Agent, Hosts, Talk, Budget]]]:
        """The way to a state: what happened, and what was so then."""
        way = []
        while number >= 0:
            way.append(self._states[number])
            number = self._parents[number]
        way.reverse()
        trace = [("the beginning", self.model.parts(way[0]))]
        for before, after in zip(way, way[1:], strict=False):
            label = next(label for _, label, state in self.model.steps(before) if state == after)
            trace.append((label, self.model.parts(after)))
        return trace


def explore(world: World, limit: int | None = None) -> Result:
    """Search a world. With a limit, look at that many states and no more."""
    return Search(world, limit).run()


