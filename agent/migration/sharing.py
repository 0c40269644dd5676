"""Shares out the bandwidth among the migrations of this process while they transfer, and holds their guaranteed minima.

A transfer's share is `allotted_bytes_per_second` of its migration, which its tuner applies. Shares are divided anew whenever a
transfer starts or ends, or a migration's settings, a host or a network change. Shares are lowered before others are raised, so that
the sum does not exceed a cap meanwhile: a share is raised, and a transfer started, once the sources of all others on its links have
applied their lower shares. A source that does not within `PATIENCE` holds up nobody any longer: the others share what its transfer
leaves."""

import asyncio
import functools
import time
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Final, NamedTuple

import structlog

from agent.handshake.drive.ends import Directory
from agent.handshake.drive.plan import Limits
from agent.handshake.machines.source import SourceState
from agent.hypervisor.features import check_bandwidth
from agent.migration.collection import Collection
from agent.migration.flows import HostOf, flow_of, insufficient
from agent.migration.migration import Entry
from agent.migration.settings import limits_of
from agent.runtime.backoff import SYSTEM_CLOCK, Clock
from agent.runtime.bell import Bell, first_of
from agent.runtime.seldom import Seldom
from agent.transfer.shares import NO_LIMIT, Flow, Shortage, divide, shortage
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

PATIENCE: Final = 1.0
"""Seconds for which others wait until a transfer's lower share is applied."""
LEAST_PAUSE: Final = 0.02
"""Seconds between two divisions of the background work: what changes meanwhile shares one."""
MOST_TIME: Final = 0.1
"""Part of the process's time that this work may take."""

log = structlog.get_logger()

_BEFORE: Final = frozenset({None, SourceState.BEGINNING, SourceState.BEGUN})


class _Known(NamedTuple):
    """A transfer as it was found from a migration and its hosts, of which each change makes a new message."""

    inputs: tuple[pb.Migration, host_pb2.Host | None, host_pb2.Host | None]
    flow: Flow
    links: dict[str, int]


