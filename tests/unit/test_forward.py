"""What a coordinator passes on to agents: changes of the settings of hosts and guests, and questions about slots."""

from typing import Any

import pytest

from agent.runtime.errors import Reason
from coordinator.hosts.host_service import HostServicer
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb
from tests.unit.asking import fails
from tests.unit.fake_agents import UNREACHABLE, Active, register, until

CHANGE = agent_pb.UpdateHostRequest(
    settings=agent_pb.HostSettings(incoming_limit=0, cordoned=True), change=agent_pb.SettingsChange(changed_by="root@admin1")
)
CHANGE.update_mask.paths[:] = ["incoming_limit", "cordoned"]
TENANT = agent_pb.UpdateDomainRequest(domain="vm-alpha", settings=agent_pb.DomainSettings(tenant="blue"))
TENANT.update_mask.paths[:] = ["tenant"]


@pytest.fixture(name="servicer")
def _servicer(registry: HostRegistry) -> Any:
    return HostServicer(registry, Active({}))  # type: ignore[arg-type]


async def test_8_1_a_change_of_a_host_reaches_its_agent_and_is_seen_at_once(
    servicer: Any, registry: HostRegistry, store: MemoryStore, agents: Any
) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    answer = await servicer.UpdateHost(pb.UpdateHostRequest(name="alpha", update=CHANGE), None)
    assert agent.updates == [CHANGE]
    known = await registry.get("alpha")
    for host in (answer.host.host, known.host):
        assert host.settings.HasField("incoming_limit")
        assert (host.settings.incoming_limit, host.settings.cordoned) == (0, True)
        assert host.settings_change.changed_by == "root@admin1"
    await until(store, "alpha", lambda known: known.host.settings.cordoned)


async def test_8_1_no_such_host_and_one_that_does_not_answer(
    servicer: Any, registry: HostRegistry, store: MemoryStore, agents: Any
) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    await fails(servicer.UpdateHost(pb.UpdateHostRequest(name="beta", update=CHANGE), None), Reason.HOST_NOT_FOUND)
    await fails(servicer.ListSlots(pb.ListSlotsRequest(name="beta"), None), Reason.HOST_NOT_FOUND)
    await fails(servicer.UpdateDomain(pb.UpdateDomainRequest(host="beta", update=TENANT), None), Reason.HOST_NOT_FOUND)
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    error = await fails(servicer.UpdateHost(pb.UpdateHostRequest(name="alpha", update=CHANGE), None), Reason.HOST_UNREACHABLE)
    assert "systemctl status drover-agent" in error.message
    assert agent.updates == []


async def test_8_1_another_host_at_the_address_is_not_taken_for_the_host(servicer: Any, registry: HostRegistry, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.host.host_uuid = "another"
    await fails(servicer.UpdateHost(pb.UpdateHostRequest(name="alpha", update=CHANGE), None), Reason.HOST_UNREACHABLE)
    assert (await registry.get("alpha")).host.host_uuid == "uuid-alpha"


async def test_8_2_an_agent_that_knows_no_slots_is_said_to_be_older(servicer: Any, registry: HostRegistry, agents: Any) -> None:
    """UNIMPLEMENTED would make a client take the coordinator for an agent."""
    await register(registry, await agents("alpha"))
    error = await fails(servicer.ListSlots(pb.ListSlotsRequest(name="alpha"), None), Reason.PROTOCOL_MISMATCH)
    assert error.metadata["host"] == "alpha"
    assert "Upgrade it" in error.message


async def test_8_4_settings_of_a_guest_reach_the_host_that_has_it(servicer: Any, registry: HostRegistry, agents: Any) -> None:
    alpha, beta = await agents("alpha"), await agents("beta")
    await register(registry, alpha)
    await register(registry, beta)
    answer = await servicer.UpdateDomain(pb.UpdateDomainRequest(update=TENANT), None)
    assert (answer.domain.host, answer.domain.domain.settings.tenant) == ("alpha", "blue")
    beta.domains[0].name = "vm-alpha"
    error = await fails(servicer.UpdateDomain(pb.UpdateDomainRequest(update=TENANT), None), Reason.DOMAIN_AMBIGUOUS)
    assert "--host HOST" in error.message
    named = await servicer.UpdateDomain(pb.UpdateDomainRequest(host="beta", update=TENANT), None)
    assert named.domain.host == "beta"
    assert (alpha.updates, beta.updates) == ([TENANT], [TENANT])
    nowhere = agent_pb.UpdateDomainRequest(domain="vm9", settings=TENANT.settings, update_mask=TENANT.update_mask)
    await fails(servicer.UpdateDomain(pb.UpdateDomainRequest(update=nowhere), None), Reason.DOMAIN_NOT_FOUND)
