"""The slots of a migration at its two hosts: taken together, so that nobody holds one for long while it waits for the other.

Before the guest is touched a migration needs a slot of either kind at both hosts; before its memory flows, the right to transfer.
A driver waits in one queue at a time and keeps its place in the other one. With one slot it waits for the other for
`HOLD_SECONDS` at most. Then it gives the first one back, keeps that place, and waits where it had to wait first. So two migrations
that each hold what the other one needs do not wait for each other for ever."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from agent.handshake.drive.plan import Plan
from agent.handshake.host.peer import HandshakePeer
from agent.runtime.backoff import Clock
from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut, duration
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import handshake_pb2, migration_pb2

PREPARED: Final = pb.SLOT_KIND_PREPARED
TRANSFERRING: Final = pb.SLOT_KIND_TRANSFERRING

DIRECTION: Final[Mapping[str, pb.SlotDirection.ValueType]] = {
    "source": pb.SLOT_DIRECTION_OUTGOING,
    "destination": pb.SLOT_DIRECTION_INCOMING,
}
OTHER: Final = {"source": "destination", "destination": "source"}

FIRST_LOOK: Final = 0.001
"""Seconds of the first wait: it takes the place, and its answer says what the migration waits for."""

HOLD_SECONDS: Final = 4.0
"""Longest time for which one slot is held while the other one is waited for; each time a random part of it, at least a quarter."""

MOST_POLL: Final = 8.0

MOST_WHY: Final = 2048
"""Most bytes of the reason for which a driver gives a migration up."""


def poll_seconds(queue_length: int) -> float:
    """Return how long one call waits: it ends early where the migration's turn comes. The longer the queue, the more seldom its
    figures are read; but within the default of `takeover_after`, after which the source's agent takes a silent driver for dead."""
    return min(MOST_POLL, max(2.0, queue_length / 50))


Request = Callable[[str], pb.AcquireSlotRequest]
"""Returns the request for a slot of a side, without kind and wait. Called for each call, as importance may change."""


def slot_request(migration_id: str, side: str, plan: Plan | None) -> pb.AcquireSlotRequest:
    """Return the request for a slot of a side."""
    request = pb.AcquireSlotRequest(migration_id=migration_id, direction=DIRECTION[side])
    if plan is not None:
        request.peer_host = plan.destination_host if side == "source" else plan.source_host
    if plan is not None and plan.requirements is not None:
        request.memory_bytes = plan.requirements.memory_bytes
    return request


