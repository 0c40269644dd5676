"""agent.handshake.host.journal: what happens when its files are damaged."""

import asyncio
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from agent.handshake.host.journal import Journal
from agent.handshake.host.records import AttemptRecord, Role
from agent.runtime.errors import DroverError, Reason
from agent.runtime.intact import Mark
from tests.unit.asking import ID, fails, record
from tests.unit.test_sqlite import flip


def numbered(number: int, state: str, **fields: Any) -> AttemptRecord:
    return record(fields.pop("role", Role.DESTINATION), state, migration_id=str(uuid.UUID(int=number)), **fields)


async def listed(journal: Journal) -> list[AttemptRecord]:
    """All of them, the newest first."""
    return [each for _, each in await journal.page_of_attempts(active_only=False, before=None, limit=1000)]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    yield journal
    await journal.close()


async def contents(journal: Journal) -> dict[str, Any]:
    """Records that must be served, and those that may be missing if an error reports it."""
    unsettled = await journal.unsettled()
    migrations = await journal.load()
    return {
        "active": await journal.active(),
        "commits": unsettled,
        "brought": [await journal.brought(each) for each in unsettled],
        "migrations": [body for body in migrations if body.startswith(b"active")],
        "ended": [each for each in await listed(journal) if each.state == "gone"],
        "ended migrations": [body for body in migrations if body.startswith(b"ended")],
    }


PROMISED: Final = ("active", "commits", "brought", "migrations")
MAY_BE_MISSING: Final = ("ended", "ended migrations")
SUFFIXES: Final = ("", "-wal", ".mark")


@dataclass(frozen=True)
class Crashed:
    """The files of a journal as its agent's death left them, and what was in it."""

    files: dict[str, bytes]
    contents: dict[str, Any]


async def crashed(path: Path, *, folded: bool) -> Crashed:
    """Write records of every kind, big and small, and migrations. `folded`: most are in the database file, the rest in the WAL."""
    journal = Journal(path)
    await journal.open()
    xml = "<domain>" + "x" * 6000
    for number in range(20):
        await journal.put_attempt(numbered(number, "gone"))
        await journal.put_attempt(numbered(100 + number, "running"))
        await journal.put_attempt(numbered(200 + number, "performing", role=Role.SOURCE, domain_xml=xml))
        await journal.save(f"ended{number}", b"ended" * 50, ended=True)
        await journal.save(f"active{number}", b"active" * 50, ended=False)
    if folded:
        await journal.close()
        journal = Journal(path)
        await journal.open()
        for number in range(300, 305):
            await journal.put_attempt(numbered(number, "performing", role=Role.SOURCE))
    made = Crashed({suffix: Path(f"{path}{suffix}").read_bytes() for suffix in SUFFIXES}, await contents(journal))
    await journal.close()
    return made


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> list[Crashed]:
    folder = tmp_path_factory.mktemp("journals")
    return [asyncio.run(crashed(folder / f"{folded}.sqlite", folded=folded)) for folded in (False, True)]


async def damaged(path: Path, crash: Crashed, random: Random) -> str:
    """Flip bits, open the journal and compare. Return the error if the start fails; empty if all promised records are served."""
    for suffix, data in crash.files.items():
        Path(f"{path}{suffix}").write_bytes(data)
    for suffix in random.choice([[""], ["-wal"], ["", "-wal"], ["", "-wal", ".mark"]]):
        flip(Path(f"{path}{suffix}"), random.choice([1, 1, 2, 20]), random)
    journal = Journal(path)
    with capture_logs() as logs:
        try:
            await journal.open()
        except DroverError as error:
            return error.message
        try:
            after = await contents(journal)
        finally:
            await journal.close()
    assert {name: after[name] for name in PROMISED} == {name: crash.contents[name] for name in PROMISED}
    told = [entry for entry in logs if entry["event"] == "sqlite.damaged_row"]
    assert len(told) == sum(len(crash.contents[name]) - len(after[name]) for name in MAY_BE_MISSING)
    assert all(each in crash.contents[name] for name in MAY_BE_MISSING for each in after[name])
    return ""


