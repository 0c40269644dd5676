"""agent.network.rules: what a network's rules may be, and which interfaces belong to it."""

from typing import Any

import pytest

from agent.network.rules import check_apart, checked, effective, is_in, on_network
from agent.network.uri import MigrationUri
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2


def rules(*cidrs: str, **fields: Any) -> host_pb2.NetworkRules:
    return host_pb2.NetworkRules(
        cidrs=cidrs,
        **{name if name in ("tenants", "fallback") else f"{name}_bytes_per_second": value for name, value in fields.items()},
    )


def network(name: str, *cidrs: str, **fields: Any) -> host_pb2.Network:
    return host_pb2.Network(name=name, roles=["migration"], rules=rules(*cidrs, **fields))


def interface(name: str, *addresses: str, up: bool = True, mtu: int = 1500, line: int = 0) -> host_pb2.Interface:
    return host_pb2.Interface(name=name, addresses=addresses, up=up, mtu=mtu, line_bytes_per_second=line)


def test_8_4_rules_get_their_normal_form() -> None:
    given = rules("10.92.0.7/24", "FD00:92::7/64", "10.93.0.1", tenants=["blue", "acme", "blue"], max=5 << 20, cap=9 << 20)
    normal = checked(given)
    assert list(normal.cidrs) == ["10.92.0.0/24", "fd00:92::/64", "10.93.0.1/32"]
    assert list(normal.tenants) == ["acme", "blue"]
    assert checked(normal) == normal


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (rules("10.92.0.0/33"), "rules.cidrs[0]"),
        (rules("10.92.0.0/24", "mig0"), "rules.cidrs[1]"),
        (rules(""), "rules.cidrs[0]"),
        (rules("0.0.0.0/0"), "rules.cidrs[0]"),
        (rules("::/0"), "rules.cidrs[0]"),
        (rules("224.0.0.0/8"), "rules.cidrs[0]"),
        (rules("fe80::/64"), "rules.cidrs[0]"),
        (rules("fe80::1%eth0/64"), "rules.cidrs[0]"),
        (rules("2001:db8::%1/64"), "rules.cidrs[0]"),
        (rules("::ffff:10.92.0.0/120"), "rules.cidrs[0]"),
        (rules(tenants=["a", " "]), "rules.tenants[1]"),
        (rules(tenants=["a", "none"]), "rules.tenants[1]"),
        (rules(tenants=["a\nb"]), "rules.tenants[0]"),
        (rules(tenants=["a", " acme"]), "rules.tenants[1]"),
        (rules(tenants=["x" * 254]), "rules.tenants[0]"),
        (rules(cap=10**12 + 1), "rules.cap_bytes_per_second"),
        (rules(cap=-1), "rules.cap_bytes_per_second"),
        (rules(cap=(1 << 20) - 1), "rules.cap_bytes_per_second"),
        (rules(max=11 << 20, cap=10 << 20), "rules.max_bytes_per_second"),
        (rules(max=11 << 20, capacity=10 << 20), "rules.max_bytes_per_second"),
        (rules(default=11 << 20, max=10 << 20), "rules.default_bytes_per_second"),
        (rules(default=11 << 20, cap=10 << 20), "rules.default_bytes_per_second"),
        (rules(default=11 << 20, capacity=10 << 20), "rules.default_bytes_per_second"),
    ],
)
def test_8_4_bad_rules_name_their_field(bad: host_pb2.NetworkRules, field: str) -> None:
    with pytest.raises(DroverError) as error:
        checked(bad)
    assert (error.value.reason, error.value.metadata["field"]) == (Reason.INVALID_FIELD, field)


def test_8_4_an_address_belongs_to_one_network() -> None:
    with pytest.raises(DroverError) as error:
        checked(rules("10.92.0.0/16", "fd00::/64", "10.92.7.0/24"))
    assert (error.value.reason, error.value.metadata["field"]) == (Reason.NETWORK_OVERLAPS, "rules.cidrs[2]")
    others = {"a": rules("10.92.0.0/24", "fd00:92::/64"), "b": rules("10.93.0.0/24")}
    check_apart("c", rules("10.94.0.0/24", "fd00:93::/64"), others)
    check_apart("a", rules("10.92.0.0/16"), {"a": others["a"]})
    for overlapping in ("10.92.0.128/25", "10.0.0.0/8", "fd00:92::/48"):
        with pytest.raises(DroverError, match="of network a") as error:
            check_apart("c", rules("10.95.0.0/24", overlapping), others)
        assert error.value.reason is Reason.NETWORK_OVERLAPS


def test_8_4_a_host_is_on_a_network_by_the_addresses_of_its_interfaces() -> None:
    interfaces = [
        interface("eth0", "10.91.0.1/24", "fd00:91::1/64"),
        interface("eth1", "10.92.0.1/24", "fd00:92::1/64", "nonsense", mtu=9000, line=1_250_000_000),
    ]
    four, six = on_network(network("mig", "10.92.0.0/24", "fd00:92::/64"), interfaces)
    assert (four.address, four.interface, four.mtu, four.line_bytes_per_second) == ("10.92.0.1", "eth1", 9000, 1_250_000_000)
    assert (six.address, six.down, list(six.roles)) == ("fd00:92::1", False, ["migration"])
    assert [side.address for side in on_network(network("mig", "fd00:92::/64", "10.92.0.0/24"), interfaces)] == [
        "fd00:92::1",
        "10.92.0.1",
    ]
    assert on_network(network("other", "10.93.0.0/24"), interfaces) == []
    assert on_network(network("none"), interfaces) == []


def test_8_4_of_several_addresses_that_of_a_link_that_is_up_counts() -> None:
    interfaces = [interface("eth0", "10.92.0.1/24", up=False), interface("eth1", "10.92.0.9/24", "10.92.0.5/24")]
    [side] = on_network(network("mig", "10.92.0.0/24"), interfaces)
    assert (side.address, side.interface, side.down) == ("10.92.0.9", "eth1", False)  # the kernel's own ones come first
    [side] = on_network(network("mig", "10.92.0.0/24"), interfaces[:1])
    assert (side.address, side.down) == ("10.92.0.1", True)


def test_8_4_a_network_of_the_cluster_replaces_an_agents_own_by_name_and_by_range() -> None:
    own = [
        host_pb2.Network(name="mgmt", address="10.91.0.1", roles=["management"]),
        host_pb2.Network(name="mig1", address="10.92.0.1", roles=["migration"]),
        host_pb2.Network(name="mig2", address="10.93.0.1", roles=["migration"]),
        host_pb2.Network(name="odd", address="nonsense"),
    ]
    interfaces = [interface("eth1", "10.92.0.1/24")]
    assert effective(own, [], interfaces) == own
    by_range = effective(own, [network("acme", "10.92.0.0/24", tenants=["acme"])], interfaces)
    assert [n.name for n in by_range] == ["acme", "mgmt", "mig2", "odd"]
    by_name = effective(own, [network("mig2", "10.99.0.0/24")], interfaces)
    assert [n.name for n in by_name] == ["mgmt", "mig1", "odd"]


def test_8_4_an_address_is_in_a_network_by_its_ranges() -> None:
    side = host_pb2.Network(name="mig", address="10.92.0.1", rules=rules("10.92.0.0/24"))
    assert is_in(side, MigrationUri.parse("tcp://10.92.0.9").host)
    assert not is_in(side, MigrationUri.parse("tcp://10.93.0.9").host)
    assert not is_in(host_pb2.Network(name="odd", address="nonsense"), MigrationUri.parse("tcp://10.93.0.9").host)
