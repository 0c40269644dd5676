"""Keeps the coordinator's migrations in its store (`agent.migrations.MigrationLog`)."""

from typing import Final

from agent.migrations import FINAL, KEEP
from coordinator.store import Delete, KeyValue, Operation, Put, Store
from drover.agent.v1 import migration_pb2 as pb

_PREFIX: Final = "/migrations/"


class StoredMigrations:
    """One key for each migration; of those that have ended the newest `KEEP` stay."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ended: list[str] = []
        """Keys of migrations that have ended, the oldest first."""

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None:
        operations: list[Operation] = [Put(_PREFIX + migration_id, body)]
        if ended:
            self._ended.append(_PREFIX + migration_id)
            surplus = self._ended[: max(0, len(self._ended) - KEEP)]
            operations += [Delete(key) for key in surplus]
            del self._ended[: len(surplus)]
        await self._store.txn([], operations)

    async def load(self) -> list[bytes]:
        items = sorted(await self._all(), key=lambda item: item.mod_revision)
        self._ended = [item.key for item in items if pb.Migration.FromString(item.value).state in FINAL]
        return [item.value for item in items]

    async def _all(self) -> list[KeyValue]:
        items: list[KeyValue] = []
        after = ""
        while True:
            page = await self._store.list(_PREFIX, after=after)
            items += page.items
            if not page.more:
                return items
            after = page.items[-1].key
