"""agent.handshake.host.journal: which ended records are kept, and that they are ordered by writing and not by the clock."""

import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import agent.handshake.host.journal
from agent.handshake.host.journal import Journal
from agent.handshake.host.records import AttemptRecord, Role, Statement, encode
from tests.unit.asking import ID, record, statement


@pytest.fixture
async def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Journal]:
    """A journal that keeps only three rows on which no decision depends."""
    monkeypatch.setattr(agent.handshake.host.journal, "KEEP", 3)
    monkeypatch.setattr(agent.handshake.host.journal, "TRIM_AFTER", 1)
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    yield journal
    await journal.close()


async def reopened(journal: Journal) -> Journal:
    await journal.close()
    again = Journal(journal.path)
    await again.open()
    return again


async def listed(journal: Journal) -> list[AttemptRecord]:
    """All of them, the newest first."""
    return [each for _, each in await journal.page_of_attempts(active_only=False, before=None, limit=1000)]


def numbered(number: int, state: str, **fields: Any) -> AttemptRecord:
    return record(fields.pop("role", Role.DESTINATION), state, migration_id=str(uuid.UUID(int=number)), **fields)


async def test_ended_attempts_do_not_pile_up_over_lives_that_are_short(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.handshake.host.journal, "TRIM_AFTER", 8)
    for life in range(4):
        for number in range(3):
            await journal.put_attempt(numbered(10 * life + number, "gone"))
        journal = await reopened(journal)
    assert len(await listed(journal)) < 3 + 8
    await journal.close()


async def test_no_number_of_tombstones_pushes_a_commit_out(journal: Journal) -> None:
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    for number in range(10):
        await journal.put_attempt(numbered(number, "gone"))
    assert await journal.get_attempt(ID) is not None
    assert len(await listed(journal)) == 4
    assert await journal.get_attempt(str(uuid.UUID(int=1))) is None


async def test_6_6_a_commit_stays_until_its_source_has_ended(journal: Journal) -> None:
    """A source that was away may ask for it; without the record it would resume the guest."""
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    for number in range(10):
        await journal.put_attempt(numbered(number, "running"))
    assert len(await journal.unsettled()) == 11
    for number in range(10):
        await journal.put_attempt(numbered(number, "running", settled=True))
    assert [each.migration_id for each in await journal.unsettled()] == [ID]
    assert await journal.get_attempt(ID) is not None
    assert await journal.get_attempt(str(uuid.UUID(int=1))) is None  # its source will never ask for it


async def test_6_6_what_an_operator_stated_stays_until_the_other_host_can_learn_it(journal: Journal) -> None:
    said = Statement.of(statement("h2"))
    await journal.put_attempt(record(Role.SOURCE, "kept", statement=said))
    for number in range(10):
        await journal.put_attempt(numbered(number, "kept", role=Role.SOURCE))
    found = await journal.get_attempt(ID)
    assert found is not None
    assert found.statement == said
    assert await journal.unsettled() == []


@pytest.mark.parametrize(
    ("later", "brought"),
    [
        ((), True),
        ((("kept", Role.SOURCE),), True),  # it began to leave, and stayed
        ((("gone", Role.DESTINATION),), True),
        ((("performed", Role.SOURCE),), True),
        ((("removed", Role.SOURCE),), False),
        ((("running", Role.DESTINATION),), False),
        ((("removed", Role.SOURCE), ("kept", Role.SOURCE)), False),
    ],
)
async def test_6_6_the_order_of_the_attempts_at_a_guest_is_durable(
    journal: Journal, later: tuple[tuple[str, Role], ...], *, brought: bool
) -> None:
    """`arrival` names the right attempt whatever was read, rewritten or trimmed since, over restarts, and without a clock."""
    first = record(Role.DESTINATION, "running", created=9e9, updated=9e9)
    await journal.put_attempt(first)
    for number, (state, role) in enumerate(later):
        await journal.put_attempt(numbered(number, state, role=role))
    for number in range(10, 20):
        await journal.put_attempt(numbered(number, "gone", domain_uuid=str(uuid.UUID(int=number))))
    await journal.put_attempt(first.changed(waiting_for=""))
    again = await reopened(journal)
    try:
        assert await again.get_attempt(ID) is not None
        assert await again.brought(first) is brought
    finally:
        await again.close()


