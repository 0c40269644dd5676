"""The lab's paths: IPv6, MTUs, switches that swallow big packets, closed ports, pulled cables."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kit.lab import Lab, LabError

pytestmark = pytest.mark.timeout(40)

SERVER = """
import socket, sys
address = sys.argv[1]
server = socket.create_server((address, 50000), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
print("ready", flush=True)
while True:
    peer, _ = server.accept()
    with peer:
        if peer.recv(40000, socket.MSG_WAITALL):
            peer.sendall(bytes(40000))
"""

CLIENT = """
import socket, struct, sys
with socket.create_connection((sys.argv[1], 50000), timeout=0.7) as peer:
    peer.sendall(bytes(40000))
    left = 40000
    while left:  # a socket with a timeout does not block, so MSG_WAITALL would not wait
        got = len(peer.recv(left))
        assert got
        left -= got
    print(struct.unpack_from("I", peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 16)[0])
"""
"""Prints how many bytes one segment has."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.up(f"p{os.getpid()}") as lab:
        yield lab


@contextmanager
def serving(lab: Lab, address: str) -> Iterator[None]:
    with lab["h2"].popen([sys.executable, "-c", SERVER, address], stdout=-1) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()


@pytest.fixture(params=[4, 6])
def address(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    address = (lab["h2"].addresses if request.param == 4 else lab["h2"].addresses6)["mig1"]
    with serving(lab, address):
        yield address


def ask(lab: Lab, address: str) -> int | str:
    """Exchange 40 kB from h1. Return the bytes of a segment, or the name of the error."""
    try:
        return int(lab["h1"].exec([sys.executable, "-c", CLIENT, address]))
    except LabError as error:
        return next(name for name in ("TimeoutError", "ConnectionRefusedError", "OSError") if name in str(error))


def test_8_5_a_switch_that_swallows_big_packets(lab: Lab, address: str) -> None:
    h1, h2, headers = lab["h1"], lab["h2"], 72 if ":" in address else 52
    assert ask(lab, address) == 1500 - headers
    for host in (h1, h2):
        host.set_mtu("mig1", 9000)
    assert ask(lab, address) == 9000 - headers
    for direction in ("in", "out"):
        h2.swallow_big_packets("mig1", 1500, direction)
        assert ask(lab, address) == "TimeoutError"
        h2.swallow_big_packets("mig1", None, direction)
    h2.swallow_big_packets("mig1", 1500)
    h1.set_mtu("mig1", 1500)
    assert ask(lab, address) == 1500 - headers
    h2.swallow_big_packets("mig1", None)
    h2.set_mtu("mig1", 1500)


def test_8_5_a_firewall_that_closes_a_range(lab: Lab, address: str) -> None:
    for verdict, found in (("drop", "TimeoutError"), ("reject with tcp reset", "ConnectionRefusedError")):
        lab["h2"].close_ports("mig1", 49990, 50010, verdict)
        assert ask(lab, address) == found
    lab["h2"].close_ports("mig1", 50001, 50010)
    assert isinstance(ask(lab, address), int)
    lab["h2"].close_ports("mig1", 0, 0, None)


def test_8_5_a_pulled_cable_is_seen_and_keeps_the_addresses(lab: Lab, address: str) -> None:
    h2 = lab["h2"]
    h2.set_link("mig1", up=False)
    assert "NO-CARRIER" in h2.exec(["ip", "link", "show", "mig1"])
    assert isinstance(ask(lab, address), str)
    h2.set_link("mig1", up=True)
    assert isinstance(ask(lab, address), int)
