"""The migrations of one process: their order, the revisions of their changes, and watches of one or of all."""

import math
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

from agent.migration.migration import FINAL, Entry, event_of
from agent.network.rules import without_tenants
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

KEEP: Final = 1000
"""Most ended migrations, and most removals for watches, that are kept."""

_LIFE_BITS: Final = 32
"""Bits of the counter in a revision. The bits above hold the number of the process's life, from the log: no two lives give the same
revision, even if the earlier one ended before it had saved its last one."""


@dataclass(frozen=True)
class Change:
    """One message of a watch of all migrations. Without `migration` and `removed`: all changes up to `revision` were sent."""

    revision: int
    migration: pb.Migration | None = None
    removed: str = ""


class Collection:
    """The migrations of one process, the last changed last. Neither their order nor their revisions depend on a clock."""

    def __init__(self, name: str, bus: Bus) -> None:
        self.revision = 0
        """Revision of the last change."""
        self.changed = Bell()
        """Rings at every change."""
        self._name = name
        self._bus = bus
        self.planned: dict[str, pb.Migration] = {}
        """Migrations that are being saved: they are not published yet, but have their networks."""
        self._entries: dict[str, Entry] = {}
        self._removed: deque[tuple[int, str]] = deque()
        self._known_since = 0
        """Removals after this revision are in `_removed`."""

    # ---- changes

    def open(self, life: int, entries: Iterable[Entry]) -> None:
        """Begin with the migrations of earlier lives. `life`: greater than the number of any of those."""
        self.revision = self._known_since = life << _LIFE_BITS
        for entry in sorted(entries, key=lambda entry: entry.migration.revision):
            self._entries[entry.migration.migration_id] = entry

    def number(self, migration: pb.Migration) -> None:
        """Give a new migration its place in lists, before it is saved."""
        self.revision += 1
        migration.create_revision = migration.revision = self.revision

    def publish(self, entry: Entry, migration: pb.Migration) -> None:
        """Make `migration` the state of the entry, which is added if it is new, and notify watches and the bus."""
        known = self._entries.get(migration.migration_id)
        if known is None:
            self._trim()
        if known is None or event_of(known.migration) != event_of(migration):
            self._bus.publish(event_of(migration))
        if not migration.create_revision and not migration.revision:
            self.number(migration)
        self.revision += 1
        migration.revision = self.revision
        entry.migration = migration
        self._entries.pop(migration.migration_id, None)
        self._entries[migration.migration_id] = entry
        self.planned.pop(migration.migration_id, None)
        entry.changed.ring()
        self.changed.ring()

    def remove(self, migration_id: str) -> None:
        """Remove a migration, and notify the watches of all migrations."""
        del self._entries[migration_id]
        self.revision += 1
        self._removed.append((self.revision, migration_id))
        if len(self._removed) > KEEP:
            self._known_since = self._removed.popleft()[0]
        self.changed.ring()

    def _trim(self) -> None:
        ended = [key for key, entry in self._entries.items() if entry.final]
        for key in ended[: max(0, len(ended) - KEEP + 1)]:
            self.remove(key)

    def all(self) -> list[Entry]:
        return list(self._entries.values())

    def others(self, migration_id: str) -> "list[pb.Migration]":
        """Return the migrations that have not ended, without the one with that id."""
        going = (*self.planned.values(), *(entry.migration for entry in self._entries.values() if not entry.final))
        return [migration for migration in going if migration.migration_id != migration_id]

    def using(self, network: str) -> "list[pb.Migration]":
        """Return the migrations that use a network and have not ended. One that waits for its slot does not: it chooses again."""
        starting = [m for m in self.planned.values() if not m.HasField("slot_wait")]
        begun = [entry.migration for entry in self._entries.values() if not (entry.final or entry.unbegun)]
        return [m for m in [*starting, *begun] if m.network == network]

    def plan_again(self) -> None:
        """Let each migration that waits for its slot make a new plan before it takes it."""
        for entry in self._entries.values():
            if entry.unbegun:
                entry.planned_at = -math.inf

    def set_rules(self, network: str, rules: host_pb2.NetworkRules) -> None:
        """Note the present rules of a network of the cluster in the migrations that use it."""
        for entry in self.all():
            if not entry.final and entry.migration.network == network and entry.migration.network_choice.HasField("rules"):
                changed = entry.changed_to()
                changed.network_choice.rules.CopyFrom(without_tenants(rules))
                self.publish(entry, changed)

    def find(self, migration_id: str) -> Entry | None:
        return self._entries.get(migration_id)

    def get(self, migration_id: str) -> Entry:
        """Return the entry. Raises MIGRATION_NOT_FOUND."""
        entry = self._entries.get(migration_id)
        if entry is None:
            text = f"{self._name} knows no migration {migration_id}; `drover migration list` shows those that it knows"
            raise DroverError(Reason.MIGRATION_NOT_FOUND, text)
        return entry

    # ---- watches

    async def watch(self, migration_id: str, from_revision: int) -> AsyncIterator[pb.Migration]:
        """Yield the migration now, then its newest state after each change, until it has ended."""
        entry = self.get(migration_id)
        first = True
        while True:
            changed, migration = entry.changed.next, entry.migration
            if first or migration.revision > from_revision or migration.state in FINAL:
                yield migration
            if migration.state in FINAL:
                return
            first = False
            await changed.wait()

    async def watch_all(self, from_revision: int) -> AsyncIterator[Change]:
        """Yield the state of each migration that changed after that revision (0: of all), an empty `Change`, then each change.

        A watch stores no states: a slow reader gets the newest one. Raises WATCH_TOO_SLOW if the removals after the reader's
        revision are not known, or this process never gave that revision."""
        seen, first = from_revision, True
        while True:
            if seen and not self._known_since <= seen <= self.revision:
                raise self._too_slow(seen)
            changed, now = self.changed.next, self.revision
            for revision, migration_id, removed in self._changed_after(seen):
                entry = self._entries.get(migration_id)
                if removed:
                    yield Change(revision, removed=migration_id)
                elif entry is not None:
                    yield Change(revision, entry.migration)
            if first:
                yield Change(now)
            seen, first = now, False
            await changed.wait()

    def _changed_after(self, revision: int) -> list[tuple[int, str, bool]]:
        """Return revision, id and whether it was removed, for each change after `revision` that no later one has replaced."""
        changes = []
        for migration_id, entry in reversed(self._entries.items()):
            if revision and entry.migration.revision <= revision:
                break
            changes.append((entry.migration.revision, migration_id, False))
        for removed_at, migration_id in reversed(self._removed):
            if not revision or removed_at <= revision:
                break
            changes.append((removed_at, migration_id, True))
        return sorted(changes)

    def _too_slow(self, revision: int) -> DroverError:
        return DroverError(
            Reason.WATCH_TOO_SLOW,
            f"{self._name} does not know what was removed after revision {revision}: the reader is too slow, or {self._name} was "
            "restarted. List again, and watch from the revision of that list",
            metadata={"revision": str(revision), "oldest_revision": str(self._known_since), "last_revision": str(self.revision)},
        )

    def list(self, *, active_only: bool) -> "list[pb.Migration]":
        """Return the migrations, the newest first."""
        return sorted((e.migration for e in self._entries.values() if not (active_only and e.final)), key=newest_first)


def life_of(revision: int) -> int:
    """Return the number of the life that gave a revision. Those of older versions (milliseconds) count as of an early life."""
    return revision >> _LIFE_BITS


def newest_first(migration: pb.Migration) -> tuple[int, int, str]:
    """Return the sort key of lists. Migrations of an older version are ordered by the time of their request."""
    made = 0 if migration.create_revision else migration.create_time.ToNanoseconds()
    return -migration.create_revision, -made, migration.migration_id
