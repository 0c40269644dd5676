"""The libvirt driver on real libvirt and QEMU: the whole way, with every option, and while it runs."""

import asyncio
import os
from time import perf_counter

import pytest

from agent.hypervisor.base import DomainState, HypervisorError, Incompatible, Job
from agent.hypervisor.options import Options
from tests.kit.lab import Guest, Lab

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from tests.lab.libvirt.sides import SLOW, Side, Start, assert_perfect

# --- the whole way


async def test_there_and_back(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    arrived = await start().run()
    assert arrived.state is DomainState.RUNNING
    assert arrived.persistent
    assert await sides[0].state(guest) == ("absent", "")
    await start(back=True).run()
    assert await sides[0].state(guest) == ("running", "migrated")
    assert await sides[1].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_final_figures_tell_what_was_sent(start: Start) -> None:
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    final = (await migration.perform()).final
    assert final.total_bytes >= 64 << 20
    assert final.remaining_bytes == 0
    assert 0 < final.downtime < 1
    await armed


async def test_late_finish_with_the_cookie_of_perform(start: Start, guest: Guest) -> None:
    migration = start()
    await migration.prepare()
    performed = await migration.perform()
    finished = await migration.incoming.finish(migration.begun.domain_xml, performed.cookie, Options(), guest.name)
    await migration.outgoing.remove(finished.cookie, Options())
    assert_perfect(guest)


# --- options


async def test_user_paused_guest_stays_paused(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    lab["h1"].virsh("suspend", guest.name)
    arrived = await start().run()
    assert arrived.state is DomainState.PAUSED
    lab["h2"].virsh("resume", guest.name)
    guest.wait_lines(5)
    assert_perfect(guest)


@pytest.mark.parametrize("back", ["confirm", "fresh"])
async def test_user_paused_guest_stays_paused_when_resumed(
    back: str, start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest
) -> None:
    lab["h1"].virsh("suspend", guest.name)
    migration = start()
    await migration.prepare()
    await migration.perform()
    await migration.incoming.abandon()
    if back == "fresh":
        await migration.outgoing.close()
        migration.outgoing = sides[0].driver.outgoing(str(guest.stable_uuid))
    await migration.outgoing.resume()
    assert (await sides[0].state(guest))[0] == "paused"
    lab["h1"].virsh("resume", guest.name)
    assert_perfect(guest)


@pytest.mark.parametrize(
    ("option", "source", "destination"),
    [
        (Options(paused=True), ("absent", ""), ("paused", "user")),
        (Options(live=False), ("absent", ""), ("running", "migrated")),
        (Options(undefine_source=False), ("shutoff", "migrated"), ("running", "migrated")),
        (Options(persist_destination=False), ("absent", ""), ("running", "migrated")),
        (Options(auto_converge=True, abort_on_error=True, unsafe=True), ("absent", ""), ("running", "migrated")),
        (Options(change_protection=False, post_copy=False), ("absent", ""), ("running", "migrated")),
    ],
    ids=["paused", "not-live", "keep-source", "transient", "converge", "no-protection"],
)
async def test_options(
    option: Options, source: object, destination: object, start: Start, sides: tuple[Side, Side], guest: Guest
) -> None:
    arrived = await start(option).run()
    assert await sides[0].state(guest) == source
    assert await sides[1].state(guest) == destination
    assert arrived.persistent is (option.get("persist_destination") is not False)


async def test_renamed_on_arrival(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    arrived = await start(name="another-name").run()
    assert arrived.name == "another-name"
    assert await sides[0].state(guest) == ("absent", "")


async def test_option_that_is_not_supported_is_refused(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    with pytest.raises(Incompatible, match="rdma"):
        await start(Options(rdma=True)).prepare()
    assert (await sides[0].driver.get_named(guest.name)).job is Job.NONE


async def test_limit_that_cannot_be_enforced_is_refused(start: Start) -> None:
    migration = start(bandwidth=1000)
    await migration.prepare()
    with pytest.raises(Incompatible, match="1000"):
        await migration.perform()
    with pytest.raises(Incompatible):
        await migration.outgoing.set_bandwidth(1000)


# --- while it runs


async def test_progress_and_bandwidth_while_it_runs(start: Start, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    assert await migration.outgoing.progress() is None
    await migration.prepare()
    assert await migration.outgoing.progress() is None
    armed, performing = migration.arm(), migration.perform()
    await asyncio.sleep(0)  # Perform is on its way
    await migration.outgoing.set_bandwidth(SLOW)  # at once: it waits for the transfer rather than get lost
    await migration.flowing(4 << 20)
    reading = await migration.outgoing.progress()
    assert reading is not None
    assert reading.total_bytes >= 64 << 20
    assert 0 < reading.remaining_bytes < reading.total_bytes
    assert 0 < reading.rate < 1.3 * SLOW
    began = perf_counter()
    await migration.outgoing.set_bandwidth(0)
    await performing
    assert perf_counter() - began < 6  # at 8 MiB/s it would have lasted 7 s
    assert await migration.outgoing.progress() is None
    await migration.outgoing.remove((await armed).cookie, Options())
    assert_perfect(guest)


async def test_bandwidth_without_a_transfer_is_an_error(start: Start) -> None:
    migration = start()
    with pytest.raises(HypervisorError, match="no transfer"):
        await migration.outgoing.set_bandwidth(SLOW)
    await migration.prepare()
    with pytest.raises(HypervisorError, match="no transfer"):
        await migration.outgoing.set_bandwidth(SLOW)
