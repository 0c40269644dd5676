"""The state file of the simulated hypervisor, by which guests outlive its process."""

import asyncio
from pathlib import Path

from agent.hypervisor.options import Options
from agent.hypervisor.sim import SimConfig, SimHypervisor
from tests.unit.test_sim_migration import UUID, Move, facts, host, lines_of, state_text, until, web


async def writes(log: Path, more: int) -> None:
    """Wait until the guest has written so many more lines."""

    before = await lines_of(log)
    await until(lambda: lines_of(log), lambda now: now >= before + more)


async def test_guests_outlive_the_process_by_the_state_file(tmp_path: Path) -> None:
    log, state = tmp_path / "web.log", str(tmp_path / "state")
    config = SimConfig(host_uuid="a", guests=(web(log=str(log)),), log_root=str(tmp_path), state_path=state)
    first = SimHypervisor(config)
    await first.open()
    await writes(log, 2)
    for task in first._host._tasks:  # as if the process were killed here, without a shutdown
        task.cancel()
    await asyncio.sleep(0)
    second = SimHypervisor(config)
    await second.open()
    await writes(log, 2)
    assert state_text(await facts(second)) == "running (booted)"
    await second.close()
    numbers = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("S ")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 4


async def test_a_guest_paused_by_a_migration_stays_paused_after_a_restart(tmp_path: Path) -> None:
    state = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    async with host("b", state_path=state["b"]) as b:
        async with host("a", web(), state_path=state["a"]) as a:
            move = Move(a, b)
            await move.prepare()
            await move.perform()
        await move.finish()
        async with host("a", web(), state_path=state["a"]) as a:
            assert state_text(await facts(a)) == "paused (migration)"
            await a.outgoing(UUID).remove(b"", Options())
        async with host("a", web(), state_path=state["a"]) as a:
            assert await a.list_domains() == []
