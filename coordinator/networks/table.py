"""The cluster's networks, in the store and in memory."""

import asyncio
import re
from collections.abc import Callable
from typing import Final, Literal

from agent.network.rules import DRAINED_ROLE, MIGRATION_ROLE, bound_rates, check_apart, checked, seen
from agent.runtime.bell import Bell
from agent.runtime.configuration import MAX_NAME, NAME_PATTERN
from agent.runtime.errors import DroverError, Reason, invalid_field
from agent.runtime.events import Bus, NetworkChanged
from coordinator.store import Compare, Delete, KeyValue, Put, Store
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import network_pb2 as pb

PREFIX: Final = "/networks/"
"""A network's key is this and its name; the value is a `drover.coordinator.v1.Network`."""
MOST_NETWORKS: Final = 256

Change = Literal["created", "changed", "removed", "role granted", "role revoked"]

_NAME: Final = re.compile(NAME_PATTERN)


class NetworkTable:
    """The networks by name. What a method has changed is durable when it returns; each raises JOURNAL_UNAVAILABLE."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self.changed = Bell()
        """Rings at every change."""
        self._store = store
        self._bus = bus
        self._networks: dict[str, pb.Network] = {}
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        for item in (await self._store.list(PREFIX)).items:
            self._adopt(item)

    def _adopt(self, item: KeyValue) -> None:
        network = pb.Network.FromString(item.value)
        network.revision = item.mod_revision
        bound_rates(network.rules)
        self._networks[network.name] = network

    # ---- queries

    def all(self) -> list[pb.Network]:
        """Return the networks by name."""
        return [self._networks[name] for name in sorted(self._networks)]

    def get(self, name: str) -> pb.Network:
        """Return the network. Raises NETWORK_NOT_FOUND."""
        if name not in self._networks:
            text = f'the cluster has no network "{name}"; `drover network list` shows those that it has'
            raise DroverError(Reason.NETWORK_NOT_FOUND, text, metadata={"network": name})
        return self._networks[name]

    def defined(self) -> list[agent_pb.Network]:
        """Return the networks as a choice among them sees them, without addresses."""
        return [definition(network) for network in self.all()]

    def seen_by(self, host: agent_pb.Host) -> agent_pb.Host:
        """Return the host with its sides of the cluster's networks in place of its own ones of the same names or ranges."""
        return seen(host, self.defined()) if self._networks else host

    # ---- changes

    async def create(self, given: pb.Network) -> pb.Network:
        """Add a network. Raises INVALID_FIELD, NETWORK_EXISTS, NETWORK_OVERLAPS."""
        name = given.name
        if not _NAME.match(name) or len(name) > MAX_NAME:
            text = f'must be at most {MAX_NAME} of a-z, 0-9, "." and "-", beginning and ending with a letter or digit'
            raise invalid_field("network.name", text)
        async with self._writing:
            if name in self._networks:
                text = f"the cluster has a network {name} already; nothing was changed. Change it with `drover network set {name}`"
                raise DroverError(Reason.NETWORK_EXISTS, text, metadata={"network": name})
            if len(self._networks) >= MOST_NETWORKS:
                raise DroverError(Reason.OVERLOADED, f"the cluster has {MOST_NETWORKS} networks, the most that it may have")
            network = pb.Network(name=name, migration_role=given.migration_role, rules=self._checked(name, given.rules))
            return await self._write(network, 0, "created")

    async def change(self, name: str, change: Callable[[pb.Network], None], what: Change) -> pb.Network:
        """Change a network by `change`, which gets a copy of it, and may raise. Raises NETWORK_NOT_FOUND, INVALID_FIELD,
        NETWORK_OVERLAPS."""
        async with self._writing:
            before, network = self.get(name), pb.Network()
            network.CopyFrom(before)
            change(network)
            network.rules.CopyFrom(self._checked(name, network.rules))
            return await self._write(network, before.revision, what)

    async def remove(self, name: str, check: Callable[[], None]) -> None:
        """Remove a network, unless `check` raises. Raises NETWORK_NOT_FOUND."""
        async with self._writing:
            network = self.get(name)
            check()
            await self._write(network, network.revision, "removed")

    def _checked(self, name: str, rules: agent_pb.NetworkRules) -> agent_pb.NetworkRules:
        if not rules.cidrs:
            raise invalid_field("rules.cidrs", 'expected at least one range, such as "10.92.0.0/24"')
        normal = checked(rules)
        check_apart(name, normal, {other.name: other.rules for other in self.all()})
        return normal

    async def _write(self, network: pb.Network, revision: int, what: Change) -> pb.Network:
        """Store the network, or remove it. Raises BUSY if another coordinator has changed it since that revision of the store."""
        name, key = network.name, PREFIX + network.name
        operation = Delete(key) if what == "removed" else Put(key, network.SerializeToString())
        result = await self._store.txn([Compare(key, revision)], [operation])
        self._networks.pop(name, None)
        self.changed.ring()
        if not isinstance(result, int):
            if now := result.current.get(key):
                self._adopt(now)
            text = f"another coordinator has changed network {name} at this moment; nothing was changed here. Try again"
            raise DroverError(Reason.BUSY, text, retry_after=1.0, metadata={"network": name})
        if what != "removed":
            network.revision = result
            self._networks[name] = network
        self._bus.publish(NetworkChanged(name, change=what, message=", ".join(network.rules.cidrs)))
        return network


def definition(network: pb.Network) -> agent_pb.Network:
    """Return a network without a host's side of it."""
    roles = [DRAINED_ROLE if network.revoking else MIGRATION_ROLE] if network.migration_role else []
    return agent_pb.Network(name=network.name, roles=roles, rules=network.rules, cluster=True)
