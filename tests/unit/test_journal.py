"""agent.journal: what is kept of what has ended, in the order of writing and not of the clock."""

import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import agent.journal
from agent.handshake.records import AttemptRecord, Role
from agent.journal import Journal
from tests.unit.asking import ID, record


@pytest.fixture
async def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Journal]:
    """Of three rows of each kind, so that it is soon full."""
    monkeypatch.setattr(agent.journal, "_KEPT", {agent.journal._ENDED: 3, agent.journal._COMMIT: 3})
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    yield journal
    await journal.close()


def numbered(number: int, state: str, updated: float = 0.0) -> AttemptRecord:
    of = record(Role.DESTINATION, state, updated=updated)
    return AttemptRecord(
        migration_id=str(uuid.UUID(int=number)), attempt=1, role=of.role, state=state, domain_uuid=of.domain_uuid, updated=updated
    )


async def test_no_number_of_tombstones_pushes_a_commit_out(journal: Journal) -> None:
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    for number in range(10):
        await journal.put_attempt(numbered(number, "gone"))
    assert await journal.get_attempt(ID) is not None
    assert len(await journal.attempts()) == 4
    assert await journal.get_attempt(str(uuid.UUID(int=1))) is None


async def test_a_clock_that_goes_back_costs_no_record(journal: Journal) -> None:
    for number in range(4):
        await journal.put_attempt(numbered(number, "running", updated=time.time() + 3600 + number))
    await journal.put_attempt(record(Role.DESTINATION, "armed"))
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    assert await journal.get_attempt(ID) is not None
    assert (await journal.attempts())[0].migration_id == ID


async def test_what_is_active_is_never_trimmed(journal: Journal) -> None:
    await journal.put_attempt(record(Role.DESTINATION, "armed"))
    for number in range(10):
        await journal.put_attempt(numbered(number, "gone"))
        await journal.put_attempt(numbered(100 + number, "running"))
    (active,) = await journal.attempts(active_only=True)
    assert active.migration_id == ID


async def test_the_order_goes_on_after_a_restart(journal: Journal, tmp_path: Path) -> None:
    for number in range(3):
        await journal.put_attempt(numbered(number, "gone"))
    await journal.save("older", b"older", ended=True)
    await journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    await again.open()
    try:
        await again.put_attempt(numbered(7, "gone"))
        await again.save("newer", b"newer", ended=False)
        assert (await again.attempts())[0].migration_id == str(uuid.UUID(int=7))
        assert await again.load() == [b"older", b"newer"]
    finally:
        await again.close()
