"""Two test hosts with a driver each, and a guest on the first. Imports the driver late: where libvirt-python is missing, the tests
are skipped with that reason."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.lab.libvirt.sides import Migration, Side, Start


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.up(f"lvd{os.getpid() % 1_000_000}", hosts=2) as up:
        yield up


@pytest.fixture
async def sides(lab: Lab) -> AsyncIterator[tuple[Side, Side]]:
    from agent.hypervisor.libvirt import LibvirtHypervisor  # noqa: PLC0415
    from tests.lab.libvirt.sides import Side  # noqa: PLC0415

    async with AsyncExitStack() as stack:
        both = []
        for name in ("h1", "h2"):
            driver = LibvirtHypervisor(lab[name].libvirt_uri, call_timeout=10)
            await driver.open()
            stack.push_async_callback(driver.close)
            both.append(Side(lab, name, driver))
        try:
            yield both[0], both[1]
        finally:
            for host in lab:
                await asyncio.to_thread(host.start_libvirtd)
                await asyncio.to_thread(host.destroy_all)


@pytest.fixture
def guest(lab: Lab, sides: tuple[Side, Side], request: pytest.FixtureRequest) -> Guest:
    """A running guest on h1, with a definition."""
    made = lab.guest(request.node.name.removeprefix("test_")[:60].replace("[", "-").rstrip("]"), memory_mib=64)
    lab["h1"].start(made, persistent=True)
    made.wait_lines(5)
    return made


@pytest.fixture
async def start(lab: Lab, sides: tuple[Side, Side], guest: Guest) -> AsyncIterator[Start]:
    """Makes migrations of the guest from h1 to h2, and ends them."""
    from tests.lab.libvirt.sides import Migration  # noqa: PLC0415

    made: list[Migration] = []

    def make(
        options: Options | None = None, bandwidth: int = 0, back: bool = False, name: str = "", guest: Guest = guest
    ) -> Migration:
        source, destination = sides[::-1] if back else sides
        options = options or Options()
        if not lab.setting.has_post_copy:  # as planning does, which the driver trusts
            options = {"post_copy": False, **options}
        made.append(Migration(source, destination, guest, options, bandwidth, name))
        return made[-1]

    yield make
    for migration in made:
        await migration.close()
