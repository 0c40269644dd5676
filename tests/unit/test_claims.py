"""coordinator.hosts.claims: the checks of a registration, and which hosts it displaces."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.runtime.backoff import PROOF
from agent.runtime.errors import DroverError, Reason
from coordinator.hosts import claims
from coordinator.hosts.host_table import PREFIX
from coordinator.hosts.hosts import HostRegistry
from coordinator.store import MemoryStore, Put
from drover.agent.v1 import host_pb2 as agent_pb
from drover.coordinator.v1 import host_pb2 as pb
from tests.unit.fake_agents import UNREACHABLE, UP, Clock, names, register, until


@pytest.mark.parametrize(
    ("host", "address", "field"),
    [
        (agent_pb.Host(host_uuid="u"), "unix:/a", "host.name"),
        (agent_pb.Host(name="a"), "unix:/a", "host.host_uuid"),
        (agent_pb.Host(name="a", host_uuid="u"), "a.example:7400", "agent_address"),
        *[(agent_pb.Host(name=name, host_uuid="u"), "unix:/a", "host.name") for name in ("a\n", "A", "-a", "a b", "a/b", "a" * 64)],
    ],
)
async def test_bad_claims(registry: HostRegistry, host: agent_pb.Host, address: str, field: str) -> None:
    with pytest.raises(DroverError) as caught:
        await registry.register(host, address)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field
    assert await registry.list_hosts() == []


async def test_6_24_an_address_counts_once_the_agent_there_has_answered_with_that_identity(
    registry: HostRegistry, store: MemoryStore, agents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PROOF_SECONDS", 0.5)
    alpha, silence = await agents("alpha"), {Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED}
    cases = [
        (agent_pb.Host(name="beta", host_uuid="u"), f"unix:{tmp_path}/none.sock", silence),
        (agent_pb.Host(name="beta", host_uuid="uuid-alpha"), alpha.address, {Reason.INVALID_FIELD}),
        (agent_pb.Host(name="alpha", host_uuid="u"), alpha.address, {Reason.INVALID_FIELD}),
    ]
    for host, address, reasons in cases:
        with pytest.raises(DroverError) as caught:
            await registry.register(host, address)
        assert caught.value.reason in reasons
    assert await registry.list_hosts() == []
    assert await store.get(PREFIX + "beta") is None


@pytest.mark.parametrize("reason", [Reason.INTERNAL, Reason.UNIMPLEMENTED, Reason.HOST_NAME_TAKEN])
async def test_6_29_what_answers_at_an_address_does_not_speak_for_the_coordinator(
    registry: HostRegistry, agents: Any, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    async def get_host(*_: object) -> agent_pb.GetHostResponse:
        raise DroverError(reason, "so it is")

    alpha = await agents("alpha")
    monkeypatch.setattr(alpha, "GetHost", get_host)
    await alpha.stop()
    await alpha.start()
    with pytest.raises(DroverError, match="does not answer as a working agent does: so it is") as caught:
        await register(registry, alpha)
    assert caught.value.reason is Reason.HOST_UNREACHABLE
    assert await registry.list_hosts() == []


async def test_6_24_questions_to_those_who_register_are_bounded(
    registry: HostRegistry, agents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "MAX_PROOFS", 2)
    monkeypatch.setattr(claims, "PROOF_SECONDS", 0.5)
    hosts = [agent_pb.Host(name=f"h{number}", host_uuid=f"u{number}") for number in range(5)]
    results = await asyncio.gather(
        *(registry.register(host, f"unix:{tmp_path}/none.sock") for host in hosts), return_exceptions=True
    )
    assert [r.reason for r in results if isinstance(r, DroverError)].count(Reason.BUSY) == 3
    await register(registry, await agents("alpha"))  # there is room again


async def test_7_an_address_that_does_not_answer_is_asked_less_often_and_noticed_soon_once_it_does(
    registry: HostRegistry, clock: Clock, agents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent registers every few seconds, from behind a firewall that blocks the coordinator's queries."""
    alpha, asked, ask = await agents("alpha"), [], claims._ask

    async def count(host: agent_pb.Host, address: str) -> agent_pb.Host:
        asked.append(address)
        return await ask(host, address)

    monkeypatch.setattr(claims, "_ask", count)
    monkeypatch.setattr(claims, "PROOF_SECONDS", 0.05)
    await alpha.stop()
    for _ in range(10):
        with pytest.raises(DroverError) as caught:
            await register(registry, alpha)
        assert caught.value.reason in (Reason.HOST_UNREACHABLE, Reason.DEADLINE_EXCEEDED)
    assert len(asked) < 10
    await register(registry, await agents("beta"))  # others are not held up
    monkeypatch.setattr(claims, "PROOF_SECONDS", 3.0)
    await alpha.start()
    clock.now += PROOF.cap
    await register(registry, alpha)
    assert await names(registry) == {"alpha": UP, "beta": UP}


