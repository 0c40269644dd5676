"""The slots and the queue of one direction of a host: who has one, and who is next. Pure: every method gets the time.

A slot is `TRANSFERRING` (units of the limit) or `PREPARED` (a few beside them). A migration that waits is served by importance, then
the peer that was served least recently, then age. Only one whose driver has a call under way is served; one whose call ended in the
last second holds up those behind it, too. A migration that was prepared keeps the turn that it had.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from msgspec.structs import replace

from agent.admission.estimate import forecast
from agent.admission.values import Ask, Claim, Direction, Kind, Limits, Slot
from agent.runtime.wire import duration
from drover.agent.v1.migration_pb2 import WAIT_REASON_OUTGOING_SLOT, WAIT_REASON_SLOT, Wait

TURN_SECONDS: Final = 1.0
"""How long a waiter keeps its turn between two calls."""
RETURN_SECONDS: Final = 10.0
"""How long waiters of an earlier life keep their turn: twice the longest pause of their drivers (`backoff.SLOT`)."""
MOST_HOLDERS: Final = 8
_REMEMBERED: Final = 50
"""How many holding times are remembered."""
_PEERS: Final = 1000
"""How many peers are remembered with the grant that they had last."""
_NEVER: Final = float("inf")

_Key = tuple[int, int, int]
_Lane = tuple[int, str]
_Order = tuple[list[tuple[int, int, int, int]], list[Claim], Counter[_Lane]]


class Book:
    """The state of one direction. `numbers` gives epochs and places: each greater than all before, also of earlier lives."""

    def __init__(
        self, direction: Direction, limits: Limits, numbers: Iterator[int], lease: float, takeover_after: float = _NEVER
    ) -> None:
        self.direction = direction
        self.limits = limits
        self.transferring = 0
        """Units that are taken."""
        self.prepared = 0
        """Prepared slots that are taken."""
        self.numbers = numbers
        self.lease = lease
        """Seconds for which a driver may be silent."""
        self._takeover_after = takeover_after
        """Seconds of silence after which another driver goes on with a place that is in the journal."""
        self._claims: dict[str, Claim] = {}
        self._waiting: dict[str, Claim] = {}
        self._granted: dict[str, int] = {}
        """By peer: its last grant, the least recent first."""
        self._held: deque[float] = deque(maxlen=_REMEMBERED)
        self._order: _Order | None = None

    # ---- who is there

    def find(self, migration_id: str) -> Claim | None:
        return self._claims.get(migration_id)

    def claims(self) -> list[Claim]:
        return list(self._claims.values())

    def slots(self) -> list[tuple[Slot, Claim]]:
        return [(claim.slot, claim) for claim in self._claims.values() if claim.slot is not None]

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
        """Return a claim that is not in the book: pass it to `grant`."""
        return Claim(ask, next(self.numbers), now, seen=now)

    def ask(self, ask: Ask, now: float, *, waits: bool = True) -> Claim:
        """Put a migration into the queue, or change what it asks for; nothing to wait for if its slot allows that. Not `waits`: it
        does not join the queue; pass it to `grant`."""
        claim = self._claims.get(ask.migration_id) or self.newcomer(ask, now)
        waits = waits or self.is_waiting(claim)
        if claim.calls and self.is_waiting(claim) and claim.has(ask.kind):
            ask = replace(ask, kind=claim.ask.kind)  # another call waits for more
        self.leave_queue(claim)
        memory = max(ask.memory, claim.ask.memory)  # a driver that has taken over may not know it
        claim.ask = replace(ask, memory=memory, pending=b"")
        claim.seen, claim.silence_told = now, False
        if waits and not claim.has(ask.kind):
            self._claims[claim.migration_id] = claim
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
        claim.turn_until = now + TURN_SECONDS if normally and not claim.calls else -_NEVER

    # ---- granting

    def grant(self, now: float, other: Claim | None = None) -> list[Claim]:
        """Serve all for whom there is room, in their order. Return them. `other`: served too, although it is not in the queue."""
        granted = []
        while (found := self._next(now, other)) is not None:
            claim, kind = found
            self.give(claim, kind, now)
            self._claims[claim.migration_id] = claim
            granted.append(claim)
        return granted

    def _next(self, now: float, other: Claim | None) -> tuple[Claim, Kind] | None:
        room = self.limits.limit - self.transferring
        may_prepare = self.limits.limit > 0 and self.prepared < self.limits.prepared
        if room <= 0 and not may_prepare:
            return None
        asking = list(self._waiting.values())
        if other is not None and not self.is_waiting(other) and not other.has(other.ask.kind):
            asking.append(other)
        first = self._first(asking, now) if room > 0 else None
        if first is not None and self._cost(first) <= room:
            return first, Kind.TRANSFERRING
        unprepared = [claim for claim in asking if claim.slot is None and claim.ask.kind is Kind.PREPARED]
        first = self._first(unprepared, now) if may_prepare else None
        return (first, Kind.PREPARED) if first is not None else None

    def _first(self, claims: list[Claim], now: float) -> Claim | None:
        """Return the first of those in their turn, if its driver is there."""
        in_turn = (claim for claim in claims if claim.calls or now < claim.turn_until)
        first = min(in_turn, key=self._key, default=None)
        return first if first is not None and first.calls else None

    def give(self, claim: Claim, kind: Kind, now: float) -> None:
        """Give a claim a slot, or another kind of slot, whether there is room or not."""
        self.leave_queue(claim)
        cost, peer = self._cost(claim), claim.ask.peer
        if claim.slot is None:
            claim.slot = Slot(kind, cost, next(self.numbers), now, turn=self._granted.get(peer, 0))
            self.served(peer, claim.slot.epoch)
        else:
            self._count(claim.slot, -1)
            claim.slot.kind, claim.slot.cost = kind, cost
        self._count(claim.slot, 1)

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

    def served(self, peer: str, epoch: int) -> None:
        """Note the last grant of a peer: the others go before it."""
        self._granted.pop(peer, None)
        self._granted[peer] = epoch
        if len(self._granted) > _PEERS:
            del self._granted[next(iter(self._granted))]
        self._order = None

    # ---- giving back

    def free(self, claim: Claim, now: float, *, completed: bool = False) -> None:
        """Remove the claim. `completed`: its slot served a migration that worked, so it counts for estimates."""
        if self._claims.get(claim.migration_id) is not claim:
            return
        self.leave_queue(claim)
        del self._claims[claim.migration_id]
        if claim.slot is not None:
            self._count(claim.slot, -1)
            if completed:
                self._held.append(now - claim.slot.since)
            claim.slot = None

    def give_back(self, claim: Claim) -> None:
        """Put the claim back into the queue, at the place that it had and not in its turn. Its attached slot becomes prepared, even
        beyond that limit; another one is free."""
        self.leave_queue(claim)
        claim.turn_until = -_NEVER
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

    # ---- time

    def sweep(self, now: float) -> list[Claim]:
        """Take claims whose drivers were silent for the lease out of the queue. Return those to free: without an attached slot."""
        silent = [c for c in self._claims.values() if not c.calls and now >= c.seen + self.lease]
        for claim in silent:
            self.leave_queue(claim)
        return [claim for claim in silent if not claim.attached]

    def silent(self, now: float) -> list[Claim]:
        """Return the claims that another driver may go on with, each once for a silence of its own driver."""
        silent = [claim for claim in self._claims.values() if now >= self._silent_from(claim)]
        for claim in silent:
            claim.silence_told = True
        return silent

    def _silent_from(self, claim: Claim) -> float:
        told = claim.row is None or claim.calls or claim.attached or claim.silence_told
        return _NEVER if told else claim.seen + self._takeover_after

    def due(self, claim: Claim, now: float) -> float:
        """Return when `sweep`, `silent` or `grant` may next find something to do for a claim without a call. Infinite: never."""
        if claim.calls or self._claims.get(claim.migration_id) is not claim:
            return _NEVER
        waits = self.is_waiting(claim)
        turn_ends = claim.turn_until if waits and now < claim.turn_until else _NEVER
        lease_ends = claim.seen + self.lease if waits or not claim.attached else _NEVER
        return min(turn_ends, lease_ends, self._silent_from(claim))

    # ---- figures

    def standing(self, claim: Claim, now: float) -> Wait:
        """Return where a claim stands in the queue, or would stand; without the name of the host."""
        keys, order, rounds = self._ordered()
        waits = self.is_waiting(claim)
        importance, *rest = self._key(claim)
        ahead = order.index(claim) if waits else bisect_left(keys, (importance, rounds[self._lane(claim)], *rest))
        low, high = self.forecast(now)(ahead + 1)
        # Those that transfer first, then the oldest.
        slots = sorted((-slot.kind, slot.epoch, c.migration_id) for slot, c in self.slots() if c is not claim)
        return Wait(
            reason=WAIT_REASON_SLOT if self.direction is Direction.INCOMING else WAIT_REASON_OUTGOING_SLOT,
            limit=f"{self.direction}_limit",
            limit_value=self.limits.limit,
            in_use=self.transferring,
            holders=[name for _, _, name in slots[:MOST_HOLDERS]],
            position=ahead + 1,
            queue_length=len(order) + (not waits),
            estimate_low=duration(low),
            estimate_high=duration(high),
        )

    def forecast(self, now: float) -> Callable[[int], tuple[float, float]]:
        """Return a function from a position of the queue to the likely least and most seconds until its turn."""
        ages = [now - slot.since for slot, _ in self.slots() if slot.kind is Kind.TRANSFERRING]
        return forecast(ages, self.limits.limit, self._held)

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
        self._order = None

    def leave_queue(self, claim: Claim) -> None:
        """Take a claim out of the queue, if it is there. It keeps its slot."""
        if self.is_waiting(claim):
            del self._waiting[claim.migration_id]
            self._order = None
