"""agent.network.uri: the parser of migration URIs, and their normal form."""

from contextlib import suppress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.network.uri import MigrationUri, same_address


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("tcp://127.0.0.1:49152", "tcp://127.0.0.1:49152"),
        ("tcp://10.0.0.1", "tcp://10.0.0.1"),
        ("tcp://10.0.0.1/", "tcp://10.0.0.1"),
        ("tcp://10.0.0.1:", "tcp://10.0.0.1"),
        ("TCP://10.0.0.1:49152/", "tcp://10.0.0.1:49152"),
        ("tcp://[fd00::1]:49152", "tcp://[fd00::1]:49152"),
        ("tcp://[FD00:0::1]:49152", "tcp://[fd00::1]:49152"),
        ("tcp://[fd00:0000:0:0:0:0:0:1]/", "tcp://[fd00::1]"),
        ("rdma://[fe80::1%eth0]:49152", "rdma://[fe80::1%eth0]:49152"),
    ],
)
def test_6_18_every_spelling_has_one_normal_form(text: str, normal: str) -> None:
    assert str(MigrationUri.parse(text)) == normal
    assert MigrationUri.parse(normal) == MigrationUri.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "tcp:127.0.0.1:1",
        "://127.0.0.1",
        "exec:rm",
        "unix:///tmp/x",
        "tcp://host.example:1",
        "tcp://127.0.0.1:0x10",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:+1",
        "tcp://127.0.0.01:1",
        "tcp://127.1:1",
        "tcp://fd00::1:49152",
        "tcp://[127.0.0.1]:1",
        "tcp://[fd00::1",
        "tcp://[fd00::1%25eth0%x]:1",
        "tcp://u@127.0.0.1:1",
        "tcp://127.0.0.1:1/x",
        "tcp://127.0.0.1:1//",
        "tcp://127.0.0.1?x=1",
        "tcp://127.0.0.1#x",
        "tcp://127.0.0.1:1\n",
        " tcp://127.0.0.1:1",
        "tcp://१२७.0.0.1:1",
        "tcp://" + "1" * 2000,
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".{10}"):
        MigrationUri.parse(text)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    for uri in (text, "tcp://" + text, f"tcp://[{text}]:1"):
        with suppress(ValueError):
            read = MigrationUri.parse(uri)
            assert MigrationUri.parse(str(read)) == read


@given(st.ip_addresses(), st.integers(1, 65535))
def test_6_18_every_address_reads_as_it_is_written(address: object, port: int) -> None:
    uri = MigrationUri("tcp", address, port)  # type: ignore[arg-type]
    assert MigrationUri.parse(str(uri)) == uri


def test_6_18_addresses_are_compared_as_addresses() -> None:
    assert same_address("FD92:0::2", ip_address("fd92::2"))
    assert not same_address("fd92::3", ip_address("fd92::2"))
    assert not same_address("banana", ip_address("fd92::2"))
