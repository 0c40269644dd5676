"""agent.migration.collection: revisions, the order of lists, and watches of all migrations (issue 7, part 2)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

import agent.migration.collection
from agent.handshake.host.journal import Journal
from agent.migration.collection import Change, Collection
from agent.migration.migration import Entry
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service.migration_service import MigrationServicer
from coordinator.store import SqliteStore
from coordinator.store.migration_log import StoredMigrations
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, PATIENCE, fails, until
from tests.unit.fake_directory import Driving, FakeLog
from tests.unit.test_migrations import SPEC, flowing
from tests.unit.test_uptime import HOUR, set_wall_clock

ENDED = pb.MIGRATION_STATE_FAILED


def collection(life: int = 1) -> Collection:
    made = Collection("h1", Bus())
    made.open(life, [])
    return made


def add(to: Collection, migration_id: str, state: pb.MigrationState.ValueType = pb.MIGRATION_STATE_ACTIVE) -> Entry:
    entry = Entry(pb.Migration(migration_id=migration_id, state=state), FakeLog())
    to.publish(entry, entry.migration)
    return entry


async def take(watch: AsyncIterator[Change], count: int) -> list[str]:
    """Return that many messages, each in short: the id and its removal, or the mark after the first states."""
    found = []
    async with asyncio.timeout(PATIENCE):
        for _ in range(count):
            change = await anext(watch)
            found.append(
                change.migration.migration_id if change.migration is not None else f"-{change.removed}" * bool(change.removed)
            )
    return found


# --- watches ----------------------------------------------------------------------------------------------------------


async def test_7_a_watch_says_what_there_is_then_each_change_and_each_removal() -> None:
    made = collection()
    for name in "abc":
        add(made, name)
    watch = made.watch_all(0)
    assert await take(watch, 4) == ["a", "b", "c", ""]
    b = made.get("b")
    made.publish(b, b.changed_to(phase="perform"))
    made.remove("a")
    add(made, "d")
    assert await take(watch, 3) == ["b", "-a", "d"]


async def test_7_list_then_watch_misses_nothing() -> None:
    made = collection()
    a, _ = add(made, "a"), add(made, "b")
    listed = made.revision
    made.remove("b")
    made.publish(a, a.changed_to(phase="perform"))
    watch = made.watch_all(listed)
    assert await take(watch, 3) == ["-b", "a", ""]


async def test_7_a_watch_goes_on_after_any_message() -> None:
    made = collection()
    for name in "abcd":
        add(made, name)
    made.remove("b")
    all_of_it, messages = ["a", "c", "d", "-b", ""], made.watch_all(0)
    for place, name in enumerate(["a", "c", "d"]):
        change = await anext(messages)
        assert change.migration is not None
        assert change.migration.migration_id == name
        assert await take(made.watch_all(change.revision), 4 - place) == all_of_it[place + 1 :]
    assert await take(made.watch_all((await anext(messages)).revision), 1) == [""]


async def test_7_a_slow_reader_gets_the_newest_state_of_what_changed() -> None:
    made = collection()
    a, b = add(made, "a"), add(made, "b")
    watch = made.watch_all(0)
    assert await take(watch, 1) == ["a"]
    for phase in ("begin", "prepare", "perform"):
        for entry in (a, b):
            made.publish(entry, entry.changed_to(phase=phase))
    later = await anext(watch)
    assert later.migration is not None
    assert (later.migration.migration_id, later.migration.phase) == ("b", "perform")
    assert await take(watch, 3) == ["", "a", "b"]


async def test_7_a_reader_that_is_too_slow_for_the_removals_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.migration.collection, "KEEP", 3)
    made = collection()
    add(made, "a")
    watch = made.watch_all(made.revision)
    assert await take(watch, 1) == [""]
    for number in range(3):
        add(made, str(number))
        made.remove(str(number))
    quick = made.watch_all(made.revision)
    assert await take(quick, 1) == [""]
    assert await take(watch, 3) == ["-0", "-1", "-2"]
    for number in range(4):
        add(made, str(number))
        made.remove(str(number))
    error = await fails(anext(watch), Reason.WATCH_TOO_SLOW)
    assert "List again" in error.message
    assert await take(made.watch_all(0), 2) == ["a", ""]
    assert len(made._removed) == 3


@pytest.mark.parametrize("revision", [1, (9 << 32) + 5])
async def test_7_a_revision_that_is_not_of_this_life_is_refused(revision: int) -> None:
    """The removals of earlier lives are not known, and a revision of a later life comes from a log that was lost."""
    made = collection(life=5)
    add(made, "a")
    await fails(anext(made.watch_all(revision)), Reason.WATCH_TOO_SLOW)


async def follow(servicer: Any, seen: dict[str, pb.Migration]) -> None:
    """List, then watch, and again after WATCH_TOO_SLOW."""
    listed = await servicer.ListMigrations(pb.ListMigrationsRequest(), None)
    seen.clear()
    seen.update({migration.migration_id: migration for migration in listed.migrations})
    async for response in servicer.WatchMigrations(pb.WatchMigrationsRequest(from_revision=listed.revision), None):
        match response.WhichOneof("change"):
            case "migration":
                seen[response.migration.migration_id] = response.migration
            case "removed_migration_id":
                seen.pop(response.removed_migration_id, None)


async def test_7_list_then_watch_misses_nothing_over_a_restart(driving: Driving) -> None:
    servicer, seen = MigrationServicer(driving.migrations), dict[str, pb.Migration]()
    before = await servicer.ListMigrations(pb.ListMigrationsRequest(), cast(Any, None))
    await flowing(driving)
    last = driving.migrations.collection.revision
    await driving.restart()
    servicer = MigrationServicer(driving.migrations)
    for revision in (before.revision or 1, last):
        watch = servicer.WatchMigrations(pb.WatchMigrationsRequest(from_revision=revision), cast(Any, None))
        await fails(anext(watch), Reason.WATCH_TOO_SLOW)
    following = asyncio.create_task(follow(servicer, seen))
    driving.pair.wire.all_sent.set()
    await until(lambda: ID in seen and seen[ID].state == pb.MIGRATION_STATE_SUCCEEDED)
    following.cancel()
    assert seen[ID].revision > last


# --- revisions --------------------------------------------------------------------------------------------------------


async def test_7_a_revision_never_falls_whatever_was_written_down_and_whatever_the_clock_says(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    await flowing(driving)
    told = driving.migrations.collection.revision
    assert pb.Migration.FromString(driving.log.rows[ID][0]).revision < told, "not all that was told is written down"
    for by in (-HOUR, HOUR, -HOUR):
        set_wall_clock(monkeypatch, by)
        await driving.restart()
        assert driving.migrations.collection.get(ID).migration.revision > told
        told = driving.migrations.collection.revision


async def test_7_revisions_of_an_older_version_are_lower(driving: Driving) -> None:
    old = pb.Migration(migration_id=ID, state=ENDED, revision=1_800_000_000_000)  # milliseconds of the wall clock
    await driving.log.save(ID, old.SerializeToString(), ended=True)
    await driving.restart()
    assert driving.migrations.collection.revision > old.revision
    assert driving.migrations.collection.get(ID).migration == old


async def test_7_lists_are_in_the_order_of_the_starts_whatever_the_clock_says(
    driving: Driving, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [ID.replace("6f1c", f"{number}f1c") for number in range(4)]
    for migration_id in ids:
        set_wall_clock(monkeypatch, -HOUR)
        driving.pair.destination.room(0)
        await driving.migrations.start(migration_id, SPEC, 60)
    await driving.migrations.cancel(ids[1])
    await driving.ended(ids[1])
    listed = [migration.migration_id for migration in driving.migrations.collection.list(active_only=False)]
    assert listed == ids[::-1]
    await driving.restart()
    assert [migration.migration_id for migration in driving.migrations.collection.list(active_only=False)] == listed


# --- the logs ---------------------------------------------------------------------------------------------------------


async def lives(log: Any) -> list[int]:
    return [await log.next_life(0), await log.next_life(0), await log.next_life(100)]


async def test_7_an_agents_lives_are_counted_over_restarts(tmp_path: Path) -> None:
    for first in (1, 102):
        journal = Journal(tmp_path / "journal.sqlite")
        await journal.open()
        assert await lives(journal) == [first, first + 1, max(first + 2, 101)]
        await journal.close()


async def test_7_a_damaged_number_of_lives_is_followed_by_a_far_greater_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    assert await journal.next_life(0) == 1
    await journal._db.transaction(lambda connection: connection.execute("UPDATE lives SET number = 0").rowcount)
    await journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    await again.open()
    assert await again.next_life(0) > 1 << 20
    await again.close()


async def test_7_a_coordinators_lives_are_counted_over_restarts(tmp_path: Path) -> None:
    for first in (1, 102):
        async with await SqliteStore.open(tmp_path / "store.sqlite") as store:
            log = StoredMigrations(store)
            assert await lives(log) == [first, first + 1, max(first + 2, 101)]
            assert await log.load() == []


async def test_7_what_was_removed_is_not_loaded_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    async with await SqliteStore.open(tmp_path / "store.sqlite") as store:
        for log in (journal, StoredMigrations(store)):
            for migration_id, ended in (("a", False), ("b", True), ("c", False)):
                body = pb.Migration(migration_id=migration_id, state=ENDED).SerializeToString()
                await log.save(migration_id, body, ended=ended)
            for migration_id in ("a", "b", "none"):
                await log.remove(migration_id)
            assert [pb.Migration.FromString(body).migration_id for body in await log.load()] == ["c"]
    await journal.close()
