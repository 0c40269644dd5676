"""agent.network.networks: which network carries a guest's memory, and which URIs are accepted."""

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.network.networks import Listen, check_destination_uri, common_network, listen_on, own_network, read_uri
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2

ADDRESSES = ("10.92.0.2", "192.168.7.2", "fd00:92::2")
NETWORKS = (
    host_pb2.Network(name="mgmt", address=ADDRESSES[1], roles=["management"]),
    host_pb2.Network(name="mig", address=ADDRESSES[0], roles=["migration"]),
    host_pb2.Network(name="mig6", address=ADDRESSES[2], roles=["migration", "management"]),
)
SOURCE = (
    host_pb2.Network(name="mig6", address="fd00:92::1", roles=["migration"]),
    host_pb2.Network(name="mgmt", address="192.168.7.1", roles=["management"]),
    host_pb2.Network(name="mig", address="10.92.0.1", roles=["migration"]),
)
FEATURES = options_pb2.MigrationFeatures(uri_transports=["tcp", "rdma"], first_port=49152, last_port=49215)
REFUSED = (Reason.URI_NOT_ALLOWED, Reason.INVALID_FIELD)

GOOD = ["tcp://10.92.0.2:49152", "rdma://10.92.0.2:49215", "tcp://[fd00:92::2]:49160", "tcp://192.168.7.2:49152"]
NOT_OURS = [
    "tcp://10.92.0.1:49152",  # the source itself
    "tcp://10.92.0.20:49152",
    "tcp://127.0.0.1:49152",
    "tcp://0.0.0.0:49152",
    "tcp://[::]:49152",
    "tcp://[::1]:49152",
    "tcp://[::ffff:10.92.0.2]:49152",
    "tcp://[fd00:92::2%25eth0]:49152",
    "tcp://h2:49152",
    "tcp://10.92.2:49152",
    "tcp://0x0a5c0002:49152",
    "tcp://10.92.0.02:49152",
    "tcp://10.92.0.2.evil.example:49152",
    "tcp://10.92.0.2@evil.example:49152",
    "tcp://evil.example#10.92.0.2:49152",
]
NOT_A_URI = [
    "",
    "tcp",
    "tcp:",
    "tcp://",
    "tcp:10.92.0.2:49152",
    "10.92.0.2:49152",
    "//10.92.0.2:49152",
    "tcp:///10.92.0.2",
    "tcp://10.92.0.2:port",
    "tcp://10.92.0.2:99999",
    "tcp://10.92.0.2:-1",
    "tcp://[10.92.0.2:49152",
    "tcp://user@10.92.0.2:49152",
    "tcp://user:word@10.92.0.2:49152",
    "tcp://10.92.0.2:49152/path",
    "tcp://10.92.0.2:49152?socket=/x",
    "tcp://10.92.0.2:49152#x",
    "unix:///run/x",
    "exec:touch /tmp/x",
    "fd://7",
    "qemu+ssh://10.92.0.2:49152",
    "http://10.92.0.2:49152",
]
NOT_CANONICAL = [
    "tcp://:word@10.92.0.2:49152",
    "tcp://@10.92.0.2:49152",
    "tcp://10.92.0.2:49\n152",
    "tcp://10.92.\t0.2:49152",
    " tcp://10.92.0.2:49152",
    "tcp://10.92.0.2:49152\r",
    "tcp://10.92.0.2:49152?",
    "tcp://10.92.0.2:49152#",
]
"""URIs that Python's parser accepts because it drops a part, while the hypervisor would get all of it."""


def refused(uri: str, named: str = "") -> None:
    with pytest.raises(DroverError) as in_:
        listen_on(NETWORKS, FEATURES, named, uri)
    assert in_.value.reason in REFUSED
    with pytest.raises(DroverError) as out:
        check_destination_uri(uri, NETWORKS, FEATURES)
    assert out.value.reason in REFUSED


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_first_common_network_with_the_role_on_both_by_the_destinations_order() -> None:
    chosen = common_network(SOURCE, NETWORKS, "")
    assert (chosen.name, chosen.address) == ("mig", "10.92.0.2")


def test_a_role_on_one_side_only_is_not_enough() -> None:
    source = [host_pb2.Network(name="mig", address="10.92.0.1"), SOURCE[0]]
    assert common_network(source, NETWORKS, "").name == "mig6"


def test_a_named_network_needs_no_role() -> None:
    assert common_network(SOURCE, NETWORKS, "mgmt").address == "192.168.7.2"


@pytest.mark.parametrize("named", ["", "storage"])
def test_no_common_network_says_what_each_host_has(named: str) -> None:
    with pytest.raises(DroverError) as error:
        common_network([host_pb2.Network(name="lan", address="10.0.0.1")], NETWORKS, named)
    assert error.value.reason is Reason.NETWORK_NOT_FOUND
    for part in ("lan (no role)", "mig (migration)", "mig6 (migration/management)", named):
        assert part in error.value.message
    with pytest.raises(DroverError, match="the source has none"):
        common_network([], NETWORKS, named)


def test_own_network() -> None:
    assert own_network(NETWORKS, "").name == "mig"
    assert own_network(NETWORKS, "mig6").address == "fd00:92::2"


# --- URIs -------------------------------------------------------------------------------------------------------------


