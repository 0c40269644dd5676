"""Requirements C1, R3: a name or a UUID means one guest, whatever it looks like."""

import uuid
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2, host_pb2
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import Talk, assert_idle, new_id, state


async def refusal(talk: Talk, domain: str, to: str, **spec: Any) -> DroverError:
    with pytest.raises(DroverError) as refused:
        await talk.start(domain, to, **spec)
    return refused.value


async def uuids(cluster: Cluster, host: str, *of: str) -> set[str]:
    """Those of the guests that run on a host."""
    async with Talk(cluster.agents[host].address) as talk:
        domains = (await talk.call(talk.hosts.ListDomains, host_pb2.ListDomainsRequest())).domains
    return {domain.uuid for domain in domains if domain.uuid in of and domain.state == host_pb2.DOMAIN_STATE_RUNNING}


async def test_6_03_a_guest_named_with_the_uuid_of_another(cluster: Cluster) -> None:
    odd, meant = cluster.start_guest("oddly-named"), cluster.start_guest("meant")
    async with Talk(cluster.server) as talk, Talk(cluster.agents["h1"].address) as h1:
        away = await talk.migrate(odd.name, "h2", destination_name=meant.uuid)
        assert state(away) == "succeeded", away.failure.message
        # One on each host, then both on the same one.
        for where in ("h2", "h1"):
            if where == "h1":
                back = await talk.migrate(odd.uuid, "h1")
                assert state(back) == "succeeded", back.failure.message
            error = await refusal(talk, meant.uuid, "h1" if where == "h2" else "h2")
            assert error.reason is Reason.DOMAIN_AMBIGUOUS
            assert meant.name in error.message
            assert odd.uuid in error.message
        ref = handshake_pb2.AttemptRef(migration_id=new_id(), attempt=1)
        with pytest.raises(DroverError) as by_hand:
            await h1.handshake.begin(handshake_pb2.BeginRequest(ref=ref, domain=meant.uuid, destination_host="h2"))
        assert by_hand.value.reason is Reason.DOMAIN_AMBIGUOUS
        moved = await talk.migrate(meant.name, "h2")
        assert state(moved) == "succeeded", moved.failure.message
        assert moved.domain_uuid == meant.uuid
    assert [await uuids(cluster, host, meant.uuid, odd.uuid) for host in ("h1", "h2")] == [{odd.uuid}, {meant.uuid}]
    for guest in (odd, meant):
        guest.wait_lines(5)
        assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_6_03_what_only_python_takes_for_a_uuid_is_a_name(cluster: Cluster) -> None:
    first, second = cluster.start_guest("hex-1"), cluster.start_guest("hex-2")
    async with Talk(cluster.server) as talk:
        here, there = "h1", "h2"
        name = first.name
        for odd in (uuid.UUID(second.uuid).hex, f"{{{second.uuid}}}", f"urn:uuid:{second.uuid}"):
            moved = await talk.migrate(name, there, destination_name=odd)
            assert state(moved) == "succeeded", moved.failure.message
            assert cluster.copies(odd) == {there: "running"}
            here, there, name = there, here, odd
        taken = await refusal(talk, second.name, here, destination_name=name)
        assert taken.reason is Reason.DOMAIN_EXISTS
        assert (await refusal(talk, uuid.UUID(second.uuid).hex, "h2")).reason is Reason.DOMAIN_NOT_FOUND
        moved = await talk.migrate(second.uuid.upper(), "h2")
        assert (state(moved), moved.domain_name) == ("succeeded", second.name)
    first.wait_lines(5)
    assert first.judge().problems() == []
    await assert_idle(cluster)
