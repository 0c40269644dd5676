"""coordinator.networks: the cluster's networks as objects; each bad input has its error and changes nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from agent.migration.collection import Collection
from agent.migration.migration import Entry
from agent.runtime.bell import Bell
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from agent.runtime.supervision import supervise
from coordinator.networks.network_service import NetworkServicer, finish_revoking
from coordinator.networks.table import NetworkTable
from coordinator.store import MemoryStore
from drover.agent.v1 import host_pb2 as agent_pb
from drover.agent.v1 import migration_pb2
from drover.coordinator.v1 import host_pb2, network_pb2
from tests.unit.fake_directory import FakeLog

ACTIVE = migration_pb2.MIGRATION_STATE_ACTIVE
SUCCEEDED = migration_pb2.MIGRATION_STATE_SUCCEEDED
NO_CONTEXT: Any = None


class FakeRegistry:
    """The part of `HostRegistry` that the service uses."""

    def __init__(self) -> None:
        self.changed = Bell()
        self.hosts = [
            host_pb2.ClusterHost(
                host=agent_pb.Host(
                    name=f"h{number}",
                    interfaces=[agent_pb.Interface(name="eth1", addresses=[f"10.92.0.{number}/24"], up=number == 1, mtu=1500)],
                )
            )
            for number in (1, 2)
        ]

    async def list_hosts(self) -> list[host_pb2.ClusterHost]:
        return self.hosts


class Cluster:
    """The service on a store in memory, and migrations that a test makes."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.table = NetworkTable(store, Bus())
        self.collection = Collection("co", Bus())
        self.registry = FakeRegistry()
        registry: Any = self.registry
        self.service = NetworkServicer(self.table, registry, self.collection)

    def migrate(self, migration_id: str, network: str, **fields: Any) -> Entry:
        choice = migration_pb2.NetworkChoice(network=network, source_address="10.92.0.1", destination_address="10.92.0.2")
        state = fields.pop("state", ACTIVE)
        message = migration_pb2.Migration(
            migration_id=migration_id, network=network, network_choice=choice, state=state, source_host="h1", destination_host="h2"
        )
        for name, value in fields.items():
            setattr(message, name, value)
        entry = Entry(message, FakeLog())
        self.collection.publish(entry, message)
        return entry

    def end(self, entry: Entry) -> None:
        self.collection.publish(entry, entry.changed_to(state=SUCCEEDED))

    async def add(self, name: str, *cidrs: str, role: bool = True, **rules: Any) -> network_pb2.Network:
        network = network_pb2.Network(name=name, migration_role=role, rules=agent_pb.NetworkRules(cidrs=cidrs, **rules))
        return (await self.service.CreateNetwork(network_pb2.CreateNetworkRequest(network=network), NO_CONTEXT)).network

    async def set(self, name: str, *paths: str, **rules: Any) -> network_pb2.Network:
        request = network_pb2.UpdateNetworkRequest(
            name=name, rules=agent_pb.NetworkRules(**rules), update_mask=FieldMask(paths=paths or rules)
        )
        return (await self.service.UpdateNetwork(request, NO_CONTEXT)).network

    async def grant(self, name: str) -> network_pb2.Network:
        return (await self.service.GrantRole(network_pb2.GrantRoleRequest(name=name), NO_CONTEXT)).network

    async def revoke(self, name: str, *, drain: bool = False) -> network_pb2.Network:
        return (await self.service.RevokeRole(network_pb2.RevokeRoleRequest(name=name, drain=drain), NO_CONTEXT)).network

    async def remove(self, name: str) -> None:
        await self.service.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=name), NO_CONTEXT)

    async def show(self, name: str) -> network_pb2.GetNetworkResponse:
        return await self.service.GetNetwork(network_pb2.GetNetworkRequest(name=name), NO_CONTEXT)

    async def refused(self, call: Callable[[], Awaitable[Any]], reason: Reason, field: str = "") -> str:
        before = [network.SerializeToString(deterministic=True) for network in self.table.all()]
        with pytest.raises(DroverError) as error:
            await call()
        assert error.value.reason is reason
        assert error.value.metadata.get("field", "") == field or not field
        assert [network.SerializeToString(deterministic=True) for network in self.table.all()] == before
        reloaded = NetworkTable(self.store, Bus())
        await reloaded.open()
        assert reloaded.all() == self.table.all()
        return error.value.message

    @staticmethod
    async def refused_at_first(call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(DroverError) as error:
            await call()
        assert error.value.reason is Reason.BUSY


@pytest.fixture(name="cluster")
async def _cluster() -> AsyncIterator[Cluster]:
    async with await MemoryStore.open() as store:
        cluster = Cluster(store)
        await cluster.table.open()
        yield cluster


async def test_8_4_networks_are_made_changed_listed_and_removed(cluster: Cluster) -> None:
    made = await cluster.add("mig", "10.92.0.9/24", tenants=["acme"])
    assert (list(made.rules.cidrs), made.migration_role, made.revoking) == (["10.92.0.0/24"], True, False)
    await cluster.add("alt", "10.93.0.0/24", "fd00:93::/64", role=False)
    changed = await cluster.set("mig", cap_bytes_per_second=5_000_000, fallback=True)
    assert (changed.rules.cap_bytes_per_second, changed.rules.fallback, list(changed.rules.tenants)) == (5_000_000, True, ["acme"])
    assert changed.revision > made.revision
    assert not (await cluster.set("mig", "tenants")).rules.tenants
    listed = await cluster.service.ListNetworks(network_pb2.ListNetworksRequest(page_size=1), NO_CONTEXT)
    assert [network.name for network in listed.networks] == ["alt"]
    again = NetworkTable(cluster.store, Bus())
    await again.open()
    assert again.all() == cluster.table.all()
    await cluster.remove("alt")
    await cluster.refused(lambda: cluster.show("alt"), Reason.NETWORK_NOT_FOUND)
    await cluster.add("other", "10.93.0.0/25")


async def test_8_4_a_network_shows_its_hosts_and_who_uses_it(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    cluster.migrate("m1", "mig", allotted_bytes_per_second=7)
    cluster.migrate("m2", "other", allotted_bytes_per_second=9)
    shown = await cluster.show("mig")
    assert [(h.host, h.network.address, h.network.down, h.out_bytes_per_second, h.in_bytes_per_second) for h in shown.hosts] == [
        ("h1", "10.92.0.1", False, 7, 0),
        ("h2", "10.92.0.2", True, 0, 7),
    ]
    assert list(shown.migration_ids) == ["m1"]
    assert not any(host.network.HasField("rules") for host in shown.hosts)


async def test_8_4_each_bad_input_has_its_error_and_changes_nothing(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    await cluster.add("alt", "10.93.0.0/24", role=False)
    refused = cluster.refused
    await refused(lambda: cluster.add("mig", "10.99.0.0/24"), Reason.NETWORK_EXISTS)
    await refused(lambda: cluster.add("new", "10.92.0.128/25"), Reason.NETWORK_OVERLAPS)
    await refused(lambda: cluster.add("new", "10.99.0.0/24", "10.99.0.0/25"), Reason.NETWORK_OVERLAPS, "rules.cidrs[1]")
    await refused(lambda: cluster.add("new"), Reason.INVALID_FIELD, "rules.cidrs")
    await refused(lambda: cluster.add("new", "nonsense"), Reason.INVALID_FIELD, "rules.cidrs[0]")
    await refused(lambda: cluster.add("-bad-", "10.99.0.0/24"), Reason.INVALID_FIELD, "network.name")
    await refused(
        lambda: cluster.add("new", "10.99.0.0/24", max_bytes_per_second=9_000_000, cap_bytes_per_second=8_000_000),
        Reason.INVALID_FIELD,
        "rules.max_bytes_per_second",
    )
    await refused(lambda: cluster.set("alt", cidrs=["10.92.0.0/16"]), Reason.NETWORK_OVERLAPS)
    await refused(lambda: cluster.set("alt", "cidrs"), Reason.INVALID_FIELD, "rules.cidrs")
    await refused(lambda: cluster.set("alt", "nonsense"), Reason.INVALID_FIELD, "update_mask")
    for call in (cluster.set("none", fallback=True), cluster.grant("none"), cluster.revoke("none"), cluster.remove("none")):
        await refused(lambda call=call: call, Reason.NETWORK_NOT_FOUND)  # type: ignore[misc]
    await refused(lambda: cluster.grant("mig"), Reason.ROLE_ALREADY_GRANTED)
    await refused(lambda: cluster.revoke("alt"), Reason.ROLE_NOT_GRANTED)
    await cluster.revoke("mig")
    await refused(lambda: cluster.revoke("mig"), Reason.ROLE_NOT_GRANTED)
    assert (await cluster.grant("mig")).migration_role


async def test_8_4_what_a_migration_uses_is_not_taken_from_it(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    moving = cluster.migrate("m1", "mig")
    assert "m1" in await cluster.refused(lambda: cluster.revoke("mig"), Reason.NETWORK_IN_USE)
    await cluster.refused(lambda: cluster.remove("mig"), Reason.NETWORK_IN_USE)
    await cluster.refused(lambda: cluster.set("mig", cidrs=["10.97.0.0/24"]), Reason.NETWORK_IN_USE)
    assert (await cluster.set("mig", cidrs=["10.92.0.0/16"])).rules.cidrs == ["10.92.0.0/16"]
    assert "m1" in await cluster.refused(lambda: cluster.set("mig", tenants=["blue"]), Reason.NETWORK_IN_USE)
    cluster.end(moving)
    blue = cluster.migrate("m2", "mig", tenant="blue")
    assert (await cluster.set("mig", tenants=["blue", "red"])).rules.tenants == ["blue", "red"]
    await cluster.refused(lambda: cluster.set("mig", tenants=["red"]), Reason.NETWORK_IN_USE)
    cluster.end(blue)
    assert not (await cluster.revoke("mig")).migration_role
    await cluster.remove("mig")


async def test_8_4_a_migration_that_waits_for_its_slot_uses_no_network_and_plans_again(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    waiting = cluster.migrate("m1", "mig", state=migration_pb2.MIGRATION_STATE_PENDING)
    waiting.migration.slot_wait.FromSeconds(60)
    waiting.planned_at = 7.0
    assert not (await cluster.revoke("mig")).migration_role
    assert waiting.planned_at < 0
    waiting.migration.slot_duration.FromSeconds(1)
    assert list((await cluster.show("mig")).migration_ids) == ["m1"]


async def test_8_4_a_drained_role_goes_with_the_last_migration_also_after_a_restart(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    first, second = cluster.migrate("m1", "mig"), cluster.migrate("m2", "mig")
    draining = await cluster.revoke("mig", drain=True)
    assert (draining.migration_role, draining.revoking) == (True, True)
    assert cluster.table.defined()[0].roles == ["draining"]
    await cluster.refused(lambda: cluster.revoke("mig", drain=True), Reason.ROLE_NOT_GRANTED)
    again = NetworkTable(cluster.store, Bus())
    await again.open()
    finishing = supervise("finish revoking", lambda: finish_revoking(again, cluster.collection))
    cluster.end(first)
    await asyncio.sleep(0)
    assert again.get("mig").revoking
    changed = again.changed.next
    cluster.end(second)
    await changed.wait()
    assert (again.get("mig").migration_role, again.get("mig").revoking) == (False, False)
    finishing.cancel()
    await asyncio.wait([finishing])


async def test_8_4_granting_ends_a_drain(cluster: Cluster) -> None:
    await cluster.add("mig", "10.92.0.0/24")
    cluster.migrate("m1", "mig")
    await cluster.revoke("mig", drain=True)
    granted = await cluster.grant("mig")
    assert (granted.migration_role, granted.revoking) == (True, False)


async def test_8_4_hosts_are_seen_with_the_clusters_networks(cluster: Cluster) -> None:
    host = cluster.registry.hosts[0].host
    host.networks.add(name="own", address="10.92.0.1", roles=["migration"])
    assert cluster.table.seen_by(host) is host
    await cluster.add("mig", "10.92.0.0/24", tenants=["acme"])
    [side] = cluster.table.seen_by(host).networks
    assert (side.name, side.address, list(side.roles), list(side.rules.tenants)) == ("mig", "10.92.0.1", ["migration"], ["acme"])
    assert [network.name for network in host.networks] == ["own"]


async def test_8_4_what_was_written_elsewhere_is_learnt_by_the_refusal(cluster: Cluster) -> None:
    """Such as by a write of its own whose answer was lost."""
    await cluster.add("mig", "10.92.0.0/24")
    other = Cluster(cluster.store)
    await other.table.open()
    await other.set("mig", cap_bytes_per_second=5_000_000)
    await cluster.refused_at_first(lambda: cluster.set("mig", fallback=True))
    changed = await cluster.set("mig", fallback=True)
    assert (changed.rules.cap_bytes_per_second, changed.rules.fallback) == (5_000_000, True)
    await other.table.open()
    await other.remove("mig")
    await cluster.refused_at_first(lambda: cluster.remove("mig"))
    await cluster.add("mig", "10.92.0.0/24")
