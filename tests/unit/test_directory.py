"""coordinator.hosts.directory: which agent a migration uses while hosts register, move and disappear."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest

from agent.hypervisor.features import PROTOCOL_VERSION
from agent.runtime.errors import Reason
from agent.runtime.events import Bus
from agent.service.handshake_service import SERVICE, handshake_servicer
from agent.service.server import Server, start_server
from coordinator.hosts.directory import REPORT_SECONDS, ClusterDirectory
from coordinator.hosts.guests import find_guest
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from drover.agent.v1 import handshake_pb2, handshake_pb2_grpc, host_pb2, host_pb2_grpc, options_pb2
from drover.agent.v1 import migration_pb2 as pb
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from drover.coordinator.v1.host_pb2 import HOST_STATE_UNREACHABLE
from tests.unit.asking import PATIENCE, REF, fails, until
from tests.unit.fake_agents import Clock, FakeAgent
from tests.unit.two_agents import Pair

LOOK = handshake_pb2.GetRecordRequest(ref=REF)
MIGRATION = pb.Migration(source_host="h1", destination_host="h2")

Registers = Callable[[str, str, str], Awaitable[Server]]
"""Starts an agent in a directory of that name, and registers it under a host's name and UUID."""


@pytest.fixture
async def registry() -> AsyncIterator[HostRegistry]:
    async with await MemoryStore.open() as store:
        registry = HostRegistry(store, Bus())
        await registry.open()
        yield registry
        await registry.close()


@pytest.fixture
async def registers(registry: HostRegistry, pair: Pair, tmp_path: Path) -> AsyncIterator[Registers]:
    servicer = handshake_servicer(pair.destination.engine)
    servers: list[Server] = []

    async def registers(where: str, name: str, host_uuid: str) -> Server:
        agent = FakeAgent(tmp_path / where, name, host_uuid)

        def add(grpc_server: grpc.aio.Server) -> None:
            handshake_pb2_grpc.add_HandshakeServiceServicer_to_server(servicer, grpc_server)
            host_pb2_grpc.add_HostServiceServicer_to_server(agent, grpc_server)

        server = await start_server([f"unix:{tmp_path}/{where}/agent.sock"], add, [SERVICE], Bus())
        servers.append(server)
        entries = registry._table.hosts
        await until(lambda: name not in entries or not entries[name].up)  # the name is free once its holder is silent
        await registry.register(host_pb2.Host(name=name, host_uuid=host_uuid), server.addresses[0])
        return server

    yield registers
    for server in servers:
        await server.stop(0)


async def is_unreachable(registry: HostRegistry, name: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await registry.get(name)).state != HOST_STATE_UNREACHABLE:  # noqa: ASYNC110 - of a host that comes no watch tells
            await asyncio.sleep(0.005)


async def test_the_peer_follows_its_agent_to_another_address(registry: HostRegistry, registers: Registers) -> None:
    await registers("a", "h1", "uuid-1")
    before = await registers("b", "h2", "uuid-2")
    _, destination = await ClusterDirectory(registry, Bus()).ends(MIGRATION)
    await fails(destination.handshake.get_record(LOOK), Reason.RECORD_NOT_FOUND)
    await before.stop(0)
    await registers("c", "h2", "uuid-2")
    await fails(destination.handshake.get_record(LOOK), Reason.RECORD_NOT_FOUND)


async def test_another_host_that_takes_the_name_is_not_the_peer(registry: HostRegistry, registers: Registers) -> None:
    """It has no record of the attempt, so its answer would end a copy that may run on the right host."""
    await registers("a", "h1", "uuid-1")
    before = await registers("b", "h2", "uuid-2")
    _, destination = await ClusterDirectory(registry, Bus()).ends(MIGRATION)
    await before.stop(0)
    await is_unreachable(registry, "h2")
    await registers("c", "h2", "uuid-3")
    error = await fails(destination.handshake.get_record(LOOK), Reason.HOST_UNREACHABLE)
    assert "uuid-2" in error.message


async def test_6_17_a_host_whose_uuid_was_changed_stays_the_peer_of_its_migrations(
    registry: HostRegistry, registers: Registers
) -> None:
    """The remedy for two hosts with one UUID changes the UUID, but neither name nor address."""
    await registers("a", "h1", "uuid-1")
    before = await registers("b", "h2", "uuid-2")
    _, destination = await ClusterDirectory(registry, Bus()).ends(MIGRATION)
    await before.stop(0)
    await is_unreachable(registry, "h2")
    await registers("b", "h2", "uuid-3")
    await fails(destination.handshake.get_record(LOOK), Reason.RECORD_NOT_FOUND)  # it is asked, and answers


# --- where a guest is -------------------------------------------------------------------------------------------------


def copy(host: str, state: str, job: str = "none", uuid: str = "u1") -> tuple[str, host_pb2.GetDomainResponse]:
    value = host_pb2.DomainState.Value(f"DOMAIN_STATE_{state}")
    return host, host_pb2.GetDomainResponse(domain=host_pb2.Domain(name="web1", uuid=uuid, state=value, job=job))


class Asked:
    """A fake registry with the answers of all hosts."""

    def __init__(self, *found: tuple[str, host_pb2.GetDomainResponse], silent: list[str]) -> None:
        self.answer = list(found), silent

    async def find_domain(self, request: host_pb2.GetDomainRequest) -> object:
        return self.answer


