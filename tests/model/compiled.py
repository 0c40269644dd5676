"""A world as numbers, compiled while it is explored.

A state is one number: source, destination, hypervisors, drivers with their messages, and the budget of faults are each a
field of it, and each value of a field names a part (`tests.model.parts`). A rule depends on one or two parts. It is run once for
each value of those, and its result is kept as a difference of numbers; so the search over millions of steps only adds.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from tests.model import destination_agent, hosts, invariants, network, source_agent
from tests.model.parts import Agent, Budget, Cost, Guest, Hosts, Talk
from tests.model.world import World

P = TypeVar("P", bound=Hashable)
Q = TypeVar("Q", bound=Hashable)
V = TypeVar("V")
S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)

Row = tuple[str | None, str]
"""State and event: a row of a machine's table."""

Parts = tuple[Agent, Agent, Hosts, Talk, Budget]

Steps = tuple[tuple[str, int, int], ...]
"""What happens, what it adds to the state, and which fault it is (`Cost`)."""


class Field(Generic[P]):
    """A field of the number, with the parts that its values name."""

    def __init__(self, shift: int, bits: int) -> None:
        self._shift = shift
        self._values = (1 << bits) - 1
        self.mask = self._values << shift
        self._parts: list[P] = []
        self._numbers: dict[P, int] = {}

    def of(self, part: P) -> int:
        """Return the number of a part, shifted to the field's place."""
        number = self._numbers.setdefault(part, len(self._parts))
        if number == len(self._parts):
            assert number <= self._values, "more parts than the field has room for"
            self._parts.append(part)
        return number << self._shift

    def part(self, state: int) -> P:
        return self._parts[state >> self._shift & self._values]


class Table(dict[int, V]):
    """The results of a rule, computed once for each value of the fields that it depends on."""

    def __init__(self, rule: Callable[[int], V]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, key: int) -> V:
        value = self[key] = self._rule(key)
        return value


class Noted(dict[tuple[S | None, E], V]):
    """A machine's table that records which of its rows were used."""

    def __init__(self, rows: Mapping[tuple[S | None, E], V], taken: set[Row]) -> None:
        super().__init__(rows)
        self._taken = taken

    def get(self, row: tuple[S | None, E], default: object = None) -> V | None:  # type: ignore[override]
        state, event = row
        if row in self:
            self._taken.add((state and str(state), str(event)))
        return super().get(row)


class Rule(NamedTuple):
    """The steps of one kind: the fields that they depend on, and the results for each value of those."""

    mask: int
    steps: Table[Steps]


