"""A store in memory, for tests: its data are lost when it is closed."""

import bisect
import itertools
import time
from collections.abc import Callable
from typing import Self, TypeVar

from coordinator.store.base import KeyValue
from coordinator.store.embedded import EmbeddedStore
from coordinator.store.rows import FIRST_REVISION, Rows

T = TypeVar("T")


class MemoryRows:
    """`Rows` in dictionaries. The order of code points equals that of UTF-8 bytes."""

    def __init__(self) -> None:
        self._revision = FIRST_REVISION
        self._rows: dict[str, KeyValue] = {}
        self._keys: list[str] = []  # sorted
        self._leases: dict[int, int] = {}
        self._lease_ids = itertools.count(1)

    def revision(self) -> int:
        return self._revision

    def set_revision(self, revision: int) -> None:
        self._revision = revision

    def get(self, key: str) -> KeyValue | None:
        return self._rows.get(key)

    def range(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        begin = max(bisect.bisect_left(self._keys, prefix), bisect.bisect_right(self._keys, after) if after else 0)
        found = itertools.takewhile(lambda key: key.startswith(prefix), itertools.islice(self._keys, begin, begin + limit))
        return [self._rows[key] for key in found]

    def put(self, row: KeyValue) -> None:
        if row.key not in self._rows:
            bisect.insort(self._keys, row.key)
        self._rows[row.key] = row

    def delete(self, key: str) -> None:
        del self._rows[key]
        del self._keys[bisect.bisect_left(self._keys, key)]

    def add_lease(self, ttl: int) -> int:
        lease_id = next(self._lease_ids)
        self._leases[lease_id] = ttl
        return lease_id

    def has_lease(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def remove_lease(self, lease_id: int) -> None:
        self._leases.pop(lease_id, None)

    def leases(self) -> dict[int, int]:
        return dict(self._leases)

    def keys_of_lease(self, lease_id: int) -> list[str]:
        return [key for key in self._keys if self._rows[key].lease_id == lease_id]


class MemoryStore(EmbeddedStore):
    """A `Store` for tests."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._rows = MemoryRows()

    @classmethod
    async def open(cls, *, clock: Callable[[], float] = time.monotonic) -> Self:
        """Return an empty store. Close it, or use it with ``async with``."""
        store = cls(clock)
        await store._start()
        return store

    async def _run_write(self, job: Callable[[Rows], T]) -> T:
        return job(self._rows)

    async def _run_read(self, job: Callable[[Rows], T]) -> T:
        return job(self._rows)