async def test_6_03_the_name_of_one_guest_and_the_uuid_of_another() -> None:
    """It is ambiguous whichever of them runs, as a user may mean either."""
    uuid = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0001"
    named = "SHUTOFF", host_pb2.Domain(name=uuid, uuid="u2")
    for state, domain in (named, ("RUNNING", named[1])):
        found_copy = copy("h2", state)
        found_copy[1].domain.MergeFrom(domain)
        registry: HostRegistry = Asked(copy("h1", "RUNNING", uuid=uuid), found_copy, silent=[])  # type: ignore[assignment]
        error = await fails(find_guest(registry, host_pb2.GetDomainRequest(domain=uuid), "--from"), Reason.DOMAIN_AMBIGUOUS)
        assert "web1" in error.message


async def found(*copies: tuple[str, host_pb2.GetDomainResponse], silent: list[str]) -> str:
    registry: HostRegistry = Asked(*copies, silent=silent)  # type: ignore[assignment]
    return (await find_guest(registry, host_pb2.GetDomainRequest(domain="web1"), "--from"))[0]


@pytest.mark.parametrize(
    "others",
    [
        [],
        [copy("h2", "SHUTOFF")],
        [copy("h2", "PAUSED", job="incoming")],
        [copy("h2", "PAUSED")],  # left over on a host that was declared dead
    ],
)
async def test_a_guest_is_where_it_runs(others: list[tuple[str, host_pb2.GetDomainResponse]]) -> None:
    assert await found(copy("h1", "RUNNING"), *others, silent=["h9"]) == "h1"


async def test_a_guest_that_is_shut_off_everywhere_is_found_too() -> None:
    assert await found(copy("h1", "SHUTOFF"), silent=[]) == "h1"


@pytest.mark.parametrize(
    ("copies", "silent", "reason", "says"),
    [
        ([], [], Reason.DOMAIN_NOT_FOUND, "drover domain list"),
        ([], ["h1", "h2"], Reason.HOST_UNREACHABLE, "it may run on h1, h2, which did not answer"),
        ([copy("h2", "SHUTOFF")], ["h1"], Reason.HOST_UNREACHABLE, "it may run on h1, which did not answer"),
        ([copy("h1", "RUNNING"), copy("h2", "RUNNING", uuid="u2")], [], Reason.DOMAIN_AMBIGUOUS, "--from HOST, or name it by UUID"),
        ([copy("h1", "RUNNING"), copy("h2", "PAUSED", uuid="u2")], [], Reason.DOMAIN_AMBIGUOUS, "h1 and h2"),
        ([copy("h1", "SHUTOFF"), copy("h2", "SHUTOFF")], [], Reason.DOMAIN_AMBIGUOUS, "say which with --from HOST"),
    ],
)
async def test_what_cannot_be_said_of_a_guest(
    copies: list[tuple[str, host_pb2.GetDomainResponse]], silent: list[str], reason: Reason, says: str
) -> None:
    error = await fails(found(*copies, silent=silent), reason)
    assert says in error.message


# --- any host ---------------------------------------------------------------------------------------------------------


class Reported(Asked):
    """A fake registry with the last reports of h1, which has the guest, h2 and h3."""

    def __init__(self) -> None:
        super().__init__(copy("h1", "RUNNING"), silent=[])
        features = options_pb2.MigrationFeatures(split_phases=True)
        networks = [host_pb2.Network(name="mig0", address="127.92.0.1", roles=["migration"])]
        self.hosts = [
            cluster_pb2.ClusterHost(
                host=host_pb2.Host(name=name, host_uuid=name, driver="sim", max_protocol_version=PROTOCOL_VERSION, incoming_limit=2),
                state=cluster_pb2.HOST_STATE_UP,
            )
            for name in ("h1", "h2", "h3")
        ]
        for known in self.hosts:
            known.host.migration_features.CopyFrom(features)
            known.host.networks.extend(networks)

    async def list_hosts(self) -> list[cluster_pb2.ClusterHost]:
        return self.hosts

    async def get(self, name: str) -> cluster_pb2.ClusterHost:
        return next(known for known in self.hosts if known.host.name == name)


async def test_8_2_any_host_is_one_of_those_that_are_up_by_their_last_reports() -> None:
    reported, clock = Reported(), Clock()
    directory = ClusterDirectory(reported, Bus(), clock)  # type: ignore[arg-type]
    spec = pb.MigrationSpec(domain="web1")
    assert [candidate.name for candidate in await directory.candidates(spec)] == ["h2", "h3"]
    assert [candidate.name for candidate in await directory.candidates(spec)] == ["h3", "h2"], "h2 was just chosen"
    await directory.candidates(pb.MigrationSpec(domain="web1", destination_host="h2"))  # for advice: nothing is chosen
    assert [candidate.name for candidate in await directory.candidates(spec)] == ["h2", "h3"], "each was chosen once"
    clock.now += 2 * REPORT_SECONDS
    assert [candidate.name for candidate in await directory.candidates(spec)] == ["h2", "h3"], "its report counts by now"
    reported.hosts[1].host.settings.cordoned = True
    assert [candidate.name for candidate in await directory.candidates(spec)] == ["h3"]
    reported.hosts[2].state = HOST_STATE_UNREACHABLE
    error = await fails(directory.candidates(spec), Reason.NO_HOST)
    assert "h2: it is cordoned; h3: it does not answer" in error.message