async def test_6_6_the_numbers_of_lives_in_epochs_rise_over_restarts(journal: Journal) -> None:
    lives = []
    for _ in range(5):
        lives.append(await journal.admission.next_life(0))
        journal = await reopened(journal)
    await journal.close()
    assert lives == sorted(set(lives))


async def test_6_6_a_journal_of_an_earlier_drover_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    said = Statement.of(statement("h2"))
    rows = [
        (2, numbered(1, "running")),
        (1, numbered(2, "removed", role=Role.SOURCE)),
        (2, record(Role.DESTINATION, "running")),
        (1, numbered(3, "kept", role=Role.SOURCE, statement=said)),
        (0, numbered(4, "performing", role=Role.SOURCE)),
    ]
    first = agent.handshake.host.journal._SCHEMA[0]
    assert isinstance(first, str)
    connection = sqlite3.connect(path)
    connection.executescript(first)
    for number, (kind, each) in enumerate(rows):
        connection.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?)", (*each.key, kind, number, encode(each)))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    journal = Journal(path)
    await journal.open()
    try:
        assert [each.migration_id for each in await journal.unsettled()] == [numbered(1, "").migration_id, ID]
        assert not await journal.brought(numbered(1, "running"))
        assert await journal.brought(record(Role.DESTINATION, "running"))
        assert [each.state for each in await journal.active()] == ["performing"]
        assert len(await listed(journal)) == len(rows)
    finally:
        await journal.close()


async def test_6_29_passwords_in_a_journal_of_an_earlier_drover_are_removed(tmp_path: Path) -> None:
    path, secret = tmp_path / "journal.sqlite", "passwd='open sesame'"
    first = agent.handshake.host.journal._SCHEMA[0]
    assert isinstance(first, str)
    connection = sqlite3.connect(path)
    connection.executescript(first)
    for number in range(20):
        old = numbered(number, "kept", role=Role.SOURCE, domain_xml=secret * 100, cookies={"perform": secret.encode()})
        connection.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?)", (*old.key, 1, number, msgspec.msgpack.encode(old)))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    assert secret.encode() in path.read_bytes()
    journal = Journal(path)
    await journal.open()
    await journal.close()
    assert [file.name for file in tmp_path.iterdir() if secret.encode() in file.read_bytes()] == []


async def test_what_is_not_here_is_told_without_a_look_and_what_is_here_is_found(journal: Journal) -> None:
    """The ids in memory are those of the rows, whatever was trimmed and rewritten."""
    await journal.put_attempt(numbered(1, "gone", attempt=1))
    await journal.put_attempt(numbered(1, "reserved", attempt=2))
    for number in range(2, 12):
        await journal.put_attempt(numbered(number, "gone"))
    for number in (3, 10):
        await journal.put_attempt(numbered(number, "gone"))
    kept = {each.migration_id for each in await listed(journal)}
    assert len(kept) == 4
    assert journal._ids == kept
    again = await reopened(journal)
    try:
        assert again._ids == kept
        assert await again.get_attempt(numbered(1, "").migration_id) is not None
        assert await again.get_attempt(numbered(5, "").migration_id) is None
    finally:
        await again.close()


async def test_a_clock_that_goes_back_costs_no_record(journal: Journal) -> None:
    for number in range(4):
        await journal.put_attempt(numbered(number, "running", updated=time.time() + 3600 + number))
    await journal.put_attempt(record(Role.DESTINATION, "armed"))
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    assert await journal.get_attempt(ID) is not None
    assert (await listed(journal))[0].migration_id == ID


async def test_what_is_active_is_never_trimmed(journal: Journal) -> None:
    await journal.put_attempt(record(Role.DESTINATION, "armed"))
    for number in range(10):
        await journal.put_attempt(numbered(number, "gone"))
        await journal.put_attempt(numbered(100 + number, "running"))
    (active,) = await journal.active()
    assert active.migration_id == ID


async def test_the_order_goes_on_after_a_restart(journal: Journal) -> None:
    for number in range(3):
        await journal.put_attempt(numbered(number, "gone"))
    await journal.save("older", b"older", ended=True)
    again = await reopened(journal)
    try:
        await again.put_attempt(numbered(7, "gone"))
        await again.save("newer", b"newer", ended=False)
        assert (await listed(again))[0].migration_id == str(uuid.UUID(int=7))
        assert await again.load() == [b"older", b"newer"]
    finally:
        await again.close()