def test_without_a_uri_the_destination_proposes_one_on_its_own_address() -> None:
    listen = listen_on(NETWORKS, FEATURES, "", "")
    assert (listen.network, listen.address, listen.uri) == ("mig", "10.92.0.2", "tcp://10.92.0.2")
    assert listen_on(NETWORKS, FEATURES, "mig6", "").uri == "tcp://[fd00:92::2]"


@pytest.mark.parametrize("uri", GOOD)
def test_a_uri_on_one_of_its_own_addresses(uri: str) -> None:
    listen = listen_on(NETWORKS, FEATURES, "", uri)
    assert listen.uri == uri
    assert listen.address in uri
    assert check_destination_uri(uri, NETWORKS, FEATURES) == uri


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("tcp://[FD00:92::2]:49160", "tcp://[fd00:92::2]:49160"),
        ("tcp://[fd00:92:0:0::2]:49160/", "tcp://[fd00:92::2]:49160"),
        ("tcp://10.92.0.2:49160/", "tcp://10.92.0.2:49160"),
        ("TCP://10.92.0.2:49160", "tcp://10.92.0.2:49160"),
    ],
)
def test_6_18_spellings_of_one_address_are_equal(uri: str, normal: str) -> None:
    assert listen_on(NETWORKS, FEATURES, "", uri).uri == normal
    assert check_destination_uri(uri, NETWORKS, FEATURES) == normal
    spelled = [host_pb2.Network(name="odd", address="FD00:92:0::0:2"), host_pb2.Network(name="mig", address="10.92.0.2")]
    assert listen_on(spelled, FEATURES, "", uri).uri == normal


def test_6_18_a_network_is_listened_on_in_the_normal_form() -> None:
    spelled = [host_pb2.Network(name="odd", address="FD00:92:0::0:2", roles=["migration"])]
    assert listen_on(spelled, FEATURES, "", "") == Listen("odd", "fd00:92::2", "tcp://[fd00:92::2]")


@pytest.mark.parametrize("uri", NOT_OURS + NOT_A_URI)
def test_any_other_uri_is_refused(uri: str) -> None:
    if uri:
        refused(uri)
    else:
        with pytest.raises(DroverError):
            check_destination_uri(uri, NETWORKS, FEATURES)


@pytest.mark.parametrize("uri", NOT_CANONICAL)
def test_nothing_is_left_out_when_a_uri_is_checked(uri: str) -> None:
    refused(uri)


@pytest.mark.parametrize("port", [1, 22, 49151, 49216, 65535])
def test_a_port_out_of_its_range(port: int) -> None:
    refused(f"tcp://10.92.0.2:{port}")


def test_the_port_may_be_left_to_the_destination_but_not_by_it() -> None:
    assert listen_on(NETWORKS, FEATURES, "", "tcp://10.92.0.2").address == "10.92.0.2"
    with pytest.raises(DroverError, match="port is outside"):
        check_destination_uri("tcp://10.92.0.2", NETWORKS, FEATURES)


def test_a_uri_on_another_network_than_was_asked_for() -> None:
    assert listen_on(NETWORKS, FEATURES, "mig", "tcp://10.92.0.2").network == "mig"
    with pytest.raises(DroverError, match="network mgmt was asked for"):
        listen_on(NETWORKS, FEATURES, "mgmt", "tcp://10.92.0.2")


def test_a_host_that_declares_no_transport_takes_no_uri() -> None:
    with pytest.raises(DroverError, match="declared: none"):
        read_uri("tcp://10.92.0.2", ())


_hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.sampled_from([*ADDRESSES[:2], f"[{ADDRESSES[2]}]", "localhost", "h2", ""]),
    st.text(max_size=20),
)
_uris = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["tcp://", "rdma://", "unix://", "tcp:", "TCP://", "", " tcp://"]),
    st.sampled_from(["", "", "", "user@", ":@", "10.92.0.2@"]),
    _hosts,
    st.one_of(st.just(""), st.integers(-1, 70000).map(":{}".format), st.sampled_from([":", ":x", ":49152"])),
    st.sampled_from(["", "", "", "/", "/x", "?x=1", "#x", "\n", "@10.92.0.2"]),
)


def taken(check: Callable[[], Listen | str]) -> Listen | str | bool:
    """Return the check's result; False if it raised one of a URI's errors."""
    try:
        return check()
    except DroverError as error:
        if error.reason not in (*REFUSED, Reason.NETWORK_NOT_FOUND):
            raise
        return False


@settings(max_examples=200)
@given(st.one_of(_uris, st.text(max_size=60)))
def test_whatever_is_taken_points_at_an_address_of_the_destination(uri: str) -> None:
    if not taken(lambda: check_destination_uri(uri, NETWORKS, FEATURES)):
        return
    scheme, rest = uri.split("://", 1)
    host, _, port = rest.rstrip("/").rpartition(":")
    assert scheme.lower() in FEATURES.uri_transports
    assert ipaddress.ip_address(host.strip("[]")) in [ipaddress.ip_address(address) for address in ADDRESSES]
    assert FEATURES.first_port <= int(port) <= FEATURES.last_port


@settings(max_examples=200)
@given(st.one_of(_uris, st.text(max_size=60)), st.sampled_from(["", "mig", "mgmt", "nowhere"]))
def test_whatever_is_listened_on_is_an_own_address(uri: str, named: str) -> None:
    listen = taken(lambda: listen_on(NETWORKS, FEATURES, named, uri))
    if not isinstance(listen, Listen):
        return
    assert listen.address in ADDRESSES
    assert listen.network == named or not named
