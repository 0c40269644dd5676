"""agent.hypervisor.libvirt.connecting: a connection that nobody answers is seen, and ended, in this machine's own kernel."""

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
    """A port whose backlog is full: the kernel drops what asks for more."""
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
async def test_6_8_a_connection_that_nobody_answers_is_ended(address: str) -> None:
    with deaf(address) as (uri, port):
        told: list[int] = []

        def connect() -> None:
            with socket.socket(ADDRESSES[address]) as asking:
                asking.settimeout(None)
                told.append(asking.connect_ex((address, port)))

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
        assert told == [errno.ECONNABORTED]
        assert connecting.unanswered(uri) == []


def test_6_8_what_has_ended_by_itself_is_no_error() -> None:
    with deaf("127.0.0.1") as (uri, _):
        found = connecting.unanswered(uri)
    try:
        assert [connecting.end(connection) for connection in found] == [False] * len(found)
    except PermissionError:
        pytest.skip("this user may not end sockets")


@pytest.mark.parametrize("uri", ["", "tcp://h2:49152", "tcp://10.92.0.2", "unix:///run/x", "tcp://127.0.0.1:1"])
def test_6_8_no_other_uri_is_taken_for_one(uri: str) -> None:
    assert connecting.unanswered(uri) == []
