"""The coordinator's store; begin with `coordinator.store.base`."""

from coordinator.store.base import (
    MAX_LIST,
    MAX_VALUE_BYTES,
    Changes,
    Compare,
    Conflict,
    Delete,
    Event,
    KeyValue,
    Listing,
    Operation,
    Put,
    Store,
)
from coordinator.store.memory import MemoryStore
from coordinator.store.sqlite import SqliteStore

__all__ = [
    "MAX_LIST",
    "MAX_VALUE_BYTES",
    "Changes",
    "Compare",
    "Conflict",
    "Delete",
    "Event",
    "KeyValue",
    "Listing",
    "MemoryStore",
    "Operation",
    "Put",
    "SqliteStore",
    "Store",
]
