"""agent.admission.desk on a real journal: full queues, an agent that stops, and damaged rows (issue 8, points 1 and 2)."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import agent.admission.queue
from agent.admission.desk import Desk
from agent.admission.settings import Configured
from agent.admission.store import AdmissionRows
from agent.admission.values import UNKNOWN_ROW, Ask, Direction, Kind
from agent.handshake.host.journal import Journal
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.paging import Paging
from drover.agent.v1 import admission_pb2, host_pb2
from tests.unit.asking import PATIENCE, fails, until

IN, OUT = Direction.INCOMING, Direction.OUTGOING


class Stopping:
    """Whether the agent stops."""

    def __init__(self) -> None:
        self.now = False

    def check(self) -> None:
        if self.now:
            raise DroverError(Reason.DRAINING, "h1 is stopping")


@contextlib.asynccontextmanager
async def desk_in(folder: Path, stopping: Stopping | None = None) -> AsyncIterator[tuple[Desk, Journal]]:
    journal = Journal(folder / "journal.sqlite")
    await journal.open()
    check = (stopping or Stopping()).check
    desk = Desk("h1", Configured(1, 1), journal.admission, Bus(), lease=60, takeover_after=60, check_open=check)
    await desk.open()
    try:
        yield desk, journal
    finally:
        await desk.close()
        await journal.close()


async def test_8_2_a_full_queue_takes_nobody_more_but_serves_those_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.admission.queue, "MOST_WAITING", 3)
    async with desk_in(tmp_path) as (desk, _):
        await desk.queues[IN].acquire(Ask("holder"))
        for name in ("a", "b", "c"):
            await desk.queues[IN].acquire(Ask(name), wait=0.001)
        for call in (
            desk.queues[IN].acquire(Ask("late"), wait=1),
            desk.queues[IN].keep_place(Ask("late")),
        ):
            error = await fails(call, Reason.OVERLOADED)
            assert error.retry_after
            assert "incoming slots of h1" in error.message
        assert desk.queues[IN].book.find("late") is None
        await desk.queues[IN].acquire(Ask("a"), wait=0.001)  # it has its place
        await desk.queues[OUT].acquire(Ask("late"))  # the other direction has room
        desk.queues[IN].release("b", keep_place=False)
        await desk.queues[IN].acquire(Ask("late"), wait=0.001)
        assert [claim.migration_id for claim in desk.queues[IN].book.in_order()] == ["a", "c", "late"]


async def test_8_2_an_agent_that_stops_ends_waits_and_keeps_their_places_for_its_next_life(tmp_path: Path) -> None:
    stopping = Stopping()
    async with desk_in(tmp_path, stopping) as (desk, _):
        await desk.queues[IN].acquire(Ask("holder"))
        waits = asyncio.create_task(desk.queues[IN].acquire(Ask("waits"), wait=30))
        await until(lambda: (claim := desk.queues[IN].book.find("waits")) is not None and claim.row not in (None, UNKNOWN_ROW))
        stopping.now = True
        desk.drain()
        await fails(waits, Reason.DRAINING)
        await fails(desk.queues[IN].acquire(Ask("new")), Reason.DRAINING)
        await fails(desk.queues[IN].acquire(Ask("new"), wait=1), Reason.DRAINING)
    async with desk_in(tmp_path) as (desk, _):
        await fails(desk.queues[IN].acquire(Ask("new")), Reason.BUSY)  # the place holds it up
        assert [claim.migration_id for claim in desk.queues[IN].book.in_order()] == ["waits"]


async def test_8_2_a_list_of_slots_misses_no_migration_that_waits_all_the_time(tmp_path: Path) -> None:
    """The first of the queue leaves between two pages: those behind it move up by one place."""
    async with desk_in(tmp_path) as (desk, _):
        queue, seen, token = desk.queues[IN], [], ""
        for name, importance in (("holder", 2), ("a", 3), ("b", 1), ("c", 2), ("d", 3)):
            await queue.acquire(Ask(name, importance=importance), wait=0.001)
        for _ in range(3):
            request = admission_pb2.ListSlotsRequest(page_size=2, page_token=token)
            page = Paging(request, int, int, int).take(desk.slots())
            seen += [(slot.migration_id, slot.position) for slot in page.items]
            token = page.token
            queue.release("a", keep_place=False)
        assert (seen, token) == ([("holder", 0), ("a", 1), ("b", 3), ("c", 2), ("d", 1)], "")


async def test_8_2_a_place_whose_caller_left_while_it_was_written_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_in(tmp_path) as (desk, _):
        queue, writing = desk.queues[OUT], asyncio.Event()

        async def hang(*_: object) -> None:
            writing.set()
            await asyncio.Event().wait()

        queue.book.lease = 0.05
        monkeypatch.setattr(AdmissionRows, "put_place", hang)
        call = asyncio.create_task(queue.keep_place(Ask("left")))
        await writing.wait()
        call.cancel()
        await asyncio.wait({call})
        await until(lambda: queue.book.find("left") is None)


async def test_8_2_a_call_for_less_does_not_take_a_waiting_call_out_of_the_queue(tmp_path: Path) -> None:
    """Two drivers of one migration: one waits for the right to transfer, the other one asks for any slot, which it has."""
    async with desk_in(tmp_path) as (desk, _):
        queue = desk.queues[IN]
        await queue.acquire(Ask("holder"))
        await queue.acquire(Ask("m", Kind.PREPARED))
        waits = asyncio.create_task(queue.acquire(Ask("m", Kind.TRANSFERRING), wait=30))
        await until(lambda: queue.book.queue_length)
        assert (await queue.acquire(Ask("m", Kind.PREPARED), wait=1)).has(Kind.PREPARED)
        queue.release("holder", keep_place=False)
        assert (await asyncio.wait_for(waits, PATIENCE)).has(Kind.TRANSFERRING)


async def damage(folder: Path, table: str) -> None:
    """Change the content of the rows of a table, as a bad disk does."""
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as connection, connection:
        assert connection.execute(f"UPDATE {table} SET body = x'c1'").rowcount == 1


async def test_8_2_a_damaged_place_is_lost_and_the_others_are_served(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as (desk, _):
        await desk.queues[IN].acquire(Ask("holder"))
        await desk.queues[IN].acquire(Ask("waits"), wait=0.001)
    await damage(tmp_path, "places")
    async with desk_in(tmp_path) as (desk, _):
        await desk.queues[IN].acquire(Ask("new"))
        assert desk.queues[IN].book.find("waits") is None


async def test_8_1_damaged_settings_refuse_the_start(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as (desk, _):
        request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(incoming_limit=0))
        request.update_mask.paths[:] = ["incoming_limit"]
        await desk.update(request)
    await damage(tmp_path, "settings")
    with pytest.raises(DroverError) as error:
        async with desk_in(tmp_path):
            pass
    assert error.value.reason is Reason.JOURNAL_UNAVAILABLE
    assert "the limits that were changed while this agent ran" in error.value.message
