"""agent.handshake.drive.slots: both slots of a migration, without holding one for long (issue 8, points 1 and 2)."""

import functools
from typing import Any

from agent.handshake.drive.slots import HOLD_SECONDS, PREPARED, TRANSFERRING, BothSlots, poll_seconds, slot_request
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import admission_pb2 as pb
from drover.agent.v1 import migration_pb2
from tests.unit.asking import ID, fails, make_plan
from tests.unit.clocks import FakeClock


class Host:
    """A host that gives its slot once `gives_at` has come; a call that waits moves the clock on. `log` has the calls of both."""

    def __init__(self, side: str, clock: FakeClock, log: list[str], gives_at: float = 0.0) -> None:
        self.side, self.clock, self.log, self.gives_at = side, clock, log, gives_at
        self.kind = PREPARED
        self.error: DroverError | None = None

    async def acquire_slot(self, request: pb.AcquireSlotRequest) -> pb.AcquireSlotResponse:
        if self.error is not None:
            raise self.error
        if request.place_only:
            self.log.append(f"place {self.side}")
            return pb.AcquireSlotResponse(wait=migration_pb2.Wait(position=1))
        wait = request.wait.ToNanoseconds() / 1e9
        if self.clock.now < self.gives_at:
            self.clock.now += min(wait, self.gives_at - self.clock.now)
        given = self.clock.now >= self.gives_at
        self.log.append(f"{'got' if given else 'asked'} {self.side}")
        if given:
            return pb.AcquireSlotResponse(slot=pb.SlotHolder(kind=max(self.kind, request.kind)))
        return pb.AcquireSlotResponse(wait=migration_pb2.Wait(host=self.side, position=1, queue_length=1))

    async def release_slot(self, request: pb.ReleaseSlotRequest) -> pb.ReleaseSlotResponse:
        self.log.append(f"{'gave back' if request.keep_place else 'left'} {self.side}")
        return pb.ReleaseSlotResponse()


class Both:
    def __init__(self, source_at: float = 0.0, destination_at: float = 0.0) -> None:
        self.clock, self.log = FakeClock(), list[str]()
        self.waits: list[Any] = []
        self.source = Host("source", self.clock, self.log, source_at)
        self.destination = Host("destination", self.clock, self.log, destination_at)
        request = functools.partial(slot_request, ID, plan=make_plan())
        source: Any = self.source
        destination: Any = self.destination
        self.slots = BothSlots(source, destination, request, self.waits.append, lambda _: None, self.clock, lambda: 1.0)


async def test_8_2_two_free_slots_are_taken_in_one_exchange() -> None:
    both = Both()
    await both.slots.acquire(PREPARED)
    assert both.log == ["got source", "got destination"]
    assert both.waits == [None]


async def test_8_2_the_source_is_not_held_while_the_destination_is_waited_for() -> None:
    both = Both(destination_at=30.0)
    await both.slots.acquire(PREPARED)
    assert both.log[:3] == ["got source", "asked destination", "gave back source"]
    assert set(both.log[3:-1]) == {"asked destination", "place source", "got destination"}
    assert both.log[-1] == "got source", "taken at once when the destination's turn has come"
    assert both.waits[0].host == "destination"
    assert both.waits[-1] is None


async def test_8_2_the_destination_is_held_for_a_short_time_only() -> None:
    both = Both(source_at=30.0)
    await both.slots.acquire(PREPARED)
    given_back = both.log.index("gave back destination")
    assert both.log[:2] == ["asked source", "got destination"]
    assert both.log[given_back + 1] == "asked source", "then it waits at the source first"
    assert both.log[-1] == "got destination"
    assert both.log.count("gave back destination") == 1
    assert both.clock.now < 30.0 + HOLD_SECONDS


async def test_8_1_two_prepared_slots_become_transferring_ones() -> None:
    both = Both()
    await both.slots.acquire(PREPARED)
    assert both.slots.has("source", PREPARED)
    assert not both.slots.has("source", TRANSFERRING)
    await both.slots.acquire(TRANSFERRING)
    assert all(both.slots.has(side, TRANSFERRING) for side in ("source", "destination"))


async def test_8_2_an_error_names_its_side_and_the_end_leaves_both() -> None:
    both = Both()
    both.destination.error = DroverError(Reason.HOST_CLOSED, "closed")
    await fails(both.slots.acquire(PREPARED), Reason.HOST_CLOSED)
    assert both.slots.at == "destination"
    await both.slots.release()
    assert both.log[-2:] == ["left source", "left destination"]


async def test_8_2_an_error_of_a_call_beside_the_wait_belongs_to_no_side() -> None:
    """The importance was changed; the next error of the migration would else be taken for one of that host."""
    both = Both(destination_at=1.0)
    acquires = both.destination.acquire_slot

    async def changed(request: pb.AcquireSlotRequest) -> pb.AcquireSlotResponse:
        if both.waits:
            del vars(both.destination)["acquire_slot"]
            both.destination.error = DroverError(Reason.HOST_UNREACHABLE, "it does not answer")
            await both.slots.ask_again(PREPARED)
            both.destination.error = None
        return await acquires(request)

    vars(both.destination)["acquire_slot"] = changed
    await both.slots.acquire(PREPARED)
    assert both.slots.at == ""


async def test_8_2_an_older_agent_has_no_queue() -> None:
    both = Both()
    both.destination.error = DroverError(Reason.UNIMPLEMENTED, "an older agent")
    await both.slots.acquire(PREPARED)
    assert both.slots.has("destination", TRANSFERRING)


def test_8_2_a_long_queue_is_asked_seldom() -> None:
    assert [poll_seconds(length) for length in (0, 100, 200, 1000)] == [2.0, 2.0, 4.0, 8.0]
