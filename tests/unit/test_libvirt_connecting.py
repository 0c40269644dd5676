"""agent.hypervisor.libvirt.connecting: an unanswered connection is found and ended in this machine's own kernel."""

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator

import pytest

from agent.hypervisor.libvirt import connecting
from tests.unit.asking import until

ADDRESSES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


@contextlib.contextmanager
def deaf(address: str) -> Iterator[tuple[str, int]]:
    """Open a port whose backlog is full: the kernel drops further connection requests."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(ADDRESSES[address]))
        listener.bind((address, 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        uri = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
        while not connecting.unanswered(uri):
            asking = stack.enter_context(socket.socket(ADDRESSES[address]))
            asking.setblocking(False)
            asking.connect_ex((address, port))
        yield uri, port


@pytest.mark.parametrize("address", ADDRESSES)
async def test_6_8_an_unanswered_connection_is_ended(address: str) -> None:
    with deaf(address) as (uri, port):
        results: list[int] = []

        def connect() -> None:
            with socket.socket(ADDRESSES[address]) as asking:
                asking.settimeout(None)
                results.append(asking.connect_ex((address, port)))

        before = len(connecting.unanswered(uri))
        thread = threading.Thread(target=connect)
        thread.start()
        await until(lambda: len(connecting.unanswered(uri)) > before)
        try:
            ended = [connecting.end(connection) for connection in connecting.unanswered(uri)]
        except PermissionError:
            pytest.skip("this user may not end sockets")
        assert all(ended)
        await until(lambda: not thread.is_alive())
        assert results == [errno.ECONNABORTED]
        assert connecting.unanswered(uri) == []


def test_6_8_a_connection_that_has_ended_is_no_error() -> None:
    with deaf("127.0.0.1") as (uri, _):
        found = connecting.unanswered(uri)
    try:
        assert [connecting.end(connection) for connection in found] == [False] * len(found)
    except PermissionError:
        pytest.skip("this user may not end sockets")


@pytest.mark.parametrize("uri", ["", "tcp://h2:49152", "tcp://10.92.0.2", "unix:///run/x", "tcp://127.0.0.1:1"])
def test_6_8_other_uris_have_no_unanswered_connection(uri: str) -> None:
    assert connecting.unanswered(uri) == []
