"""agent.hypervisor.sim.control: users of simulated guests act on them from outside the agent's process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.hypervisor.base import DomainNotFound, DomainState, HypervisorError
from agent.hypervisor.sim import SimHypervisor
from agent.hypervisor.sim.config import SimConfig
from agent.hypervisor.sim.control import ask
from tests.unit.test_sim_migration import UUID, Move, host, slow

WEB = {"name": "web", "uuid": UUID}


@pytest.fixture(name="control")
async def _control(tmp_path: Path) -> AsyncIterator[tuple[SimHypervisor, Path]]:
    path = tmp_path / "h1.sim"
    made = SimHypervisor(SimConfig(host_uuid="a", control_path=str(path)))
    await made.open()
    yield made, path
    await made.close()


async def asked(path: Path, request: dict[str, Any]) -> None:
    await asyncio.to_thread(ask, path, request)


async def test_a_guest_is_started_and_ended_and_started_anew(control: tuple[SimHypervisor, Path]) -> None:
    host, path = control
    for _ in range(2):
        await asked(path, {"start": WEB})
        assert (await host.get_domain(UUID)).state is DomainState.RUNNING
        await asked(path, {"end": UUID})
        with pytest.raises(DomainNotFound):
            await host.get_domain(UUID)
    await asked(path, {"end": UUID})


@pytest.mark.parametrize("request_", [{"start": WEB}, {"start": {"name": "../x"}}, {"stop": UUID}])
async def test_a_failed_request_gets_the_reason(control: tuple[SimHypervisor, Path], request_: dict[str, Any]) -> None:
    _, path = control
    await asked(path, {"start": WEB})
    with pytest.raises(RuntimeError, match=r"h1\.sim: .{10}"):
        await asked(path, request_)


async def test_a_guest_that_is_ended_during_its_migration_is_on_no_host() -> None:
    async with host("a", slow()) as a, host("b") as b:
        move = Move(a, b)
        await move.prepare()
        performing = move.perform()
        await move.flow()
        await a._host.end(UUID)
        with pytest.raises(HypervisorError):
            await performing
        await b._host.end(UUID)
        assert [await a.list_domains(), await b.list_domains()] == [[], []]


async def test_6_2_a_saved_memory_image_waits_for_the_next_start(control: tuple[SimHypervisor, Path]) -> None:
    host, path = control
    await asked(path, {"start": WEB})
    await asked(path, {"save": UUID})
    saved = await host.get_domain(UUID)
    assert (saved.state, saved.reason, saved.saved_image) == (DomainState.SHUTOFF, "saved", True)
    host.start(UUID)
    assert not (await host.get_domain(UUID)).saved_image