async def test_name_taken_and_taken_over(registry: HostRegistry, store: MemoryStore, agents: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    agent, other = await agents("alpha"), await agents("alpha", "uuid-2", "other")
    await register(registry, agent)
    with pytest.raises(DroverError, match="another name") as caught:
        await register(registry, other)
    assert caught.value.reason is Reason.HOST_NAME_TAKEN
    assert (await registry.get("alpha")).host.host_uuid == "uuid-alpha"
    await agent.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await register(registry, other)
    known = await registry.get("alpha")
    assert (known.state, known.host.host_uuid, known.agent_address) == (UP, "uuid-2", other.address)


async def test_two_claim_one_name_at_once(registry: HostRegistry, agents: Any, tmp_path: Path) -> None:
    claimants = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        claimants.append(await agents("alpha", f"u{number}", str(number)))
        claimants[-1].hangs = True  # so that the winner sends no report and is not lost meanwhile
    results = await asyncio.gather(*(register(registry, agent) for agent in claimants), return_exceptions=True)
    refused = [result for result in results if isinstance(result, DroverError)]
    assert [error.reason for error in refused] == [Reason.HOST_NAME_TAKEN] * 2
    assert len(await registry.list_hosts()) == 1


async def test_renamed_host_leaves_its_old_name(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(name="beta")
    await register(registry, agent)
    assert await names(registry) == {"beta": UP}
    assert await store.get(PREFIX + "alpha") is None


async def test_6_17_two_hosts_with_one_uuid_are_told_and_nobody_vanishes(
    registry: HostRegistry, store: MemoryStore, agents: Any
) -> None:
    alpha, clone = await agents("alpha", "u"), await agents("clone", "u")
    await register(registry, alpha)
    for state in (UP, UNREACHABLE):
        with pytest.raises(DroverError, match=r"libvirtd\.conf") as caught:
            await register(registry, clone)
        assert caught.value.reason is Reason.HOST_UUID_TAKEN
        assert "`drover host remove alpha`" in caught.value.message
        assert await names(registry) == {"alpha": state}
        await alpha.stop()
        await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await registry.remove("alpha")
    await register(registry, clone)
    assert await names(registry) == {"clone": UP}


async def test_6_17_a_host_uuid_that_changed_is_taken_from_the_agent_and_told(registry: HostRegistry, agents: Any) -> None:
    alpha = await agents("alpha")
    await register(registry, alpha)
    alpha.change(host_uuid="another", incarnation="2")
    with capture_logs() as logs:
        await register(registry, alpha)
    assert (await registry.get("alpha")).host.host_uuid == "another"
    changed = [entry for entry in logs if entry["event"] == "host.uuid_changed"]
    assert [(entry["host_uuid"], entry["was"]) for entry in changed] == [("another", "uuid-alpha")]


async def test_6_24_a_host_that_does_not_answer_is_removed_and_one_that_does_is_not(
    registry: HostRegistry, store: MemoryStore, agents: Any
) -> None:
    alpha = await agents("alpha")
    await register(registry, alpha)
    with pytest.raises(DroverError) as caught:
        await registry.remove("alpha")
    assert caught.value.reason is Reason.HOST_IN_USE
    await alpha.stop()
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    await registry.remove("alpha")
    assert await names(registry) == {}
    assert await store.get(PREFIX + "alpha") is None
    with pytest.raises(DroverError) as caught:
        await registry.remove("alpha")
    assert caught.value.reason is Reason.HOST_NOT_FOUND
    await alpha.start()
    await register(registry, alpha)
    assert await names(registry) == {"alpha": UP}


async def test_another_host_at_the_address_is_not_believed(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    agent.change(host_uuid="somebody else")
    await until(store, "alpha", lambda known: known.state == UNREACHABLE)
    assert (await registry.get("alpha")).host.host_uuid == "uuid-alpha"


async def test_somebody_else_wrote_to_the_store(registry: HostRegistry, store: MemoryStore, agents: Any) -> None:
    agent = await agents("alpha")
    await register(registry, agent)
    known = await registry.get("alpha")
    await store.txn([], [Put(PREFIX + "alpha", known.SerializeToString())])
    agent.change(incoming_in_use=1)
    await until(store, "alpha", lambda known: known.host.incoming_in_use == 1)
    foreign = pb.ClusterHost(host=agent_pb.Host(name="beta", host_uuid="uuid-x"), agent_address="unix:/none", state=UP)
    await store.txn([], [Put(PREFIX + "beta", foreign.SerializeToString())])
    beta = await agents("beta")
    await register(registry, beta)  # no known host conflicts with it
    assert (await registry.get("beta")).host.host_uuid == "uuid-beta"


@pytest.mark.parametrize("turns", range(1, 8))
async def test_cancelled_register_heals(registry: HostRegistry, agents: Any, turns: int) -> None:
    agent = await agents("alpha")
    task = asyncio.create_task(register(registry, agent))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)  # cancelled somewhere, or already done
    await register(registry, agent)
    assert await names(registry) == {"alpha": UP}
