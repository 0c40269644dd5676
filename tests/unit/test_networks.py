"""agent.network.networks: which URIs are accepted, and where a destination listens."""

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.network.networks import check_destination_uri, listen_on, network_of, read_uri
from agent.network.uri import MigrationUri
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2

ADDRESSES = ("10.92.0.2", "192.168.7.2", "fd00:92::2")
NETWORKS = (
    host_pb2.Network(name="mgmt", address=ADDRESSES[1], roles=["management"]),
    host_pb2.Network(name="mig", address=ADDRESSES[0], roles=["migration"]),
    host_pb2.Network(name="mig6", address=ADDRESSES[2], roles=["migration", "management"]),
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


def check_any(uri: str) -> str:
    """Check a `uri_out` for the address that it names if the destination has that, else for another one."""
    chosen = next((address for address in ADDRESSES if address in uri), ADDRESSES[0])
    return check_destination_uri(uri, chosen, FEATURES)


def refused(uri: str, named: str = "") -> None:
    with pytest.raises(DroverError) as in_:
        listen_on(NETWORKS, FEATURES, named, uri)
    assert in_.value.reason in REFUSED
    with pytest.raises(DroverError) as out:
        check_any(uri)
    assert out.value.reason in REFUSED


# --- URIs -------------------------------------------------------------------------------------------------------------


def test_without_a_uri_the_destination_proposes_one_on_its_own_address() -> None:
    listen = listen_on(NETWORKS, FEATURES, "", "")
    assert (str(listen), listen.port) == ("tcp://10.92.0.2", 0)
    assert str(listen_on(NETWORKS, FEATURES, "mig6", "")) == "tcp://[fd00:92::2]"


@pytest.mark.parametrize("uri", GOOD)
def test_a_uri_on_one_of_its_own_addresses(uri: str) -> None:
    listen = listen_on(NETWORKS, FEATURES, "", uri)
    assert str(listen) == uri
    assert str(listen.host) in uri
    assert check_any(uri) == uri


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
    assert str(listen_on(NETWORKS, FEATURES, "", uri)) == normal
    address = "fd00:92::2" if "[" in uri else "10.92.0.2"
    assert check_destination_uri(uri, address, FEATURES) == normal
    spelled = [host_pb2.Network(name="odd", address="FD00:92:0::0:2"), host_pb2.Network(name="mig", address="10.92.0.2")]
    assert str(listen_on(spelled, FEATURES, "", uri)) == normal


def test_6_18_a_network_is_listened_on_in_the_normal_form() -> None:
    spelled = [host_pb2.Network(name="odd", address="FD00:92:0::0:2", roles=["migration"])]
    assert str(listen_on(spelled, FEATURES, "", "")) == "tcp://[fd00:92::2]"


@pytest.mark.parametrize("uri", NOT_OURS + NOT_A_URI)
def test_any_other_uri_is_refused(uri: str) -> None:
    if uri:
        refused(uri)
    else:
        with pytest.raises(DroverError):
            check_any(uri)


@pytest.mark.parametrize("uri", NOT_CANONICAL)
def test_nothing_is_left_out_when_a_uri_is_checked(uri: str) -> None:
    refused(uri)


@pytest.mark.parametrize("port", [1, 22, 49151, 49216, 65535])
def test_a_port_out_of_its_range(port: int) -> None:
    refused(f"tcp://10.92.0.2:{port}")


def test_the_port_may_be_left_to_the_destination_but_not_by_it() -> None:
    assert str(listen_on(NETWORKS, FEATURES, "", "tcp://10.92.0.2").host) == "10.92.0.2"
    with pytest.raises(DroverError, match="port is outside"):
        check_any("tcp://10.92.0.2")


def test_8_4_a_destination_listens_on_its_own_address_whatever_the_network_is_called() -> None:
    assert str(listen_on(NETWORKS, FEATURES, "fast", "tcp://10.92.0.2")) == "tcp://10.92.0.2"
    interfaces = [host_pb2.Interface(name="eth7", addresses=["10.97.0.2/24", "nonsense", "fd00:97::2/64"], up=True)]
    for uri in ("tcp://10.97.0.2", "tcp://[fd00:97::2]:49160"):
        assert str(listen_on((), FEATURES, "fast", uri, interfaces)) == uri
        with pytest.raises(DroverError, match="not an address of the destination"):
            listen_on(NETWORKS, FEATURES, "fast", uri)
    with pytest.raises(DroverError, match="not an address of the destination"):
        listen_on(NETWORKS, FEATURES, "", "tcp://10.97.0.3", interfaces)
    with pytest.raises(DroverError, match='this host has no network "fast"'):
        listen_on(NETWORKS, FEATURES, "fast", "")


def test_8_5_an_address_in_no_network_is_refused() -> None:
    host = host_pb2.Host(name="h2", interfaces=[host_pb2.Interface(name="eth7", addresses=["10.97.0.2/24", "10.92.0.9/24"])])
    host.networks.add(name="mig", address="10.92.0.2", rules=host_pb2.NetworkRules(cidrs=["10.92.0.0/24"]))
    assert network_of(read_uri("tcp://10.92.0.9", ["tcp"]), host).name == "mig"
    for uri, says in (("tcp://10.97.0.2", "in no network that h2 has"), ("tcp://10.92.0.8", "not an address of the destination")):
        with pytest.raises(DroverError, match=says) as error:
            network_of(read_uri(uri, ["tcp"]), host)
        assert error.value.reason is Reason.URI_NOT_ALLOWED


def test_8_4_the_destination_must_listen_on_the_address_that_was_chosen() -> None:
    with pytest.raises(DroverError, match="not the address of the destination that was chosen"):
        check_destination_uri("tcp://192.168.7.2:49152", "10.92.0.2", FEATURES)


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


def taken(check: Callable[[], MigrationUri | str]) -> MigrationUri | str | bool:
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
    if not taken(lambda: check_any(uri)):
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
    if not isinstance(listen, MigrationUri):
        return
    assert str(listen.host) in ADDRESSES
    assert str(listen.host) in str(listen)