class Sharing:
    """Divides the bandwidth among the transfers of a collection."""

    def __init__(self, collection: Collection, directory: Directory, clock: Clock = SYSTEM_CLOCK) -> None:
        self._collection = collection
        self._directory = directory
        self._clock = clock
        self._admitted: set[str] = set()
        """Migrations whose minimum is held."""
        self._starting: set[str] = set()
        """Those that are about to transfer."""
        self._held: dict[str, float] = {}
        """The highest rate at which each transfer may run now, by id: until a lower share is applied, the one before."""
        self._lowered: dict[str, float] = {}
        """Since when each lower share waits to be applied, by the monotonic clock."""
        self._at_once: set[str] = set()
        """Those about to transfer that wait for no other any longer."""
        self._divided = Bell()
        """Rings after each division."""
        self._due: asyncio.Handle | None = None
        """The division that those share which start in a burst."""
        self._rest_until = float("-inf")
        """When that may be."""
        self._known_flows: dict[str, _Known] = {}
        """Of the last division, as `_hosts`."""
        self._hosts: dict[str, host_pb2.Host] = {}
        self._warned = Seldom()

    # ---- minima

    def admit(self, entry: Entry) -> None:
        """Hold the minimum of a migration until it has sent everything, or is dismissed. Raises BANDWIDTH_INSUFFICIENT."""
        self.check(entry.migration)
        self._admitted.add(entry.migration.migration_id)

    def dismiss(self, entry: Entry) -> None:
        """Give back the minimum of a migration that does not take its slots now."""
        self._admitted.discard(entry.migration.migration_id)

    def check(self, migration: pb.Migration, *, alone: bool = False, before: int | None = None) -> None:
        """Raise BANDWIDTH_INSUFFICIENT if the minimum of a migration, or of its new settings, does not fit beside those held, or
        `alone`, or is above its network's maximum; BANDWIDTH_UNSUPPORTED if its source cannot keep to the limits of its network.
        `before`: its minimum so far, which is no reason to refuse a change that does not raise it."""
        if before is not None and migration.settings.min_bandwidth_bytes_per_second <= before:
            return
        known = self._known_hosts()
        flow, capacities = flow_of(migration, known)
        if (source := known(migration.source_host)) is not None:
            for limit in (flow.most, *(capacities[cap] for cap in flow.caps)):
                check_bandwidth(limit, source.migration_features, f"the source {source.name}")
        if 0 < flow.most < flow.least:
            raise insufficient(migration, Shortage(f"network {migration.network} for each migration", flow.most, 0, flow.least))
        held = [] if alone else [entry.migration for entry in self._collection.all() if self._holds(entry)]
        others = [*held, *([] if alone else self._directory.foreign())]
        known_flows = [self._flow(other, known) for other in others if other.migration_id != migration.migration_id]
        flows = [each.flow for each in known_flows if each is not None]
        if found := shortage(flow, flows, capacities):
            raise insufficient(migration, found)

    def _holds(self, entry: Entry) -> bool:
        if entry.final or entry.gave_up:
            self._admitted.discard(entry.migration.migration_id)
            return False
        before = entry.driver is None or entry.driver.view.source_state in _BEFORE
        return _sends(entry) or (before and entry.migration.migration_id in self._admitted)

    # ---- shares

    async def run(self) -> None:
        """Divide at every change, for ever."""
        while True:
            changed = (self._collection.changed.next, self._directory.changed.next)
            began = time.monotonic()
            self.divide()
            taken = time.monotonic() - began
            await first_of(*changed, timeout=PATIENCE if self._lowered else None)
            await self._clock.sleep(max(LEAST_PAUSE, taken / MOST_TIME))

    async def start(self, entry: Entry) -> Limits:
        """Return the limits with which a transfer starts, after others have made room for it."""
        migration_id = entry.migration.migration_id
        self._starting.add(migration_id)
        until = self._clock.monotonic() + PATIENCE
        await self._next_division()
        while migration_id not in self._held and (left := until - self._clock.monotonic()) > 0:
            await first_of(self._divided.next, timeout=left)
        if migration_id not in self._held:
            self._at_once.add(migration_id)
            await self._next_division()
        return limits_of(entry.migration)

    async def _next_division(self) -> None:
        """Divide: now, or in a burst of starts after a pause, once for all who ask meanwhile."""
        pause = self._rest_until - self._clock.monotonic()
        if self._due is None and pause <= 0:
            self._divide_and_rest()
            return
        self._due = self._due or asyncio.get_running_loop().call_later(pause, self._divide_and_rest)
        await first_of(self._divided.next, timeout=PATIENCE)

    def _divide_and_rest(self) -> None:
        self._due, began = None, self._clock.monotonic()
        try:
            self.divide()
        finally:
            now = self._clock.monotonic()
            self._rest_until = now + (now - began) / MOST_TIME

    def divide(self) -> None:
        """Publish the shares that the transfers may have now."""
        taking_part = {entry.migration.migration_id: entry for entry in self._collection.all() if self._takes_part(entry)}
        flows, capacities = self._flows(taking_part)
        entries = {i: entry for i, entry in taking_part.items() if i in flows}
        self._note(entries)
        now = self._clock.monotonic()
        late = {i for i, since in self._lowered.items() if now - since >= PATIENCE}
        pinned = {i: replace(flows[i], least=int(self._held[i]), most=int(self._held[i])) for i in late if self._held[i] < inf}
        wanted = divide(flows, capacities)
        if pinned:
            wanted = divide(flows | pinned, capacities) | {i: wanted[i] for i in pinned}
        wanted = {i: wanted[i] for i in entries}
        for migration_id, share in wanted.items():
            if _rate(share) < self._held.get(migration_id, 0.0):
                self._lowered.setdefault(migration_id, now)
                self._publish(entries[migration_id], share)
            else:
                self._lowered.pop(migration_id, None)
        waited_for = {link for i in self._lowered.keys() - late for link in flows[i].links}
        for migration_id, share in wanted.items():
            may_rise = migration_id in self._at_once or waited_for.isdisjoint(flows[migration_id].links)
            if migration_id not in self._lowered and may_rise:
                self._held[migration_id] = _rate(share)
                self._publish(entries[migration_id], share)
        self._at_once.clear()
        self._divided.ring()

    def _flows(self, entries: Mapping[str, Entry]) -> tuple[dict[str, Flow], dict[str, int]]:
        """Return every transfer, and the capacities of their links. Those of other drivers keep their limits."""
        flows: dict[str, Flow] = {}
        capacities: dict[str, int] = {}
        known = self._known_hosts()
        foreign = [migration for migration in self._directory.foreign() if migration.migration_id not in entries]
        for migration in [*(entry.migration for entry in entries.values()), *foreign]:
            if found := self._flow(migration, known):
                flows[migration.migration_id] = found.flow
                for link, capacity in found.links.items():
                    capacities[link] = min(filter(None, (capacity, capacities.get(link, 0))), default=0)
        self._known_flows = {i: self._known_flows[i] for i in flows}
        passed = {host.name for each in self._known_flows.values() for host in each.inputs[1:] if host is not None}
        self._hosts = {name: host for name, host in self._hosts.items() if name in passed}
        for migration in foreign:
            limit = migration.applied_bandwidth_bytes_per_second
            if limit and migration.migration_id in flows:
                flows[migration.migration_id] = replace(flows[migration.migration_id], least=limit, most=limit)
        return flows, capacities

    def _known_hosts(self) -> HostOf:
        """Return the hosts as they are now. One that has not changed stays the same object, for `_flow`."""

        @functools.cache
        def known(name: str) -> host_pb2.Host | None:
            host, before = self._directory.known(name), self._hosts.get(name)
            if host is None or before is None or host != before:
                before = host
            if before is not None:
                self._hosts[name] = before
            return before

        return known

    def _flow(self, migration: pb.Migration, known: HostOf) -> "_Known | None":
        """Return a migration's transfer, as it was found before if nothing has changed; None where there is none to be found: that
        must not keep the others from their shares."""
        inputs = migration, known(migration.source_host), known(migration.destination_host)
        found = self._known_flows.get(migration.migration_id)
        if found is None or any(was is not now for was, now in zip(found.inputs, inputs, strict=True)):
            try:
                found = self._known_flows[migration.migration_id] = _Known(inputs, *flow_of(migration, known))
            except Exception:
                if self._warned.due(now := self._clock.monotonic()):
                    self._warned.told(now)
                    log.exception("unexpected error (bug): a migration gets no share", migration=migration.migration_id)
                return None
        return found

    def _takes_part(self, entry: Entry) -> bool:
        """Whether it transfers, or is about to."""
        migration_id = entry.migration.migration_id
        if migration_id in self._starting and (entry.final or entry.driver is None or entry.driver.view.source_state not in _BEFORE):
            self._starting.discard(migration_id)
        return migration_id in self._starting or _sends(entry)

    def _note(self, entries: Mapping[str, Entry]) -> None:
        """Note which lower shares are applied now, and forget what has ended."""
        for migration_id in self._held.keys() - entries.keys():
            del self._held[migration_id]
            self._lowered.pop(migration_id, None)
        for migration_id, entry in entries.items():
            share = _rate(entry.migration.allotted_bytes_per_second)
            if migration_id not in self._held and migration_id not in self._starting:
                self._held[migration_id] = _rate(entry.migration.applied_bandwidth_bytes_per_second)  # another life has started it
            elif migration_id in self._lowered and _is_applied(entry):
                self._held[migration_id] = share
                del self._lowered[migration_id]

    def _publish(self, entry: Entry, share: int) -> None:
        if entry.migration.allotted_bytes_per_second != share:
            self._collection.publish(entry, entry.changed_to(allotted_bytes_per_second=share))


def _rate(share: int) -> float:
    return inf if share == NO_LIMIT else share


def _sends(entry: Entry) -> bool:
    return entry.tuner is not None and entry.tuner.flows


def _is_applied(entry: Entry) -> bool:
    """Whether its source has applied its share, or will start with it."""
    driver, tuner = entry.driver, entry.tuner
    if driver is None or tuner is None:
        return False
    return tuner.due is None if tuner.flows else not driver.calls.transfer_asked