class BothSlots:
    """The slots of one attempt's migration. `on_wait` gets what it waits for at a side, and None once it waits no more; `on_answer`
    each side that has answered."""

    def __init__(
        self,
        source: HandshakePeer,
        destination: HandshakePeer,
        request: Request,
        on_wait: Callable[[migration_pb2.Wait | None], None],
        on_answer: Callable[[str], None],
        clock: Clock,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.at = ""
        """The side to which the error belongs that was raised last."""
        self.other_driver = ""
        """Another driver that waits for the same migration, as a host said; empty: none."""
        self.may_wait = True
        """Whether it waits for the right to transfer, where that is refused."""
        self._peers = {"source": source, "destination": destination}
        self._request = request
        self._on_wait = on_wait
        self._on_answer = on_answer
        self._clock = clock
        self._rand = rand
        self._held: dict[str, pb.SlotKind.ValueType] = {}
        self._asked: set[str] = set()
        self._begun: asyncio.Task[None] | None = None
        self._waits_at = ""
        """The side in whose queue a call waits now."""
        self._poll = poll_seconds(0)

    def has(self, side: str, kind: pb.SlotKind.ValueType) -> bool:
        return self._held.get(side, 0) >= kind

    async def right_to_transfer(self, source: handshake_pb2.Record | None, destination: handshake_pb2.Record | None) -> None:
        """Wait for the right to transfer at both hosts, where the slots of their records are only prepared ones. Raises as
        `acquire`; BUSY if it may not wait."""
        self._asked |= set(DIRECTION)
        for side, record in (("source", source), ("destination", destination)):
            transferring = record is None or not record.HasField("slot") or record.slot.transferring
            self._held[side] = TRANSFERRING if transferring else PREPARED
        missing = [side for side in DIRECTION if not self.has(side, TRANSFERRING)]
        if not self.may_wait:
            for side in missing:
                await self.take(side, TRANSFERRING)
        elif missing:
            await self.acquire(TRANSFERRING)

    def may_have(self, side: str) -> None:
        """Note that a slot of a side may have been taken by another call, so that it is given back in the end."""
        self._asked.add(side)

    def replaces(self, other: "BothSlots") -> None:
        """Note that it goes on with what another one of the same migration, and of the same driver, has asked for."""
        self._asked |= other._asked

    def begin(self, side: str) -> None:
        """Begin to `take` the transferring slot of a side: `take` then joins this call."""
        self._begun = asyncio.create_task(self._ask(side, TRANSFERRING))
        self._begun.add_done_callback(lambda task: task.cancelled() or task.exception())  # the caller may be gone

    async def take(self, side: str, kind: pb.SlotKind.ValueType) -> None:
        """Take the slot of a side without waiting. Raises BUSY, HOST_CLOSED, and what the call raises."""
        call: Awaitable[None] | None = self._begun
        if call is None:
            self.at, call = "", self._ask(side, kind)
        self._begun = None
        await self._all({side: call})

    async def acquire(self, kind: pb.SlotKind.ValueType, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        """Wait until both slots of at least this kind are taken. `meanwhile` is called after each call that ends without a slot of
        the destination. Raises HOST_CLOSED, and what a call raises; ask again, and the places are kept."""
        first, self.at = "destination", ""
        await self._look(kind)
        while missing := [side for side in (first, OTHER[first]) if not self.has(side, kind)]:
            side = missing[0]
            if len(missing) == 2:
                # The other side is shown meanwhile that this driver is there.
                await self._all({side: self._ask(side, kind, self._poll), OTHER[side]: self._keep_place(OTHER[side], kind)})
            elif not await self._wait_holding(side, kind):
                await self.release(OTHER[side], keep_place=True)
                first = side
            if meanwhile is not None and not self.has("destination", kind):
                await meanwhile()
        self._on_wait(None)

    async def release(self, *sides: str, keep_place: bool = False, cancelled: bool = False) -> None:
        """Give slots and places back, by default all of this migration; `cancelled`: on request, which ends its other drivers, too.
        An error is ignored: they end by themselves."""
        if self._begun is not None:
            self._begun.cancel()
        asked = [side for side in sides or DIRECTION if side in self._asked]
        await asyncio.gather(*(self._release(side, keep_place=keep_place, cancelled=cancelled) for side in asked))

    async def give_up(self, why: str) -> None:
        """Give the slot or place at the source back for every driver of the migration: none of them can begin it from now on. `why`
        is for a person; empty: it was cancelled on request. Raises what the call raises."""
        self._held.pop("source", None)
        request = pb.ReleaseSlotRequest(migration_id=self._request("source").migration_id, cancelled=True)
        request.direction, request.given_up_for = DIRECTION["source"], cut(why, MOST_WHY)
        try:
            await self._peers["source"].release_slot(request)
        except DroverError as error:
            if error.reason is not Reason.UNIMPLEMENTED:  # an older agent, which goes on with no migration that waits
                raise

    async def leave(self, *, cancelled: bool) -> None:
        """Give back the places that both hosts keep for a next attempt, as there is none. An error is ignored."""
        self._asked |= set(DIRECTION)
        await self.release(cancelled=cancelled)

    async def ask_again(self, kind: pb.SlotKind.ValueType) -> None:
        """Tell the hosts the present request while `acquire` waits with an earlier one: it counts at once. An error is ignored."""
        if side := self._waits_at:
            calls = [self._ask(side, kind, FIRST_LOOK)]
            calls += [] if self.has(OTHER[side], kind) else [self._keep_place(OTHER[side], kind)]
            await asyncio.gather(*calls, return_exceptions=True)

    async def stand_aside(self) -> None:
        """Give back what is held, as it could not be used now, and keep the places, which shows the hosts that this driver is there.
        An error is ignored."""
        asked = tuple(self._asked)
        await self.release(keep_place=True)
        await asyncio.gather(*(self._keep_place(side, PREPARED) for side in asked), return_exceptions=True)

    # ---- waiting

    async def _look(self, kind: pb.SlotKind.ValueType) -> None:
        """Ask both sides at once. What one of them gives is held only if the other gives too, or soon."""
        asked = [side for side in DIRECTION if not self.has(side, kind)]
        await self._all({side: self._ask(side, kind, FIRST_LOOK) for side in asked})
        got = [side for side in asked if self.has(side, kind)]
        if (len(asked), got) == (2, ["source"]):  # the destination's queue is the longer one
            await self.release("source", keep_place=True)

    async def _wait_holding(self, side: str, kind: pb.SlotKind.ValueType) -> bool:
        """Wait in the queue of a side for a short time, with the other slot in hand. Return whether it was given."""
        until = self._clock.monotonic() + HOLD_SECONDS * (0.25 + 0.75 * self._rand())
        while (left := until - self._clock.monotonic()) > FIRST_LOOK:
            await self._all({side: self._ask(side, kind, min(self._poll, left))})
            if self.has(side, kind):
                return True
        return False

    # ---- calls

    async def _all(self, calls: Mapping[str, Awaitable[None]]) -> None:
        """Make the calls at once, each to its end, so that what one of them got is known. Raises the first error."""
        results = await asyncio.gather(*calls.values(), return_exceptions=True)
        for side, result in zip(calls, results, strict=True):
            if isinstance(result, BaseException):
                self.at = side
                raise result

    async def _ask(self, side: str, kind: pb.SlotKind.ValueType, wait: float = 0.0, *, place_only: bool = False) -> None:
        request = self._request(side)
        request.kind, request.place_only = kind, place_only
        request.wait.CopyFrom(duration(wait))
        self._asked.add(side)
        waits = wait > FIRST_LOOK
        self._waits_at = side if waits else self._waits_at
        try:
            response = await self._peers[side].acquire_slot(request)
        except DroverError as error:
            if error.reason is not Reason.UNIMPLEMENTED:
                raise
            self._held[side] = TRANSFERRING  # an older agent, whose slots are its records
            return
        finally:
            self._waits_at = "" if waits else self._waits_at
        self._on_answer(side)
        self.other_driver = response.other_driver or self.other_driver
        if response.HasField("slot"):
            self._held[side] = response.slot.kind
        elif not place_only:
            self._poll = poll_seconds(response.wait.queue_length)
            self._on_wait(response.wait)

    async def _keep_place(self, side: str, kind: pb.SlotKind.ValueType) -> None:
        await self._ask(side, kind, place_only=True)

    async def _release(self, side: str, *, keep_place: bool, cancelled: bool) -> None:
        self._held.pop(side, None)
        request = self._request(side)
        with contextlib.suppress(DroverError):
            await self._peers[side].release_slot(
                pb.ReleaseSlotRequest(
                    migration_id=request.migration_id, direction=DIRECTION[side], keep_place=keep_place, cancelled=cancelled
                )
            )
