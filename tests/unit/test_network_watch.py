"""A host's interfaces are read from the kernel or the simulation, and its networks follow their changes."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_interface
from pathlib import Path

import pytest

from agent.config import NetworkConfig
from agent.hypervisor.sim import SimHypervisor
from agent.hypervisor.sim.config import SimConfig, SimInterface
from agent.hypervisor.sim.control import ask
from agent.network.rtnetlink import read_interfaces, watch_interfaces
from agent.runtime.supervision import supervise
from agent.service.host import AgentHost
from drover.agent.v1 import host_pb2
from tests.unit.two_agents import Pair

Interfaces = tuple[host_pb2.Interface, ...]


async def test_8_4_the_kernels_interfaces_are_read_without_loopback() -> None:
    watch = watch_interfaces()
    interfaces = await anext(watch)
    assert "lo" not in [interface.name for interface in interfaces]
    for interface in interfaces:
        assert interface.mtu >= 68
        for address in map(ip_interface, interface.addresses):
            assert not address.is_loopback
            assert address.version == 4 or not address.is_link_local
    assert interfaces == await asyncio.to_thread(read_interfaces)
    reading = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()


def interface(name: str, *addresses: str, up: bool = True) -> host_pb2.Interface:
    return host_pb2.Interface(name=name, addresses=addresses, up=up, mtu=1500)


async def test_8_4_a_hosts_networks_follow_its_interfaces(pair: Pair) -> None:
    readings: asyncio.Queue[Interfaces] = asyncio.Queue()

    async def watch() -> AsyncIterator[Interfaces]:
        while True:
            yield await readings.get()

    configs = [
        NetworkConfig(name="mig", cidrs=("10.92.0.0/24", "fd00:92::/64"), tenants=("acme",)),
        NetworkConfig(name="mgmt", address="10.91.0.1", roles=("management",)),
    ]
    engine = pair.source.engine
    info = await pair.source.hypervisor.info()
    networks = [(config.definition(), config.address) for config in configs]
    host = AgentHost(info, pair.source.hypervisor, engine, pair.source.bus, networks)
    following = supervise("watch interfaces", lambda: host.follow(watch))
    readings.put_nowait(())
    await host.followed()
    changes = host.watch()

    async def after(*interfaces: host_pb2.Interface) -> list[tuple[str, str, bool]]:
        readings.put_nowait(interfaces)
        seen = await anext(changes)
        while seen.interfaces != list(interfaces):
            seen = await anext(changes)
        return [(network.name, network.address, network.down) for network in seen.networks]

    assert await after() == [("mgmt", "10.91.0.1", True)]
    both = interface("eth0", "10.91.0.1/24"), interface("eth1", "10.92.0.1/24", "fd00:92::1/64")
    assert await after(*both) == [("mig", "10.92.0.1", False), ("mig", "fd00:92::1", False), ("mgmt", "10.91.0.1", False)]
    assert list(engine.host.networks[0].rules.tenants) == ["acme"]
    down = interface("eth1", "10.92.0.1/24", up=False)
    assert await after(both[0], down) == [("mig", "10.92.0.1", True), ("mgmt", "10.91.0.1", False)]
    assert await after(both[0]) == [("mgmt", "10.91.0.1", False)]
    await changes.aclose()
    following.cancel()
    await asyncio.wait([following])


async def test_8_4_a_simulated_link_goes_down_by_its_control_socket(tmp_path: Path) -> None:
    control = tmp_path / "h1.sim"
    interfaces = (SimInterface(name="mig1", addresses=("127.92.0.1/24",), mtu=9000), SimInterface(name="bare"))
    simulated = SimHypervisor(SimConfig(host_uuid="a", control_path=str(control), interfaces=interfaces))
    await simulated.open()
    watch = simulated.watch_interfaces()
    [first] = await anext(watch)
    assert (first.name, list(first.addresses), first.mtu, first.up) == ("mig1", ["127.92.0.1/24"], 9000, True)
    await asyncio.to_thread(ask, control, {"links": {"mig1": False}})
    [second] = await anext(watch)
    assert not second.up
    with pytest.raises(RuntimeError, match="no interface 'mig7'; there are mig1, bare"):
        await asyncio.to_thread(ask, control, {"links": {"mig7": False}})
    await simulated.close()
