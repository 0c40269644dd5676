"""agent.admission on a real journal: calls that are cut short, and restarts, at a bad moment."""

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.admission.desk import Desk
from agent.admission.settings import Configured
from agent.admission.values import Ask, Direction
from agent.handshake.host.journal import Journal
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus

ONE = Configured(outgoing_limit=1)
OUTGOING = Direction.OUTGOING


@contextlib.asynccontextmanager
async def desk_in(folder: Path, configured: Configured = ONE) -> AsyncIterator[tuple[Desk, Journal]]:
    journal = Journal(folder / "journal.sqlite")
    await journal.open()
    desk = Desk("h1", configured, journal.admission, Bus(), lease=60, takeover_after=60)
    try:
        yield desk, journal
    finally:
        await desk.close()
        await journal.close()


async def test_8_2_a_place_that_was_given_back_leaves_no_row_wherever_its_call_was_cut_short(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as (desk, journal):
        queue = desk.queues[OUTGOING]
        await queue.acquire(Ask("other"))
        for turns in range(8):
            waiting = asyncio.ensure_future(queue.acquire(Ask("one", driver="co", pending=b"pending"), wait=5))
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            queue.release("one", keep_place=False)
            await queue.places.close()
            assert await journal.admission.places() == [], f"cancelled after {turns} turns of the loop"


async def test_8_1_a_record_is_not_made_with_a_slot_that_is_too_small_for_its_guest(tmp_path: Path) -> None:
    async with desk_in(tmp_path, Configured(outgoing_limit=3, slot_unit_memory=100)) as (desk, _):
        queue = desk.queues[OUTGOING]
        book = queue.book
        await queue.acquire(Ask("holds", memory=200))
        await queue.acquire(Ask("big", memory=1))
        with pytest.raises(DroverError) as caught, queue.taking(Ask("big", memory=200)):
            pass
        assert (caught.value.reason, caught.value.metadata["position"]) == (Reason.BUSY, "1")
        assert (book.transferring, book.queue_length) == (2, 1), "it waits with the cost that it has"
        queue.release("holds", keep_place=False)
        await queue.acquire(Ask("big", memory=1), wait=1)
        with queue.taking(Ask("big", memory=200)) as slot:
            assert slot.cost == book.transferring == 2


async def test_8_2_the_places_of_an_earlier_life_take_little_memory_and_what_they_carry_stays(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as (desk, _):
        await desk.queues[OUTGOING].acquire(Ask("other"))
        for number in range(100):
            await desk.queues[OUTGOING].keep_place(Ask(f"m{number}", driver="co", pending=bytes(1 << 18)))
    async with desk_in(tmp_path) as (desk, journal):
        tracemalloc.start()
        await desk.open()
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()
        assert len(desk.queues[OUTGOING].book.in_order()) == 100
        place = await journal.admission.place(OUTGOING, "m7")
        assert place is not None
        assert len(place.pending) == 1 << 18
