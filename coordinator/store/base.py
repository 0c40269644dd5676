"""The coordinator's store: the few verbs of etcd that Drover needs, whoever provides them.

A store holds keys (paths such as ``/hosts/alpha``) and values (bytes, usually a protobuf message), and one revision that
rises by one with every transaction that changes something. Each key remembers the revision that made it and the one that
changed it last; a transaction compares the latter, so nothing is overwritten that the writer has not seen::

    seen = await store.get("/hosts/alpha")
    result = await store.txn([Compare("/hosts/alpha", seen.mod_revision if seen else 0)], [Put("/hosts/alpha", data)])
    if isinstance(result, Conflict):
        ...  # somebody was faster; result.current says what is there now

To follow a part of the store without a gap: `list` it, then `watch` from ``listing.revision + 1``; when the watch raises
`WATCH_TOO_SLOW`, do both again.

Implementations: `MemoryStore` for tests, `SqliteStore` embedded. Nothing here is more than etcd does.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from agent.runtime.errors import DroverError, Reason, invalid_field

MAX_KEY_BYTES: Final = 1024
MAX_VALUE_BYTES: Final = 512 * 1024
MAX_TXN_OPERATIONS: Final = 128
"""Compares and writes of one transaction, as many as etcd takes by default."""
MAX_TXN_BYTES: Final = 1024 * 1024
"""Keys and values of one transaction together; etcd takes 1.5 MiB with everything around them."""
MAX_LIST: Final = 1000
"""Keys of one answer; ask again with `after` for more."""
MAX_TTL_SECONDS: Final = 86_400


@dataclass(frozen=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    """The revision that made the key (again, after it was deleted)."""
    mod_revision: int
    """The revision that changed it last."""
    lease_id: int = 0
    """The key vanishes with this lease; 0: it stays."""


@dataclass(frozen=True)
class Compare:
    """The transaction takes place only if the key was changed last by this revision; 0: if there is no such key."""

    key: str
    mod_revision: int


@dataclass(frozen=True)
class Put:
    """Write the key. `lease_id` 0 detaches it from the lease that it had."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True)
class Delete:
    """Remove the key; no change if there is none."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True)
class Conflict:
    """The transaction did not take place, because a compare did not hold."""

    revision: int
    """The store's revision at which that was so."""
    current: Mapping[str, KeyValue | None] = field(default_factory=dict)
    """The keys whose compare did not hold, as they are."""


@dataclass(frozen=True)
class Listing:
    revision: int
    """The store's revision at which this was so; watch from the next one."""
    items: tuple[KeyValue, ...]
    """By key, in the order of their UTF-8 bytes."""
    more: bool
    """There are more: ask again with `after` the last key. They are then of a newer revision, perhaps."""


@dataclass(frozen=True)
class Event:
    """A key was written, or deleted (`now` is None) by hand or with its lease."""

    key: str
    now: KeyValue | None


@dataclass(frozen=True)
class Changes:
    """What one transaction changed under the prefix of a watch, all of it at once."""

    revision: int
    events: tuple[Event, ...]


class Store(Protocol):
    """Every method raises `JOURNAL_UNAVAILABLE` where the store does not answer (`agent.runtime.sqlite` says what its metadata
    tell about a write), and ends within the store's own deadline, but for `watch`."""

    async def get(self, key: str) -> KeyValue | None:
        """The key, if there is one."""

    async def list(self, prefix: str, limit: int = MAX_LIST, *, after: str = "") -> Listing:
        """At most `limit` (1 to `MAX_LIST`) keys that begin with `prefix` and come after `after`."""

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> int | Conflict:
        """Carry out all operations if all compares hold, else none. The store's revision after it.

        A transaction that changes nothing (no operation, or deletes of what is not there) leaves the revision alone.
        Cancelling the await leaves the transaction whole: it takes place or does not.
        Errors: INVALID_FIELD (no key, one key twice), FIELD_TOO_LARGE, LEASE_EXPIRED (a put names a lease that is gone).
        """

    async def grant(self, ttl: int) -> int:
        """A new lease that lives `ttl` seconds (1 to `MAX_TTL_SECONDS`) after its last keepalive. Its id, never used twice.

        A restart of the store begins the time of every lease anew (as a new leader of etcd does).
        """

    async def keepalive(self, lease_id: int) -> int:
        """The lease lives `ttl` seconds from now; the ttl. Errors: LEASE_EXPIRED."""

    async def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys, in one transaction. Nothing happens if it is gone already."""

    def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Changes]:
        """Every change under `prefix` from that revision on (0: from now on), in order, without end until `close`.

        Needs no closing; cancelling the await of an item loses nothing. A watch costs no memory of its own: the store keeps
        the changes of the last revisions once for all. Errors, when the iterator is asked: WATCH_TOO_SLOW when the
        changes that come next are no longer kept (the reader fell behind, or `from_revision` is too old).
        """

    async def close(self) -> None:
        """End all watches, and release what the store holds. Can be called again."""


def check_key(key: str, *, name: str = "key", empty: bool = False) -> None:
    """Refuse what a store cannot hold as a key."""
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
    """Refuse a transaction that is over a bound, or that writes one key twice (which would win?)."""
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
        f"lease {lease_id} is gone (expired or revoked), and the keys with it; grant a new one",
        metadata={"lease_id": str(lease_id)},
    )
