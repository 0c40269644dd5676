"""Transactions, leases and listings as plain functions on the rows of a store.

No clock, no asyncio, no SQL: `MemoryStore` and `SqliteStore` run the same functions, so they behave alike. Each function decides
everything before it writes its first row and does not raise after that, so that rows without a rollback stay consistent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coordinator.store.base import Changes, Compare, Conflict, Event, KeyValue, Listing, Operation, Put

FIRST_REVISION = 1
"""The revision of an empty store, as in etcd; so 0 can mean "no such key"."""


class Rows(Protocol):
    """The tables of a store, inside of one transaction."""

    def revision(self) -> int: ...
    def set_revision(self, revision: int) -> None: ...
    def get(self, key: str) -> KeyValue | None: ...
    def range(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        """Return rows in the order of the keys' UTF-8 bytes."""

    def put(self, row: KeyValue) -> None: ...
    def delete(self, key: str) -> None: ...
    def add_lease(self, ttl: int) -> int:
        """Return an id that was never used before."""

    def has_lease(self, lease_id: int) -> bool: ...
    def remove_lease(self, lease_id: int) -> None: ...
    def leases(self) -> dict[int, int]:
        """Return the ids and their ttl in seconds."""

    def keys_of_lease(self, lease_id: int) -> list[str]:
        """Return the keys, sorted as by `range`."""


@dataclass(frozen=True)
class LeaseGone:
    """The result of a transaction that names a lease which does not exist; nothing was changed."""

    lease_id: int


@dataclass(frozen=True)
class Committed:
    revision: int
    changes: Changes | None
    """None if nothing changed."""


def transact(rows: Rows, compares: Sequence[Compare], operations: Sequence[Operation]) -> Committed | Conflict | LeaseGone:
    """Carry out `Store.txn` for a transaction that has passed `check_txn`."""
    current = {compare.key: rows.get(compare.key) for compare in compares}
    failed = {c.key: current[c.key] for c in compares if c.mod_revision != _mod_revision(current[c.key])}
    if failed:
        return Conflict(rows.revision(), failed)
    for operation in operations:
        if isinstance(operation, Put) and operation.lease_id and not rows.has_lease(operation.lease_id):
            return LeaseGone(operation.lease_id)
    return _write(rows, operations)


def end_lease(rows: Rows, lease_id: int) -> Changes | None:
    """Remove the lease and its keys; does nothing if there is no such lease. (0 is no lease: it marks the keys that have none.)"""
    if not rows.has_lease(lease_id):
        return None
    events = tuple(Event(key, None) for key in rows.keys_of_lease(lease_id))
    for event in events:
        rows.delete(event.key)
    rows.remove_lease(lease_id)
    return _raise_revision(rows, events)


def end_leases(rows: Rows, lease_ids: Iterable[int]) -> list[Changes]:
    """End each lease in a revision of its own."""
    return [changes for lease_id in lease_ids if (changes := end_lease(rows, lease_id)) is not None]


def listing(rows: Rows, prefix: str, after: str, limit: int) -> Listing:
    items = rows.range(prefix, after, limit + 1)
    return Listing(rows.revision(), tuple(items[:limit]), len(items) > limit)


def _mod_revision(row: KeyValue | None) -> int:
    return row.mod_revision if row is not None else 0


def _write(rows: Rows, operations: Sequence[Operation]) -> Committed:
    revision = rows.revision() + 1
    written = (_apply(rows, operation, revision) for operation in operations)
    changes = _raise_revision(rows, tuple(event for event in written if event is not None))
    return Committed(rows.revision(), changes)


def _apply(rows: Rows, operation: Operation, revision: int) -> Event | None:
    before = rows.get(operation.key)
    if isinstance(operation, Put):
        created = before.create_revision if before is not None else revision
        row = KeyValue(operation.key, operation.value, created, revision, operation.lease_id)
        rows.put(row)
        return Event(operation.key, row)
    if before is None:
        return None
    rows.delete(operation.key)
    return Event(operation.key, None)


def _raise_revision(rows: Rows, events: tuple[Event, ...]) -> Changes | None:
    if not events:
        return None
    revision = rows.revision() + 1
    rows.set_revision(revision)
    return Changes(revision, events)
