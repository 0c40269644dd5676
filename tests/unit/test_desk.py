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
from agent.admission.values import UNKNOWN_ROW, Ask, Direction
from agent.handshake.host.journal import Journal
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import host_pb2
from tests.unit.asking import fails, until

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
