"""Requirement H6: a guest that the destination cannot run is refused before it is touched."""

import pytest

from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import host_pb2
from tests.kit.cluster import Cluster
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.conversation import Talk, assert_idle, new_id


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"machine": "pc-q35-99.9"}, "pc-q35-99.9"),
        ({"arch": "s390x"}, "s390x"),
        ({"cpu": "<cpu mode='custom' match='exact'><model fallback='forbid'>EPYC-Milan</model></cpu>"}, "CPU"),
    ],
)
async def test_a_guest_that_the_destination_cannot_run(cluster: Cluster, change: dict[str, str], word: str) -> None:
    assert isinstance(cluster, LabCluster)
    guest = cluster.guest("incompatible")
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        known: host_pb2.GetDomainResponse = await src.call(src.hosts.GetDomain, host_pb2.GetDomainRequest(domain=guest.name))
        needs = known.requirements
        for field, value in change.items():
            setattr(needs, field, value)
        with pytest.raises(DroverError) as refusal:
            await dst.handshake.reserve_slot(
                pb.ReserveSlotRequest(ref=pb.AttemptRef(migration_id=new_id(), attempt=1), requirements=needs, source_host="h1")
            )
    assert refusal.value.reason is Reason.INCOMPATIBLE_GUEST
    assert word in refusal.value.message
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)


async def test_a_guest_that_is_there_already(cluster: Cluster) -> None:
    """Another guest of the same name runs at the destination."""
    assert isinstance(cluster, LabCluster)
    guest = cluster.guest("incompatible")
    other = cluster.lab.guest("there-already", memory_mib=16).with_(name=guest.name, uuid=None)
    twin = other.with_(name="incompatible-twin")
    cluster.lab["h2"].start(twin)
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start(guest.name, "h2", destination_name="incompatible-twin")
    assert refusal.value.reason is Reason.DOMAIN_EXISTS
    assert cluster.copies(guest.name) == {"h1": "running"}
