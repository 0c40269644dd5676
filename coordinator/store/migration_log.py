"""Keeps the coordinator's migrations in its store (`agent.migration.migration.MigrationLog`)."""

from typing import Final

from agent.migration.collection import KEEP
from agent.migration.migration import FINAL
from coordinator.store import Compare, Conflict, Delete, KeyValue, Put, Store
from drover.agent.v1 import migration_pb2 as pb

_OPEN: Final = "/migrations/"
ENDED: Final = "/ended-migrations/"
"""No decision depends on a migration under this prefix."""
_LIFE: Final = "/migrations-life"


class StoredMigrations:
    """The log of migrations in the store, one key for each. Of those that have ended it keeps the newest `KEEP`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ended: dict[str, None] = {}
        """Keys of migrations that have ended, the oldest first."""

    async def save(self, migration_id: str, body: bytes, *, ended: bool) -> None:
        before, key = _OPEN + migration_id, ENDED + migration_id
        if not ended:
            self._ended.pop(key, None)
            await self._store.txn([], [Put(before, body), Delete(key)])
            return
        for each in (before, key):
            self._ended.pop(each, None)
        self._ended[key] = None
        surplus = list(self._ended)[: max(0, len(self._ended) - KEEP)]
        for each in surplus:
            del self._ended[each]
        await self._store.txn([], [Put(key, body), Delete(before), *(Delete(each) for each in surplus)])

    async def remove(self, migration_id: str) -> None:
        keys = (_OPEN + migration_id, ENDED + migration_id)
        for key in keys:
            self._ended.pop(key, None)
        await self._store.txn([], [Delete(key) for key in keys])

    async def next_life(self, above: int) -> int:
        while True:
            before = await self._store.get(_LIFE)
            number = max(above, int(before.value) if before is not None else 0) + 1
            compare = Compare(_LIFE, before.mod_revision if before is not None else 0)
            if not isinstance(await self._store.txn([compare], [Put(_LIFE, b"%d" % number)]), Conflict):
                return number

    async def load(self) -> list[bytes]:
        items = sorted([*await self._all(_OPEN), *await self._all(ENDED)], key=lambda item: item.mod_revision)
        self._ended = dict.fromkeys(item.key for item in items if pb.Migration.FromString(item.value).state in FINAL)
        return [item.value for item in items]

    async def _all(self, prefix: str) -> list[KeyValue]:
        items: list[KeyValue] = []
        after = ""
        while True:
            page = await self._store.list(prefix, after=after)
            items += page.items
            if not page.more:
                return items
            after = page.items[-1].key
