"""Slots and queues under any sequence of what may happen to a host: nothing above a limit, nothing leaked, nobody starved, no epoch
given twice, and every place kept over restarts.

The machine plays drivers, records and the journal around `Book`, the pure part of admission. After a crash it gives a new book what
the journal holds.
"""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.admission.book import RETURN_SECONDS, TURN_SECONDS, Book
from agent.admission.values import Ask, Claim, Direction, Kind, Limits, Slot

LEASE = 30.0
NAMES = [f"m{number}" for number in range(6)]

names = st.sampled_from(NAMES)
kinds = st.sampled_from(list(Kind))
limits = st.builds(Limits, st.sampled_from([1, 2, 1, 2, 3, 0]), st.sampled_from([1, 2, 0]), st.just(100))
memories = st.sampled_from([0, 0, 100, 150, 500])


class Host(RuleBasedStateMachine):
    """One direction of a host."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.life = 1
        self.records: dict[str, tuple[Ask, Slot]] = {}
        """What records hold durably."""
        self.places: dict[str, Claim] = {}
        """Places in the journal, as their rows."""
        self.epochs: set[int] = set()
        self.drained_from = 0
        """Units in use when the limit was last lowered, until they are below it again."""

    @initialize(limits=limits)
    def starts(self, limits: Limits) -> None:
        self.limits = limits
        self.book = self._book()

    def _book(self) -> Book:
        return Book(Direction.INCOMING, self.limits, itertools.count((self.life << 32) + 1), LEASE)

    # ---- what drivers do

    def _ask(self, name: str, kind: Kind, importance: int, memory: int) -> Claim:
        claim = self.book.ask(Ask(name, kind, f"s{int(name[1:]) % 3}", importance, memory), self.now)
        claim.calls += 1
        self._serve()
        if not claim.has(kind):
            row = self.places.get(name)
            assert row is None or row.place == claim.place, "a place changed"
            self.places[name] = Claim(claim.ask, claim.place, claim.since)
        return claim

    @rule(name=names, kind=kinds, importance=st.integers(1, 3), memory=memories)
    def waits(self, name: str, kind: Kind, importance: int, memory: int) -> None:
        """A driver calls and waits. Its call goes on."""
        if self.limits.limit and (name not in self.records or kind is Kind.TRANSFERRING):
            self._ask(name, kind, importance, memory)

    @rule(name=names, kind=kinds, memory=memories)
    def tries(self, name: str, kind: Kind, memory: int) -> None:
        """A driver asks once and does not wait."""
        if self.book.find(name) is None and self.limits.limit:
            newcomer = self.book.newcomer(Ask(name, kind, f"s{int(name[1:]) % 3}", 2, memory), self.now)
            newcomer.calls = 1
            told = self.book.standing(newcomer, self.now)
            self._note(self.book.grant(self.now, newcomer))
            newcomer.calls = 0
            assert newcomer.slot is not None or told.position >= 1
            assert (self.book.find(name) is newcomer) == (newcomer.slot is not None)

    @rule(importance=st.integers(1, 3))
    def all_prepared_ask_for_the_transfer(self, importance: int) -> None:
        for claim in self.book.claims():
            if claim.slot is not None and claim.slot.kind is Kind.PREPARED and self.limits.limit:
                self._ask(claim.migration_id, Kind.TRANSFERRING, importance, claim.ask.memory)

    @rule()
    def all_transfers_end(self) -> None:
        for claim in self.book.claims():
            if claim.has(Kind.TRANSFERRING):
                self.records.pop(claim.migration_id, None)
                self._free(claim, completed=True)

    @rule(name=names, normally=st.booleans())
    def a_call_ends(self, name: str, normally: bool) -> None:
        claim = self.book.find(name)
        if claim is not None and claim.calls:
            self.book.ended_call(claim, self.now, normally=normally)
            self._serve()

    @rule(name=names)
    def reserves(self, name: str) -> None:
        """The record is made, and holds the slot."""
        claim = self.book.find(name)
        if claim is not None and claim.slot is not None and not claim.attached:
            claim.slot.attached = True
            self._write_record(claim)

    @rule(name=names, completed=st.booleans())
    def ends(self, name: str, completed: bool) -> None:
        claim = self.book.find(name)
        if claim is not None and name in self.records:
            del self.records[name]
            self._free(claim, completed=completed)

    @rule(name=names, keep_place=st.booleans())
    def gives_back(self, name: str, keep_place: bool) -> None:
        claim = self.book.find(name)
        if claim is None:
            return
        if keep_place or claim.attached:
            self.book.give_back(claim)
            self.places.setdefault(name, Claim(claim.ask, claim.place, claim.since))
            if name in self.records:
                self._write_record(claim)
        else:
            self._free(claim)
        self._serve()

    # ---- what happens to the host

    @rule(seconds=st.sampled_from([0.1, TURN_SECONDS, RETURN_SECONDS, LEASE / 2, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for claim in self.book.sweep(self.now):
            assert not claim.calls
            self._free(claim)
        self._serve()

    @rule(limits=limits)
    def limits_change(self, limits: Limits) -> None:
        self.limits = self.book.limits = limits
        self.drained_from = max(self.drained_from, self.book.transferring)
        for claim in [] if limits.limit else self.book.in_order():
            self.book.leave_queue(claim)
            if claim.slot is None:
                self._free(claim)
        self._serve()

    @rule()
    def crashes_and_restarts(self) -> None:
        self.life += 1
        before = [claim.migration_id for claim in self.book.in_order() if claim.migration_id in self.places and claim.slot is None]
        self.book = self._book()
        for ask, slot in sorted(self.records.values(), key=lambda held: held[1].epoch):
            kept = Slot(slot.kind, slot.cost, slot.epoch, self.now, attached=True)
            self.book.adopt(Claim(ask, slot.epoch, self.now, kept), self.now)
        for name, row in sorted(self.places.items(), key=lambda item: item[1].place):
            known = self.book.find(name)
            if known is None:
                self.book.adopt(Claim(row.ask, row.place, row.since), self.now)
            else:
                known.ask, known.place = row.ask, row.place
        waiting = {claim.migration_id: claim.place for claim in self.book.in_order()}
        assert set(before) <= set(waiting), "a place was lost"
        assert all(self.places[name].place == place for name, place in waiting.items())
        self._serve()

    # ---- parts

    def _serve(self) -> None:
        in_turn = [claim for claim in self.book.in_order() if claim.calls or self.now < claim.turn_until]
        lanes = {claim: (claim.ask.peer, claim.slot is None) for claim in in_turn}
        granted = self.book.grant(self.now)
        if granted and granted[0].has(Kind.TRANSFERRING):
            first = granted[0]
            equals = [claim for claim in in_turn if claim.ask.importance == first.ask.importance]
            assert first.ask.importance == max(claim.ask.importance for claim in in_turn), "served before one of more importance"
            same = [claim for claim in equals if lanes[claim] == lanes[first] == (first.ask.peer, True)]
            assert all(claim.place >= first.place for claim in same), "served before an older one of its peer"
        self._note(granted)

    def _note(self, granted: list[Claim]) -> None:
        for claim in granted:
            assert claim.slot is not None
            assert claim.calls, "served although its driver is not there"
            known = claim.slot.epoch in self.epochs
            assert not known or claim.migration_id in self.records or claim.slot.kind is Kind.TRANSFERRING
            assert known or claim.slot.epoch > max(self.epochs, default=0), "an epoch does not rise"
            self.epochs.add(claim.slot.epoch)
            if claim.slot.kind is Kind.TRANSFERRING:
                assert self.book.transferring <= self.limits.limit, "above the limit"
            else:
                assert self.book.prepared <= self.limits.prepared, "more are prepared than may be"
            if claim.migration_id in self.records:
                self._write_record(claim)

    def _write_record(self, claim: Claim) -> None:
        assert claim.slot is not None
        slot = claim.slot
        self.records[claim.migration_id] = claim.ask, Slot(slot.kind, slot.cost, slot.epoch, slot.since)
        if slot.kind is Kind.TRANSFERRING:
            self.places.pop(claim.migration_id, None)

    def _free(self, claim: Claim, *, completed: bool = False) -> None:
        self.book.free(claim, self.now, completed=completed)
        self.places.pop(claim.migration_id, None)
        self._serve()

    # ---- what must be true

    @invariant()
    def what_is_counted_is_what_is_held(self) -> None:
        slots = [claim.slot for claim in self.book.claims() if claim.slot is not None]
        assert self.book.transferring == sum(slot.cost for slot in slots if slot.kind is Kind.TRANSFERRING)
        assert self.book.prepared == sum(slot.kind is Kind.PREPARED for slot in slots)
        assert len({slot.epoch for slot in slots}) == len(slots)
        assert {claim.migration_id for claim in self.book.claims() if claim.attached} == set(self.records)

    @invariant()
    def never_above_the_limit_but_from_above(self) -> None:
        if self.book.transferring <= self.limits.limit:
            self.drained_from = 0
        else:
            assert self.book.transferring <= self.drained_from
            self.drained_from = self.book.transferring

    @invariant()
    def nobody_is_starved(self) -> None:
        """Whoever is first of those in their turn, with its driver there, waits only where there is no room for it."""
        in_turn = [claim for claim in self.book.in_order() if claim.calls or self.now < claim.turn_until]
        if in_turn and in_turn[0].calls:
            first = in_turn[0]
            assert self.book.transferring + self.limits.cost_of(first.ask.memory) > self.limits.limit

    @invariant()
    def who_holds_nothing_waits_or_is_gone(self) -> None:
        for claim in self.book.claims():
            assert claim.slot is not None or self.book.is_waiting(claim)
            assert claim.attached or claim.calls or claim.seen + LEASE > self.now, "it should have expired"

    @precondition(lambda self: self.limits.limit > 0)
    @invariant()
    def positions_are_those_of_the_order(self) -> None:
        order = self.book.in_order()
        assert [self.book.standing(claim, self.now).position for claim in order] == list(range(1, len(order) + 1))

    def teardown(self) -> None:
        """Once everybody has gone, nothing is left."""
        if not hasattr(self, "book"):
            return
        for name in list(self.records):
            self.ends(name, completed=False)
        for claim in self.book.claims():
            while claim.calls:
                self.book.ended_call(claim, self.now, normally=False)
        self.now += LEASE
        for claim in self.book.sweep(self.now):
            self._free(claim)
        assert (self.book.claims(), self.book.transferring, self.book.prepared) == ([], 0, 0)
        assert self.places.keys() == set(), "a place is left in the journal"


TestHost = Host.TestCase
TestHost.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
