"""The slots and the queue of one direction of a host: who has one, and who is next. Pure: every method gets the time.

A slot is `TRANSFERRING` (units of the limit) or `PREPARED` (a few beside them). A migration that waits is served by importance, then
the peer that was served least recently, then age. Only one whose driver has a call under way is served; one whose call ended in the
last second holds up those behind it, too. A migration that was prepared keeps the turn that it had.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Final

from agent.admission.estimate import time_until
from agent.admission.values import Ask, Claim, Direction, Kind, Limits, Slot, Standing

TURN_SECONDS: Final = 1.0
"""How long a waiter keeps its turn between two calls."""
RETURN_SECONDS: Final = 5.0
"""How long waiters of an earlier life keep their turn: their drivers call again within it (`backoff.SLOT`)."""
MOST_HOLDERS: Final = 8
_REMEMBERED: Final = 50
"""How many holding times are remembered."""
_PEERS: Final = 1000
"""How many peers are remembered with the grant that they had last."""

_Key = tuple[int, int, int]
_Lane = tuple[int, str]
_Order = tuple[list[tuple[int, int, int, int]], list[Claim], Counter[_Lane]]


class Book:
    """The state of one direction. `numbers` gives epochs and places: each greater than all before, also of earlier lives."""

    def __init__(self, direction: Direction, limits: Limits, numbers: Iterator[int], lease: float) -> None:
        self.direction = direction
        self.limits = limits
        self.transferring = 0
        """Units that are taken."""
        self.prepared = 0
        """Prepared slots that are taken."""
        self._numbers = numbers
        self.lease = lease
        """Seconds for which a driver may be silent."""
        self._claims: dict[str, Claim] = {}
        self._waiting: dict[str, Claim] = {}
        self._unprepared = 0
        """Waiters that would take a prepared slot."""
        self._granted: dict[str, int] = {}
        """By peer: its last grant, the least recent first."""
        self._held: deque[float] = deque(maxlen=_REMEMBERED)
        self._order: _Order | None = None

    # ---- who is there

    def find(self, migration_id: str) -> Claim | None:
        return self._claims.get(migration_id)

    def claims(self) -> list[Claim]:
        return list(self._claims.values())

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    def is_waiting(self, claim: Claim) -> bool:
        return self._waiting.get(claim.migration_id) is claim

    def in_order(self) -> list[Claim]:
        """Return the queue: the order in which it is served if all are in their turn."""
        return list(self._ordered()[1])

    # ---- asking

    def newcomer(self, ask: Ask, now: float) -> Claim:
        """Return a claim that does not wait: pass it to `grant`."""
        return Claim(ask, next(self._numbers), now, seen=now)

    def ask(self, ask: Ask, now: float) -> Claim:
        """Put a migration into the queue, or change what it asks for; nothing to wait for if its slot allows that."""
        claim = self._claims.get(ask.migration_id)
        if claim is None:
            claim = self._claims[ask.migration_id] = self.newcomer(ask, now)
        self._leave_queue(claim)
        ask = replace(ask, memory=max(ask.memory, claim.ask.memory))  # a driver that has taken over may not know it
        claim.ask, claim.seen, claim.silence_told = ask, now, False
        if not claim.has(ask.kind):
            self._join_queue(claim)
        return claim

    def adopt(self, claim: Claim, now: float) -> None:
        """Add a claim of an earlier life: with its attached slot, in the order of the epochs, or with its place."""
        self._claims[claim.migration_id] = claim
        claim.seen = now
        if claim.slot is None:
            claim.turn_until = now + RETURN_SECONDS
            self._join_queue(claim)
        else:
            self._count(claim.slot, 1)
            claim.slot.turn = self._granted.get(claim.ask.peer, 0)
            self.served(claim.ask.peer, claim.slot.epoch)

    def ended_call(self, claim: Claim, now: float, *, normally: bool) -> None:
        """Note that a call has ended; not `normally`: its caller has gone away."""
        claim.calls -= 1
        claim.seen = now
        claim.turn_until = now + TURN_SECONDS if normally and not claim.calls else float("-inf")

    # ---- granting

    def grant(self, now: float, newcomer: Claim | None = None) -> list[Claim]:
        """Serve all for whom there is room, in their order. Return them. `newcomer`: served only now, or not at all."""
        granted = []
        while (found := self._next(now, newcomer)) is not None:
            claim, kind = found
            self._give(claim, kind, now)
            self._claims[claim.migration_id] = claim
            newcomer = None if claim is newcomer else newcomer
            granted.append(claim)
        return granted

    def _next(self, now: float, newcomer: Claim | None) -> tuple[Claim, Kind] | None:
        room = self.limits.limit - self.transferring
        wants_prepared = self._unprepared or (newcomer is not None and newcomer.ask.kind is Kind.PREPARED)
        may_prepare = self.limits.limit > 0 and self.prepared < self.limits.prepared and wants_prepared
        if room <= 0 and not may_prepare:
            return None
        first: tuple[_Key, Claim] | None = None
        prepared: tuple[_Key, Claim] | None = None
        for claim in chain(self._waiting.values(), () if newcomer is None else (newcomer,)):
            if not claim.calls and now >= claim.turn_until:
                continue
            key = self._key(claim)
            if first is None or key < first[0]:
                first = key, claim
            if claim.slot is None and claim.ask.kind is Kind.PREPARED and (prepared is None or key < prepared[0]):
                prepared = key, claim
        if room > 0 and first is not None and first[1].calls and self._cost(first[1]) <= room:
            return first[1], Kind.TRANSFERRING
        if may_prepare and prepared is not None and prepared[1].calls:
            return prepared[1], Kind.PREPARED
        return None

    def force(self, claim: Claim, now: float) -> None:
        """Let a claim transfer, also beyond the limit: its memory flows."""
        self._give(claim, Kind.TRANSFERRING, now)

    def charge(self, claim: Claim, memory: int) -> bool:
        """Let the slot of a claim cost what a guest of so much memory costs, if that is more than its driver said. Return whether
        there is room for that; else only what the claim asks for has changed."""
        claim.ask = replace(claim.ask, memory=max(memory, claim.ask.memory))
        slot, cost = claim.slot, self.limits.cost_of(memory)
        if slot is None or cost <= slot.cost:
            return True
        if slot.kind is Kind.TRANSFERRING and self.transferring + cost - slot.cost > self.limits.limit:
            return False
        self._count(slot, -1)
        slot.cost = cost
        self._count(slot, 1)
        return True

    def _give(self, claim: Claim, kind: Kind, now: float) -> None:
        self._leave_queue(claim)
        cost, peer = self._cost(claim), claim.ask.peer
        if claim.slot is None:
            claim.slot = Slot(kind, cost, next(self._numbers), now, turn=self._granted.get(peer, 0))
            self.served(peer, claim.slot.epoch)
        else:
            self._count(claim.slot, -1)
            claim.slot.kind, claim.slot.cost = kind, cost
        self._count(claim.slot, 1)

    def served(self, peer: str, epoch: int) -> None:
        """Note the last grant of a peer: the others go before it."""
        self._granted.pop(peer, None)
        self._granted[peer] = epoch
        if len(self._granted) > _PEERS:
            del self._granted[next(iter(self._granted))]
        self._order = None

    # ---- giving back

    def attach(self, claim: Claim) -> None:
        """Note that a record holds the slot."""
        if claim.slot is not None:
            claim.slot.attached = True

    def free(self, claim: Claim, now: float, *, completed: bool = False) -> None:
        """Remove the claim. `completed`: its slot served a migration that worked, so it counts for estimates."""
        if self._claims.get(claim.migration_id) is not claim:
            return
        self._leave_queue(claim)
        del self._claims[claim.migration_id]
        if claim.slot is not None:
            self._count(claim.slot, -1)
            if completed:
                self._held.append(now - claim.slot.since)
            claim.slot = None

    def give_back(self, claim: Claim) -> None:
        """Put the claim back into the queue, at the place that it had and not in its turn. Its attached slot becomes prepared, even
        beyond that limit; another one is free."""
        self._leave_queue(claim)
        claim.turn_until = float("-inf")
        if claim.slot is not None:
            self._count(claim.slot, -1)
            if claim.slot.attached:
                claim.slot.kind = Kind.PREPARED
                self._count(claim.slot, 1)
            else:
                if self._granted.get(claim.ask.peer) == claim.slot.epoch:
                    self._granted[claim.ask.peer] = claim.slot.turn  # as if it had not been served
                claim.slot = None
        self._join_queue(claim)

    def stop_waiting(self, claim: Claim) -> None:
        """Take the claim out of the queue; it keeps its slot."""
        self._leave_queue(claim)

    # ---- time

    def sweep(self, now: float) -> list[Claim]:
        """Return the claims without an attached slot whose drivers have been silent for the lease, for the caller to free. Takes
        others whose drivers are silent out of the queue."""
        silent = [c for c in self._claims.values() if not c.calls and now >= c.seen + self.lease]
        for claim in silent:
            if claim.attached:
                self._leave_queue(claim)
        return [claim for claim in silent if not claim.attached]

    def due(self, claim: Claim, now: float) -> float:
        """Return the next time at which `sweep` or `grant` may find something to do for a claim without a call. Infinite: none."""
        if claim.calls or (claim.attached and not self.is_waiting(claim)):
            return float("inf")
        return claim.turn_until if now < claim.turn_until else claim.seen + self.lease

    # ---- figures

    def standing(self, claim: Claim, now: float) -> Standing:
        """Return where a waiting claim stands, or would stand."""
        keys, order, rounds = self._ordered()
        waits = self.is_waiting(claim)
        importance, *rest = self._key(claim)
        ahead = order.index(claim) if waits else bisect_left(keys, (importance, rounds[self._lane(claim)], *rest))
        low, high = self.time_until(ahead + 1, now)
        holders = sorted((c for c in self._claims.values() if c.slot is not None and c is not claim), key=_by_grant)
        return Standing(
            self.direction,
            self.limits.limit,
            self.transferring,
            tuple(c.migration_id for c in holders[:MOST_HOLDERS]),
            ahead + 1,
            len(order) + (not waits),
            low,
            high,
        )

    def time_until(self, position: int, now: float) -> tuple[float, float]:
        """Return the likely least and most seconds until the turn of a position in the queue."""
        slots = [c.slot for c in self._claims.values() if c.slot is not None and c.slot.kind is Kind.TRANSFERRING]
        return time_until(position, [now - slot.since for slot in slots], self.limits.limit, self._held)

    def _ordered(self) -> _Order:
        """Return the keys and the claims of the queue in order, and how many of each lane wait. Cached until the queue changes."""
        if self._order is None:
            rounds: Counter[_Lane] = Counter()
            keyed = []
            for claim in sorted(self._waiting.values(), key=lambda c: c.place):
                lane, (importance, turn, place) = self._lane(claim), self._key(claim)
                keyed.append(((importance, rounds[lane], turn, place), claim))
                rounds[lane] += 1
            keyed.sort(key=lambda each: each[0])
            self._order = [key for key, _ in keyed], [claim for _, claim in keyed], rounds
        return self._order

    # ---- parts

    def _key(self, claim: Claim) -> _Key:
        turn = claim.slot.turn if claim.slot is not None else self._granted.get(claim.ask.peer, 0)
        return -claim.ask.importance, turn, claim.place

    @staticmethod
    def _lane(claim: Claim) -> _Lane:
        """Return what takes turns: a peer, or a prepared migration of its own."""
        return claim.ask.importance, f"peer {claim.ask.peer}" if claim.slot is None else claim.migration_id

    def _cost(self, claim: Claim) -> int:
        """Return the units that it takes. A caller that has not asked the guest's host names no memory: a slot knows its own."""
        if claim.slot is not None and not claim.ask.memory:
            return max(1, min(claim.slot.cost, self.limits.limit))
        return self.limits.cost_of(claim.ask.memory)

    def _count(self, slot: Slot, sign: int) -> None:
        if slot.kind is Kind.TRANSFERRING:
            self.transferring += sign * slot.cost
        else:
            self.prepared += sign

    def _join_queue(self, claim: Claim) -> None:
        self._waiting[claim.migration_id] = claim
        self._unprepared += self._would_prepare(claim)
        self._order = None

    def _leave_queue(self, claim: Claim) -> None:
        if self._waiting.get(claim.migration_id) is claim:
            del self._waiting[claim.migration_id]
            self._unprepared -= self._would_prepare(claim)
            self._order = None

    @staticmethod
    def _would_prepare(claim: Claim) -> bool:
        return claim.slot is None and claim.ask.kind is Kind.PREPARED


def _by_grant(claim: Claim) -> tuple[int, int]:
    """Return the sort key of slots: those that transfer first, then the oldest."""
    return (-claim.slot.kind, claim.slot.epoch) if claim.slot is not None else (0, claim.place)
