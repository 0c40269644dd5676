"""Bandwidth on real hosts, whose lines are limited by the kernel."""

import os
import time
from collections.abc import Iterator

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from drover.agent.v1 import host_pb2
from drover.coordinator.v1 import network_pb2, network_pb2_grpc
from tests.kit.cluster import Cluster
from tests.kit.cluster import cluster as make_cluster
from tests.kit.cluster.platforms import LabCluster
from tests.scenarios.conversation import MIB
from tests.scenarios.migrating import busy
from tests.scenarios.sharing import *  # noqa: F403 - the tests themselves
from tests.scenarios.sharing import GUESTS, RATE, SETTINGS, start_guests, transfers

pytestmark = pytest.mark.timeout(240)


async def test_8_6_a_cap_that_is_changed_holds_for_what_runs(line: Cluster) -> None:
    name, mask = "mig2", FieldMask(paths=["cap_bytes_per_second"])
    async with transfers(line) as moving:
        stub = network_pb2_grpc.NetworkServiceStub(moving.talk.channel)
        await moving.start("a", network=name)
        await moving.allotted(a=30)
        rules = host_pb2.NetworkRules(cidrs=["10.93.0.0/24"], cap_bytes_per_second=20 * MIB)
        network = network_pb2.Network(name=name, migration_role=True, rules=rules)
        await moving.talk.call(stub.CreateNetwork, network_pb2.CreateNetworkRequest(network=network))
        try:
            await moving.allotted(a=20)
            rules.cap_bytes_per_second = 10 * MIB
            await moving.talk.call(stub.UpdateNetwork, network_pb2.UpdateNetworkRequest(name=name, rules=rules, update_mask=mask))
            changed = time.monotonic()
            await moving.allotted(a=10)
            assert time.monotonic() - changed <= busy()
            await moving.flow(2, a=10 * MIB)
        finally:
            await moving.end()
            await moving.talk.call(stub.DeleteNetwork, network_pb2.DeleteNetworkRequest(name=name))


@pytest.fixture(scope="module", name="line")
def _line(_real_hosts: None) -> Iterator[Cluster]:
    with make_cluster("libvirt", GUESTS, networks=2, lab_id=f"sh{os.getpid()}", settings=SETTINGS) as made:
        assert isinstance(made, LabCluster)
        for host in made.lab.hosts:
            host.limit_rate("mig1", RATE)
        start_guests(made)
        yield made
