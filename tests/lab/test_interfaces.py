"""The watch of a host's interfaces (rtnetlink) on a real kernel: changes come at once, and notices that are lost are made up for."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.kit.lab import Lab
from tests.transcript import ROOT

WATCH = """
import asyncio, json, socket, subprocess, sys, time, warnings
warnings.simplefilter("error")
from agent.network import rtnetlink

LOST = 0

class Small(socket.socket):
    # A buffer that holds a few notices only, and a count of the losses.
    def bind(self, address):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        super().bind(address)

    def recv(self, size):
        global LOST
        try:
            return super().recv(size)
        except BlockingIOError:
            raise
        except OSError:
            LOST += 1
            raise

def ip(*commands):
    subprocess.run(["ip", "-batch", "-"], input="\\n".join(commands), text=True, check=True)

async def until(watch, true):
    began = time.monotonic()
    while True:
        seen = {i.name: i for i in await anext(watch)}
        if true(seen):
            return time.monotonic() - began

async def main():
    rtnetlink.socket.socket = Small if sys.argv[1] == "small" else socket.socket
    watch = rtnetlink.watch_interfaces()
    first = {i.name: i for i in await anext(watch)}
    said = {"names": sorted(first), "mig1": [list(first["mig1"].addresses), first["mig1"].up, first["mig1"].line_bytes_per_second]}
    ip("link set mig1 down")
    said["down"] = await until(watch, lambda seen: "mig1" in seen and not seen["mig1"].up)
    ip("link set mig1 up", "link set mig1 mtu 1400")
    said["up"] = await until(watch, lambda seen: seen["mig1"].up and seen["mig1"].mtu == 1400)
    many = [f"addr add 10.77.0.{n}/32 dev mig1" for n in range(1, 200)]
    ip(*many, *(each.replace("addr add", "addr del") for each in many), "addr add 10.78.0.1/24 dev mig1")
    said["many"] = await until(watch, lambda seen: "10.78.0.1/24" in seen["mig1"].addresses)
    ip("link del mig1")
    said["gone"] = await until(watch, lambda seen: "mig1" not in seen)
    said["lost"] = LOST
    await watch.aclose()
    print(json.dumps(said))

asyncio.run(main())
"""


@pytest.fixture(name="lab", scope="module")
def _lab(_real_hosts: None) -> Iterator[Lab]:
    with Lab.up(f"if{os.getpid()}", hosts=3, migration_networks=1) as lab:
        yield lab


@pytest.mark.parametrize(("host", "buffer"), [("h1", "whole"), ("h2", "small")])
def test_8_4_changes_of_interfaces_are_seen_at_once_whatever_notices_are_lost(lab: Lab, host: str, buffer: str) -> None:
    command = lab[host].inside([sys.executable, "-X", "dev", "-c", WATCH, buffer], cwd=ROOT)
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    number = host.removeprefix("h")
    assert said["names"] == ["mgmt", "mig1"]
    assert said["mig1"] == [[f"10.92.0.{number}/24", f"fd00:92::{number}/64"], True, 1_250_000_000]
    assert max(said[change] for change in ("down", "up", "gone")) < 1.0, said
    assert (said["lost"] > 0) == (buffer == "small")
    assert "Warning" not in done.stderr


FLOATING = """
import subprocess
from agent.network.rtnetlink import read_interfaces
from agent.network.rules import on_network
from drover.agent.v1 import host_pb2

for address in ("10.92.0.100/24", "10.92.0.1/32", "fd00:92::/128"):
    subprocess.run(["ip", "addr", "add", address, "dev", "mig1"], check=True)
rules = host_pb2.NetworkRules(cidrs=["10.92.0.0/24", "fd00:92::/64"])
print(*(side.address for side in on_network(host_pb2.Network(name="mig1", rules=rules), read_interfaces())))
"""


def test_8_4_an_address_that_may_float_between_hosts_is_not_a_hosts_own_one(lab: Lab) -> None:
    command = lab["h3"].inside([sys.executable, "-c", FLOATING], cwd=ROOT)
    assert subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout.split() == [
        "10.92.0.3",
        "fd00:92::3",
    ]
