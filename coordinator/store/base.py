"""The interface of the coordinator's store: the few verbs of etcd that Drover needs.

A store holds keys (paths such as ``/hosts/alpha``) and values (bytes, usually a protobuf message), and one revision that
rises by one with every transaction that changes something. Each key has the revision that created it and the one that
changed it last; a transaction compares the latter, so no writer overwrites a change that it has not seen::

    seen = await store.get("/hosts/alpha")
    result = await store.txn([Compare("/hosts/alpha", seen.mod_revision if seen else 0)], [Put("/hosts/alpha", data)])
    if isinstance(result, Conflict):
        ...  # another writer was faster; result.current has the present entries

To follow a part of the store without a gap: `list` it, then `watch` from ``listing.revision + 1``; when the watch raises
`WATCH_TOO_SLOW`, do both again.

Implementations: `MemoryStore` for tests, `SqliteStore` embedded. The interface needs nothing that etcd lacks.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from agent.runtime.errors import DroverError, Reason, invalid_field

MAX_KEY_BYTES: Final = 1024
MAX_VALUE_BYTES: Final = 512 * 1024
MAX_TXN_OPERATIONS: Final = 128
"""Largest number of compares, and of writes, of one transaction; etcd's default."""
MAX_TXN_BYTES: Final = 1024 * 1024
"""Largest size of the keys and values of one transaction; etcd's limit is 1.5 MiB for the whole request."""
MAX_LIST: Final = 1000
"""Largest number of keys in one listing; list again with `after` for more."""
MAX_TTL_SECONDS: Final = 86_400


@dataclass(frozen=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    """The revision that created the key (most recently, if it was deleted before)."""
    mod_revision: int
    """The revision that changed it last."""
    lease_id: int = 0
    """The key is deleted with this lease. 0: it has none."""


@dataclass(frozen=True)
class Compare:
    """A condition of a transaction: this revision was the last to change the key. 0: there is no such key."""

    key: str
    mod_revision: int


@dataclass(frozen=True)
class Put:
    """A write of a key. `lease_id` 0 detaches the key from its former lease."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True)
class Delete:
    """A deletion of a key; no change if there is no such key."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True)
class Conflict:
    """The result of a transaction that was not carried out, because a compare failed."""

    revision: int
    """The store's revision at that moment."""
    current: Mapping[str, KeyValue | None] = field(default_factory=dict)
    """The present entries of the keys whose compare failed."""


@dataclass(frozen=True)
class Listing:
    revision: int
    """The store's revision of this listing; watch from the next one."""
    items: tuple[KeyValue, ...]
    """Sorted by the UTF-8 bytes of the keys."""
    more: bool
    """There are more keys: list again with `after` set to the last key. That listing may be of a newer revision."""


@dataclass(frozen=True)
class Event:
    """A change of one key: written, or (`now` is None) deleted, by a transaction or with its lease."""

    key: str
    now: KeyValue | None


@dataclass(frozen=True)
class Changes:
    """All changes that one transaction made under the prefix of a watch."""

    revision: int
    events: tuple[Event, ...]


class Store(Protocol):
    """The verbs of a store. Every method but `watch` returns within the store's own deadline. All raise `JOURNAL_UNAVAILABLE` if the
    store does not answer; its metadata say whether a write took place (see `agent.runtime.sqlite`).
    """

    async def get(self, key: str) -> KeyValue | None:
        """Return the entry of the key, or None if there is no such key."""

    async def list(self, prefix: str, limit: int = MAX_LIST, *, after: str = "") -> Listing:
        """Return at most `limit` (1 to `MAX_LIST`) keys that begin with `prefix` and come after `after`."""

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> int | Conflict:
        """Carry out all operations if all compares hold, else none. Return the store's revision after it.

        A transaction that changes nothing (no operation, or only deletions of missing keys) does not raise the revision.
        Cancelling the await does not split the transaction: it takes place wholly or not at all.

        Raises INVALID_FIELD (empty key, one key written twice), FIELD_TOO_LARGE, LEASE_EXPIRED (a put names a lease that has ended).
        """

    async def grant(self, ttl: int) -> int:
        """Create a lease that ends `ttl` seconds (1 to `MAX_TTL_SECONDS`) after its last keepalive. Return its id, which is never
        used twice.

        A restart of the store renews every lease (as a new leader of etcd does).
        """

    async def keepalive(self, lease_id: int) -> int:
        """Renew the lease: it ends `ttl` seconds from now. Return the ttl. Raises LEASE_EXPIRED."""

    async def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys, in one transaction. Does nothing if the lease has ended already."""

    def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Changes]:
        """Yield every change under `prefix` from `from_revision` on (0: from now on), in order, until `close`.

        The iterator need not be closed; cancelling the await of an item loses nothing. A watch has no queue of its own: the store
        keeps the changes of the last revisions once for all watches. The iterator raises WATCH_TOO_SLOW if the store no longer
        keeps the next changes (the reader fell behind, or `from_revision` is too old).
        """

    async def close(self) -> None:
        """End all watches and release all resources. Can be called again."""


def check_key(key: str, *, name: str = "key", empty: bool = False) -> None:
    """Raise INVALID_FIELD or FIELD_TOO_LARGE for a text that cannot be a key."""
    if not key and not empty:
        raise invalid_field(name, "a key must not be empty")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise invalid_field(name, "a key must be text that UTF-8 can encode") from None
    if size > MAX_KEY_BYTES:
        raise invalid_field(name, f"{size} bytes, at most {MAX_KEY_BYTES} are allowed", Reason.FIELD_TOO_LARGE)


def check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_LIST:
        raise invalid_field("limit", f"{limit} is not between 1 and {MAX_LIST}")


def check_ttl(ttl: int) -> None:
    if not 1 <= ttl <= MAX_TTL_SECONDS:
        raise invalid_field("ttl", f"{ttl} s is not between 1 and {MAX_TTL_SECONDS} s")


def check_txn(compares: Sequence[Compare], operations: Sequence[Operation]) -> None:
    """Raise INVALID_FIELD or FIELD_TOO_LARGE for a transaction that is over a bound, or that writes one key twice (in no defined
    order).
    """
    count = max(len(compares), len(operations))
    if count > MAX_TXN_OPERATIONS:
        raise invalid_field("operations", f"{count}, at most {MAX_TXN_OPERATIONS} are allowed", Reason.FIELD_TOO_LARGE)
    for each in (*compares, *operations):
        check_key(each.key)
    keys = [operation.key for operation in operations]
    if len(set(keys)) != len(keys):
        raise invalid_field("operations", "a key is written twice in one transaction")
    puts = [operation for operation in operations if isinstance(operation, Put)]
    for put in puts:
        _check_size(f"value of {put.key}", len(put.value), MAX_VALUE_BYTES)
    _check_size("operations", sum(len(put.key.encode()) + len(put.value) for put in puts), MAX_TXN_BYTES)


def _check_size(name: str, size: int, bound: int) -> None:
    if size > bound:
        raise invalid_field(name, f"{size} bytes, at most {bound} are allowed", Reason.FIELD_TOO_LARGE)


def lease_expired(lease_id: int) -> DroverError:
    return DroverError(
        Reason.LEASE_EXPIRED,
        f"lease {lease_id} has ended (expired or revoked), and its keys are deleted; grant a new one",
        metadata={"lease_id": str(lease_id)},
    )