class Model:
    """One world. `taken` are the rows of the machines' tables that were used so far."""

    def __init__(self, world: World) -> None:
        self.taken: set[Row] = set()
        self.world = world = replace(
            world,
            source=replace(world.source, table=Noted(world.source.table, self.taken)),
            destination=replace(world.destination, table=Noted(world.destination.table, self.taken)),
        )
        budget: Field[Budget] = Field(0, 12)
        source: Field[Agent] = Field(12, 12)
        destination: Field[Agent] = Field(24, 12)
        both: Field[Hosts] = Field(36, 10)
        talk: Field[Talk] = Field(46, 24)
        self._fields = source, destination, both, talk, budget
        self._rules = (
            self._two(source, both, lambda a, h: source_agent.steps(world, a, h)),
            self._two(destination, both, lambda a, h: destination_agent.steps(world, a, h)),
            self._one(both, lambda h: hosts.happens(world, h)),
            self._one(talk, lambda t: network.steps(world, t)),
            self._two(talk, source, lambda t, a: network.at_source(world, t, a)),
            self._two(talk, destination, lambda t, a: network.at_destination(world, t, a)),
            self._two(source, destination, lambda a, b: destination_agent.asks(world, a, b)),
            self._two(source, destination, source_agent.reads),
        )
        self._budget = budget
        self._spend = [self._spender(cost) for cost in Cost if cost >= 0]
        self._hosts = source.mask | destination.mask | both.mask
        self._told = talk.mask | destination.mask
        self._driven = talk.mask | source.mask
        self._cancels = talk.mask | source.mask | both.mask
        self._broken = Table(self._is_broken)
        self._misled = Table(self._is_misled)
        self._talk = talk.mask
        self._forgotten = Table(self._is_forgotten)
        self._settled = Table(lambda key: invariants.settled(*self.parts(key)[:3]))
        self._idle = Table(lambda key: invariants.nobody_drives(source.part(key), talk.part(key)))
        self._cancelled = Table(lambda key: invariants.cancelled(source.part(key), both.part(key), talk.part(key)))

    def start(self) -> int:
        source, destination, both, talk, budget = self._fields
        guest = Guest.HELD if self.world.user_paused else Guest.RUNNING
        agents = source.of(Agent()) + destination.of(Agent())
        return agents + both.of(Hosts(guest)) + talk.of(network.start(self.world)) + budget.of(self.world.budget)

    def parts(self, state: int) -> Parts:
        """Return the parts of a state. A key of a table has only the parts that its mask covers; the others are arbitrary."""
        source, destination, both, talk, budget = self._fields
        return source.part(state), destination.part(state), both.part(state), talk.part(state), budget.part(state)

    def steps(self, state: int) -> list[tuple[int, str, int]]:
        """Return every step from a state: its cost, its label, the state after it. Raises `Violation`."""
        found = []
        left = state & self._budget.mask
        for mask, table in self._rules:
            for label, adds, cost in table[state & mask]:
                if cost < 0:
                    found.append((cost, label, state + adds))
                elif (spends := self._spend[cost][left]) is not None:
                    found.append((cost, label, state + adds + spends))
        return found

    def wrong(self, state: int) -> str | None:
        """Return the first invariant that a state breaks."""
        return self._broken[state & self._hosts] or self._misled[state & self._told] or self._forgotten[state & self._talk]

    def is_end(self, state: int) -> bool:
        return self._settled[state & self._hosts] and self._idle[state & self._driven]

    def is_cancelled(self, state: int) -> bool:
        return self._cancelled[state & self._cancels]

    def is_home(self, state: int) -> bool:
        return invariants.at_home(self._fields[0].part(state), self._fields[2].part(state))

    # ---- the rules, by number

    def _one(self, field: Field[P], rule: Callable[[P], Iterable[tuple[str, P, Cost]]]) -> Rule:
        may = self.world.may

        def run(key: int) -> Steps:
            steps = rule(field.part(key))
            return tuple((label, field.of(after) - key, int(cost)) for label, after, cost in steps if may(cost))

        return Rule(field.mask, Table(run))

    def _two(self, one: Field[P], two: Field[Q], rule: Callable[[P, Q], Iterable[tuple[str, P, Q, Cost]]]) -> Rule:
        may = self.world.may

        def run(key: int) -> Steps:
            steps = rule(one.part(key), two.part(key))
            return tuple((label, one.of(a) + two.of(b) - key, int(cost)) for label, a, b, cost in steps if may(cost))

        return Rule(one.mask | two.mask, Table(run))

    def _spender(self, cost: Cost) -> Table[int | None]:
        """Return, for each budget, what one more fault adds to the state; None if no more may happen."""

        def run(key: int) -> int | None:
            budget = self._budget.part(key)
            if not budget[cost]:
                return None
            return self._budget.of(tuple(left - (name == cost) for name, left in enumerate(budget))) - key

        return Table(run)

    def _is_broken(self, key: int) -> str | None:
        names = invariants.broken(*self.parts(key)[:3])
        return next((name for name in names if self.world.checked(name)), None)

    def _is_misled(self, key: int) -> str | None:
        _, destination, _, talk, _ = self.parts(key)
        wrong = self.world.checked(invariants.TOLD) and invariants.told_wrong(destination, talk)
        return invariants.TOLD if wrong else None

    def _is_forgotten(self, key: int) -> str | None:
        wrong = self.world.checked(invariants.FORGOTTEN) and invariants.forgotten(self._fields[3].part(key))
        return invariants.FORGOTTEN if wrong else None