@pytest.mark.parametrize("seed", range(100))
async def test_6_27_flipped_bits_lose_nothing_without_a_word(tmp_path: Path, crashes: list[Crashed], seed: int) -> None:
    """Few or many, in the database, in the WAL or in both: all promised records are served, or one line reports the damage."""
    said = await damaged(tmp_path / "journal.sqlite", crashes[seed % 2], Random(seed))
    assert "\n" not in said
    assert not said or f"{tmp_path}/journal.sqlite cannot be used: " in said


def spoil(path: Path, table: str, column: str, where: str) -> None:
    """Damage within a row, which SQLite does not notice."""
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE {table} SET {column} WHERE {where}")
    connection.commit()
    connection.close()


BODY = "body = CAST(substr(body, 1, 20) || x'00' || substr(body, 22) AS BLOB)"


async def test_6_27_a_damaged_record_that_has_ended_is_told_and_stops_nothing(journal: Journal) -> None:
    await journal.put_attempt(record(Role.SOURCE, "kept"))
    await journal.save("m1", b"a migration that has ended, with a long text", ended=True)
    await journal.put_attempt(numbered(1, "performing", role=Role.SOURCE))
    await journal.close()
    spoil(journal.path, "attempts", BODY, f"migration_id = '{ID}'")
    spoil(journal.path, "migrations", BODY, "migration_id = 'm1'")
    for life in range(2):
        with capture_logs() as logs:
            again = Journal(journal.path)
            await again.open()
        told = [entry["row"] for entry in logs if entry["event"] == "sqlite.damaged_row"]
        expected = [f"the record of attempt 1 of migration {ID}", "migration m1, which this agent drives,"]
        assert told == ([] if life else expected)
        assert len(await again.active()) == 1
        assert await again.load() == []
        assert [each.state for each in await listed(again)] == ["performing"]
        lost = await fails(again.get_attempt(ID), Reason.JOURNAL_UNAVAILABLE)  # not None, as if it had never existed
        assert "was damaged on the disk" in lost.message
        assert next(again._numbers) > 3
        await again.close()


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("attempts", BODY),
        ("attempts", "kind = 1"),
        ("attempts", "migration_id = 'another'"),
        ("migrations", BODY),
        ("arrivals", "attempt = 7"),
    ],
)
async def test_6_27_a_damaged_record_that_still_decides_refuses_the_start(journal: Journal, table: str, column: str) -> None:
    await journal.put_attempt(record(Role.DESTINATION, "running"))
    await journal.save("m1", b"a migration that has not ended, with a long text", ended=False)
    number = next(journal._numbers)
    await journal.close()
    spoil(journal.path, table, column, "1 = 1")
    for _ in range(2):
        refused = await fails(Journal(journal.path).open(), Reason.JOURNAL_UNAVAILABLE)
        assert refused.metadata["cause"] == "DAMAGED_ROW"
        assert refused.message.endswith(f"touch {journal.path}.accept-loss")
    journal.path.with_name(journal.path.name + ".accept-loss").touch()
    again = Journal(journal.path)
    await again.open()
    try:
        assert next(again._numbers) > number + 1000  # lost rows may have had greater numbers
        if (table, column) == ("attempts", BODY):
            assert await again.unsettled() == []
            await fails(again.get_attempt(ID), Reason.JOURNAL_UNAVAILABLE)
    finally:
        await again.close()


@pytest.mark.parametrize(("daemon", "file"), [("agent", "journal.sqlite"), ("coordinator", "store.sqlite")])
def test_6_27_a_daemon_whose_memory_is_empty_says_so_in_one_line(tmp_path: Path, daemon: str, file: str) -> None:
    extra = 'hypervisor = "sim"\n' if daemon == "agent" else ""
    (tmp_path / "c.toml").write_text(f'name = "a"\nstate_dir = "{tmp_path}"\nlisten = ["unix:{tmp_path}/s"]\n{extra}')
    mark = Mark(tmp_path / f"{file}.mark")
    mark.open(41)
    mark.close()
    (tmp_path / file).touch()
    args = [sys.executable, "-c", "from coordinator.cli import main; main(prog_name='drover')", daemon]
    done = subprocess.run([*args, "--config", tmp_path / "c.toml"], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{file} cannot be used: it holds none of the 41 transactions that were acknowledged" in line
    assert line.endswith(f"touch {tmp_path / file}.accept-loss")
    assert "Traceback" not in done.stderr
