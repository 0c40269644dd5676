"""The simulator stores and forgets the same as libvirt: stored definitions, autostart, a pause by the guest's user."""

import asyncio
from dataclasses import replace

import pytest

from agent.hypervisor.base import DomainBusy, DomainState
from agent.hypervisor.options import Options
from agent.hypervisor.sim import SimGuest, SimHypervisor
from agent.hypervisor.sim.definition import Definition
from tests.unit.test_sim_migration import UUID, Move, host, slow, web


async def move(a: SimHypervisor, b: SimHypervisor, **changes: object) -> Move:
    """Run a whole migration, including what is stored of the guest."""
    made = replace(Move(a, b), **changes)  # type: ignore[arg-type]
    stored = await a.stored(UUID)
    await made.prepare()
    finishing = asyncio.create_task(made.into.finish(made.begun.domain_xml, b"", made.options, made.name, stored))
    await made.perform()
    await made.out.remove((await finishing).cookie, made.options)
    return made


@pytest.mark.parametrize("name", ["", "renamed"])
async def test_6_20_an_edit_for_the_next_boot_is_stored_under_the_new_name(name: str) -> None:
    async with host("a", web()) as a, host("b") as b:
        a.redefine(UUID, "next boot")
        await move(a, b, name=name)
        stored = await b.stored(UUID)
        assert stored is not None
        document = Definition.parse(stored.definition).guest
        assert (document.title, document.name) == ("next boot", name or "web")
        runs = await b.get_domain(UUID)
        assert (runs.state, runs.name) == (DomainState.RUNNING, name or "web")


@pytest.mark.parametrize(
    ("options", "persistent"),
    [(Options(), False), (Options(persist_destination=True), True), (Options(persist_destination=False), False)],
)
async def test_6_20_a_transient_guest_stays_transient_by_default(options: Options, persistent: bool) -> None:
    async with host("a", web(persistent=False)) as a, host("b") as b:
        assert await a.stored(UUID) is None
        await move(a, b, options=options)
        assert (await b.get_domain(UUID)).persistent is persistent


async def test_6_2_autostart_needs_a_definition_and_waits_for_the_job() -> None:
    async with host("a", web(persistent=False)) as a:
        await a.set_autostart(UUID, True)
        assert await a.stored(UUID) is None
    async with host("a", web(autostart=True)) as a, host("b") as b:
        begun = Move(a, b)
        await begun.prepare()
        with pytest.raises(DomainBusy):
            await a.set_autostart(UUID, False)


@pytest.mark.parametrize("guest", [slow()], ids=["slow"])
async def test_6_21_a_pause_by_the_user_is_reported_and_forgotten_as_in_libvirt(guest: SimGuest) -> None:
    async with host("a", guest) as a, host("b") as b:
        made = Move(a, b)
        await made.prepare()
        finishing, performing = made.finish(), made.perform()
        await made.flow()
        assert not made.out.paused_by_user
        a.pause(UUID)
        assert made.out.paused_by_user
        await made.out.abort()
        await asyncio.wait({finishing, performing})
        assert (await a.get_domain(UUID)).state is DomainState.RUNNING
        await a.suspend(UUID)
        assert (await a.get_domain(UUID)).reason == "user"
