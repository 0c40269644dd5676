"""agent.runtime.events and its first consumer, the log."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
import structlog

from agent.runtime import event_log, events
from agent.runtime.errors import DroverError, Reason
from agent.runtime.event_log import events_logged, level_of
from agent.runtime.events import Bus, CallHandled, Event, HostChanged, MigrationChanged, Published, StatementChanged
from tests.unit.asking import until


def host(name: str) -> HostChanged:
    return HostChanged(name, change="up")


async def taken(subscription: AsyncIterator[Published]) -> list[tuple[int, Event]]:
    """Return what a consumer gets until the end."""
    return [(published.revision, published.event) async for published in subscription]


async def test_7_each_event_has_the_next_revision_and_each_consumer_gets_all_since_it_came(bus: Bus) -> None:
    bus.publish(host("h1"))
    early = bus.subscribe()
    bus.publish(host("h2"))
    late = bus.subscribe()
    bus.publish(host("h3"))
    bus.close()
    assert await taken(early) == [(2, host("h2")), (3, host("h3"))]
    assert await taken(late) == [(3, host("h3"))]
    assert await taken(bus.subscribe()) == []


async def test_7_a_consumer_that_waits_gets_an_event_as_it_is_published(bus: Bus) -> None:
    subscription = bus.subscribe()
    waiting = asyncio.ensure_future(anext(subscription))
    await asyncio.sleep(0)
    assert not waiting.done()
    bus.publish(host("h1"))
    assert (await asyncio.wait_for(waiting, 5)).event == host("h1")
    waiting = asyncio.ensure_future(anext(subscription))
    await asyncio.sleep(0)
    bus.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 5)


async def test_7_a_consumer_that_leaves_gets_no_more(bus: Bus) -> None:
    subscription = bus.subscribe()
    bus.publish(host("h1"))
    subscription.close()
    bus.publish(host("h2"))
    assert await taken(subscription) == [(1, host("h1"))]
    assert not bus._subscriptions


async def test_7_a_slow_consumer_is_cut_off_and_nobody_else(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_WAITING", 3)
    slow, quick = bus.subscribe(), bus.subscribe()
    got = []
    for name in ("h1", "h2", "h3", "h4", "h5"):
        bus.publish(host(name))
        got.append((await anext(quick)).event)
    assert got == [host(name) for name in ("h1", "h2", "h3", "h4", "h5")]
    assert [(await anext(slow)).revision for _ in range(3)] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(DroverError, match="subscribe again") as caught:
            await anext(slow)
        assert (caught.value.reason, caught.value.metadata) == (Reason.WATCH_TOO_SLOW, {"revision": "4"})
    bus.publish(host("h6"))
    assert (await anext(quick)).revision == 6
    assert bus._subscriptions == [quick]


async def test_7_the_log_has_one_line_for_each_event(bus: Bus) -> None:
    bus.publish(host("unheard"))
    with structlog.testing.capture_logs() as logs:
        async with events_logged(bus):
            bus.publish(host("h1"))
            bus.publish(StatementChanged("m1", change="made", dead_host="h2", said_by="ann", message="on fire"))
    assert logs == [
        {"event": "host", "log_level": "info", "revision": 2, "host": "h1", "change": "up"},
        {
            "event": "statement",
            "log_level": "warning",
            "revision": 3,
            "migration": "m1",
            "change": "made",
            "dead_host": "h2",
            "said_by": "ann",
            "message": "on fire",
        },
    ]


async def test_7_a_log_that_cannot_keep_up_says_so_and_goes_on(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_WAITING", 2)
    with structlog.testing.capture_logs() as logs:
        async with events_logged(bus):
            for name in ("h1", "h2", "h3"):
                bus.publish(host(name))
            await until(lambda: len(logs) == 3)
            bus.publish(host("h4"))
    assert [line.get("host") or line["event"] for line in logs] == ["h1", "h2", "events left out", "h4"]
    assert "revision 3" in logs[2]["error"]


async def test_7_an_event_that_cannot_be_written_stops_neither_the_log_nor_the_publisher(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(event: Event) -> int:
        monkeypatch.undo()
        raise ValueError("a bug")

    monkeypatch.setattr(event_log, "level_of", failing)
    monkeypatch.setattr(event_log, "FLUSH_SECONDS", 5)
    with structlog.testing.capture_logs() as logs:
        async with events_logged(bus):
            bus.publish(host("h1"))
            bus.publish(host("h2"))
    assert [line.get("host") or line["event"] for line in logs][-1] == "h2"


def called(right: str, reason: str = "") -> CallHandled:
    return CallHandled("/m", "", right=right, caller="", milliseconds=1.0, reason=reason)


def moving(state: str) -> MigrationChanged:
    named = {"source_host": "h1", "destination_host": "h2", "domain_uuid": "", "wait_reason": ""}
    return MigrationChanged("m1", 1, state=state, phase="perform", **named)


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (host("h1"), logging.INFO),
        (HostChanged("h1", change="unreachable"), logging.WARNING),
        (called("migrate"), logging.INFO),
        (called("operate"), logging.INFO),
        (called("operate", "NOT_IN_DOUBT"), logging.DEBUG),
        (called("peer"), logging.DEBUG),
        (called("register"), logging.DEBUG),
        (moving("active"), logging.DEBUG),
        (moving("succeeded"), logging.INFO),
    ],
)
def test_7_what_others_can_repeat_is_told_at_the_lowest_level(event: Event, level: int) -> None:
    assert level_of(event) == level
