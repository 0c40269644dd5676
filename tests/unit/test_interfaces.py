"""agent.network.interfaces and rtnetlink: which addresses and interfaces are this host's, by its kernel."""

import socket
from ipaddress import ip_address

import pytest
from structlog.testing import capture_logs

from agent.handshake.host.phases import LocalHost
from agent.network.interfaces import is_own
from agent.network.rtnetlink import MOST_INTERFACES, most_useful
from agent.network.uri import MigrationUri
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import host_pb2, options_pb2
from tests.unit.fake_hypervisor import FakeHypervisor

FOREIGN = ["198.51.100.77", "2001:db8::77", "255.255.255.255", "224.0.0.1", "0.0.0.0", "::", "fe80::1%nosuch0"]


def outward() -> str:
    """Return an address of this machine beyond loopback; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.77", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def local(*, simulated: bool = False) -> LocalHost:
    return LocalHost("h1", FakeHypervisor("h1"), (), options_pb2.MigrationFeatures(), 30, 10, Bus(), simulated=simulated)


def test_6_05_own_addresses() -> None:
    assert is_own(ip_address("127.0.0.1"))
    for text in FOREIGN:
        assert not is_own(ip_address(text)), text
    if own := outward():
        assert is_own(ip_address(own))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "fe80::1", "198.51.100.77"])
def test_6_05_no_copy_listens_where_others_cannot_reach_it(address: str) -> None:
    with pytest.raises(DroverError) as error:
        local().check_listens_on(address)
    assert error.value.reason is Reason.NETWORK_NOT_FOUND
    local(simulated=True).check_listens_on(address)


def test_6_05_no_memory_is_sent_to_this_host_itself() -> None:
    """Two guests that cross would be swapped, and both migrations would succeed."""
    for text in filter(None, ["127.0.0.1", "127.9.0.1", "::1", "ff02::1", outward()]):
        uri = MigrationUri("tcp", ip_address(text), 49152)
        with pytest.raises(DroverError) as error:
            local().check_sends_to(uri)
        assert error.value.reason is Reason.URI_NOT_ALLOWED
        local(simulated=True).check_sends_to(uri)
    local().check_sends_to(MigrationUri("tcp", ip_address("198.51.100.77"), 49152))


def test_8_4_of_too_many_interfaces_those_are_reported_that_can_carry_memory() -> None:
    """Such as on a host with a bridge for each of many tenants, whose names come before that of its network device."""
    bridges = [host_pb2.Interface(name=f"br-{number}", addresses=[f"172.16.{number}.1/24"], up=True) for number in range(70)]
    down = host_pb2.Interface(name="eth9", addresses=["10.1.0.1/24"], line_bytes_per_second=125_000_000)
    card = host_pb2.Interface(name="mig1", addresses=["10.92.0.1/24"], up=True, line_bytes_per_second=125_000_000)
    with capture_logs() as logs:
        kept = [each.name for each in most_useful([*bridges, down, card])]
    assert (len(kept), kept[-1], "eth9" in kept) == (MOST_INTERFACES, "mig1", False)
    assert kept == sorted(kept)
    assert [(line["left_out"], line["such_as"][-1]) for line in logs] == [(8, "eth9")]
    with capture_logs() as logs:
        assert most_useful([card, down]) == (down, card)
    assert logs == []
