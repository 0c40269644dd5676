"""Limits of a transfer on real libvirt and QEMU, measured as bytes of the source's interface. As root, for post-copy."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.hypervisor.base import HypervisorError
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import Side, Start, assert_perfect

MIB = 1 << 20
OVERHEAD = 1.03
"""Bytes of the interface for each byte of the stream: headers of TCP, IP and Ethernet."""
RAISED = 1.1
"""QEMU counts in windows of 0.1 s, and sends one such window at once when a limit is raised: 1.1 times the limit in that second."""


class Meter:
    """Samples the bytes that a host has sent on a network, every 20 ms."""

    def __init__(self, pid: int, network: str) -> None:
        self._path = Path(f"/proc/{pid}/net/dev")
        self._label = f"{network}:"
        self._samples: list[tuple[float, int]] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            asked = time.monotonic()
            line = next(line for line in self._path.read_text().splitlines() if line.strip().startswith(self._label))
            if time.monotonic() - asked <= 0.01:  # else other work came between: the moment of the bytes is not known
                self._samples.append((asked, int(line.split(":")[1].split()[8])))
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def most(self, seconds: float) -> float:
        """Measure for some seconds from now on; return the most bytes of the stream within any second of them."""
        since = time.monotonic()
        await asyncio.sleep(seconds)
        rows = [(at, sent) for at, sent in self._samples if at >= since]
        assert rows[-1][0] - rows[0][0] > 1, "less than a second was measured"
        return max(max(then - sent for later, then in rows if later <= at + 1) for at, sent in rows) / OVERHEAD


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.up(f"lvl{os.getpid() % 1_000_000}", hosts=2, setting="root") as up:
        yield up


@pytest.fixture
async def meter(lab: Lab) -> AsyncIterator[Meter]:
    made = Meter(lab["h1"].init_pid or 0, "mig1")
    yield made
    await made.close()


@pytest.fixture
def guest(lab: Lab, sides: tuple[Side, Side], request: pytest.FixtureRequest) -> Guest:
    """A guest that has enough memory for some seconds of measuring, and writes to it."""
    made = lab.guest(request.node.name.removeprefix("test_")[:60], memory_mib=128, dirty=500)
    lab["h1"].start(made, persistent=True)
    made.wait_lines(5)
    return made


async def test_8_7_a_limit_holds_over_any_second(start: Start, meter: Meter, guest: Guest) -> None:
    migration = start(bandwidth=8 * MIB)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    assert 7 * MIB < await meter.most(2.0) <= 8 * MIB
    assert await migration.outgoing.set_bandwidth(24 * MIB) == 24 * MIB
    assert 22 * MIB < await meter.most(1.5) <= RAISED * 24 * MIB
    assert await migration.outgoing.set_bandwidth(4 * MIB + 1) == 4 * MIB
    assert 3 * MIB < await meter.most(2.0) <= 4 * MIB
    assert await migration.outgoing.set_bandwidth(0) == 0
    began = time.monotonic()
    await performing
    assert time.monotonic() - began < 5
    await migration.outgoing.remove((await armed).cookie, Options())
    assert_perfect(guest)


async def test_8_7_a_limit_holds_in_post_copy_and_can_be_changed_there(start: Start, meter: Meter, guest: Guest) -> None:
    migration = start(bandwidth=16 * MIB)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    assert await migration.outgoing.set_bandwidth(8 * MIB) == 8 * MIB  # before the switch: it must hold after it, too
    switched = asyncio.create_task(migration.outgoing.start_postcopy())
    assert 6 * MIB < await meter.most(2.5) <= 1.05 * 8 * MIB  # the second of the switch is among them
    await switched
    reading = await migration.outgoing.progress()
    assert reading is not None
    assert reading.postcopy
    assert await migration.outgoing.set_bandwidth(12 * MIB) == 12 * MIB
    assert 10 * MIB < await meter.most(1.5) <= RAISED * 12 * MIB
    assert await migration.outgoing.set_bandwidth(0) == 0
    await performing
    await migration.outgoing.remove((await armed).cookie, Options())
    assert_perfect(guest)


async def test_8_7_no_limit_is_none_whatever_was_set_before(start: Start, lab: Lab, guest: Guest) -> None:
    for post_copy in ((), ("--postcopy",)):
        lab["h1"].virsh("migrate-setspeed", guest.name, "2", *post_copy)
    migration = start()
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    async with asyncio.timeout(15):  # at 2 MiB/s it lasts a minute
        await performing
        await migration.outgoing.remove((await armed).cookie, Options())
    assert_perfect(guest)


async def test_8_7_the_longest_pause_is_set_before_the_first_pass_and_set_back_after_a_failure(
    start: Start, lab: Lab, guest: Guest
) -> None:
    migration = start(bandwidth=8 * MIB)
    migration.max_downtime = 0.04
    await migration.prepare()
    migration.arm()
    performing = migration.perform()
    await migration.flowing()
    assert lab["h1"].virsh("migrate-getmaxdowntime", guest.name).strip() == "40"
    assert await migration.outgoing.set_max_downtime(0.25) == 0.25
    assert lab["h1"].virsh("migrate-getmaxdowntime", guest.name).strip() == "250"
    await migration.outgoing.abort()
    with pytest.raises(HypervisorError):
        await performing
    assert lab["h1"].virsh("migrate-getmaxdowntime", guest.name).strip() == "300"
