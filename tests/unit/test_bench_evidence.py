"""The evidence of a bad round that `scripts/bench chaos` and `failpoints` keep."""

from pathlib import Path

from agent.handshake.host.journal import Journal
from tests.bench.chaos_arena import whole_journal


async def test_the_mark_of_a_journal_is_evidence_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    await journal.open()
    try:
        assert {"journal.sqlite", "journal.sqlite-wal", "journal.sqlite.mark"} <= {kept.name for kept in whole_journal(path)}
    finally:
        await journal.close()
