"""The libvirt driver on real libvirt and QEMU: every phase, every way to end early, every way to come back."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from time import perf_counter

import pytest

from agent.hypervisor.base import (
    Begun,
    Domain,
    DomainBusy,
    DomainNotFound,
    DomainState,
    Finished,
    HypervisorError,
    HypervisorUnavailable,
    Incoming,
    Incompatible,
    Job,
    Options,
    Outgoing,
    Performed,
    Prepared,
    TransferFailed,
)
from labkit import Guest, Lab
from labkit.guestlog import judge_file

if os.environ.get("CI") != "true":
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt import LibvirtHypervisor

SLOW = 8 << 20
"""Bytes per second at which the 64 MiB guest takes some 8 s: long enough to act while memory flows."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    missing = "root" if os.geteuid() != 0 else next((tool for tool in ("libvirtd", "virsh") if not shutil.which(tool)), "")
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"the lab needs {missing}")
    with Lab.up(f"lvd{os.getpid() % 1_000_000}", hosts=2) as up:
        yield up


@dataclass
class Side:
    """A host with its driver."""

    lab: Lab
    name: str
    driver: LibvirtHypervisor

    @property
    def address(self) -> str:
        return self.lab[self.name].addresses["mig1"]

    async def state(self, guest: Guest) -> tuple[str, str]:
        """The domain's state and reason; ("absent", "") when there is none."""
        try:
            domain = await self.driver.get_domain(str(guest.stable_uuid))
        except DomainNotFound:
            return "absent", ""
        return domain.state.value, domain.reason


@pytest.fixture
async def sides(lab: Lab) -> AsyncIterator[tuple[Side, Side]]:
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


def assert_perfect(guest: Guest) -> None:
    guest.wait_lines(20)
    verdict = judge_file(guest.serial_log)
    assert verdict.perfect, verdict.problems()


@dataclass
class Migration:
    """The phases with what each needs of the one before."""

    source: Side
    destination: Side
    guest: Guest
    options: Options = field(default_factory=Options)
    bandwidth: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        self.uuid = str(self.guest.stable_uuid)
        self.name = self.name or self.guest.name
        self.outgoing: Outgoing = self.source.driver.outgoing(self.uuid)
        self.incoming: Incoming = self.destination.driver.incoming(self.uuid)
        self.tasks: list[asyncio.Task[object]] = []

    async def prepare(self) -> None:
        self.begun: Begun = await self.outgoing.begin(self.options, self.name)
        self.prepared: Prepared = await self.incoming.prepare(
            self.begun.domain_xml, self.begun.cookie, self.options, self.name, self.destination.address, ""
        )

    def arm(self) -> "asyncio.Task[Finished]":
        task = asyncio.create_task(self.incoming.finish(self.begun.domain_xml, b"", self.options, self.name))
        self.tasks.append(task)
        return task

    def perform(self) -> "asyncio.Task[Performed]":
        prepared, begun = self.prepared, self.begun
        task = asyncio.create_task(
            self.outgoing.perform(prepared.uri, begun.domain_xml, prepared.cookie, self.options, self.name, self.bandwidth)
        )
        self.tasks.append(task)
        return task

    async def run(self) -> Domain:
        """All of it; the guest as it arrived."""
        await self.prepare()
        armed = self.arm()
        await self.perform()
        finished = await armed
        await self.outgoing.remove(finished.cookie, self.options)
        await self.close()
        return await self.destination.driver.get_domain(self.uuid)

    async def close(self) -> None:
        await self.outgoing.close()
        await self.incoming.close()
        for task in self.tasks:
            task.cancel()
            with suppress(HypervisorError, asyncio.CancelledError):
                await task

    async def flowing(self, at_least: int = 1 << 20) -> None:
        """Wait until so many bytes have been sent."""
        async with asyncio.timeout(10):
            while (reading := await self.outgoing.progress()) is None or reading.processed_bytes < at_least:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


Start = Callable[..., Migration]


@pytest.fixture
async def start(sides: tuple[Side, Side], guest: Guest) -> AsyncIterator[Start]:
    """Makes migrations of the guest from h1 to h2, and ends them."""
    made: list[Migration] = []

    def make(options: Options | None = None, bandwidth: int = 0, back: bool = False, name: str = "") -> Migration:
        source, destination = sides[::-1] if back else sides
        made.append(Migration(source, destination, guest, options or Options(), bandwidth, name))
        return made[-1]

    yield make
    for migration in made:
        await migration.close()


async def becomes(question: Callable[[], Awaitable[object]], wanted: object, within: float = 5.0) -> None:
    """Wait until a question about the hosts has this answer."""
    answer = None
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while (answer := await question()) != wanted:  # noqa: ASYNC110 - another process is asked
                await asyncio.sleep(0.02)
    assert answer == wanted


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


async def test_hypervisor_time_of_an_idle_guest(lab: Lab, sides: tuple[Side, Side]) -> None:
    """Begin 5 ms, Prepare 300 ms (QEMU starts), Perform 40 ms, Confirm 205 ms; bounds with room for a busy machine."""
    idle = lab.guest("idle", memory_mib=256, mem_mib=8)
    await asyncio.to_thread(lab["h1"].start, idle)
    await asyncio.to_thread(idle.wait_lines, 5)
    began = perf_counter()
    await Migration(sides[0], sides[1], idle).run()
    assert perf_counter() - began < 2.0


async def test_checks_before_a_migration_take_under_10_ms(sides: tuple[Side, Side], guest: Guest) -> None:
    _, needs = await sides[0].driver.describe(str(guest.stable_uuid))
    await sides[1].driver.incompatibilities(needs)
    times = []
    for _ in range(10):
        began = perf_counter()
        _, needs = await sides[0].driver.describe(str(guest.stable_uuid))
        assert await sides[1].driver.incompatibilities(needs) == []
        times.append(perf_counter() - began)
    assert sorted(times)[5] < 0.010


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
    assert arrived.persistent is (option.persist_destination is not False)


async def test_renamed_on_arrival(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    arrived = await start(name="another-name").run()
    assert arrived.name == "another-name"
    assert await sides[0].state(guest) == ("absent", "")


async def test_option_that_is_not_supported_is_refused(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    with pytest.raises(Incompatible, match="rdma"):
        await start(Options(rdma=True)).prepare()
    assert (await sides[0].driver.get_domain(guest.name)).job is Job.NONE


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
    assert reading.rate == pytest.approx(SLOW, rel=0.3)
    began = perf_counter()
    await migration.outgoing.set_bandwidth(0)
    await performing
    assert perf_counter() - began < 3  # at 8 MiB/s it would have lasted 7 s
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


async def test_postcopy(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    await becomes(lambda: sides[0].state(guest), ("paused", "post-copy"))
    domain = await sides[1].driver.get_domain(guest.name)
    assert domain.postcopy
    assert domain.state is DomainState.RUNNING
    assert not domain.incoming
    reading = await migration.outgoing.progress()
    assert reading is not None
    assert reading.postcopy
    with pytest.raises(HypervisorError):
        await migration.outgoing.abort()
    with pytest.raises(DomainBusy):
        await sides[1].driver.incoming(str(guest.stable_uuid)).abandon()
    for handle in (migration.outgoing, sides[0].driver.outgoing(migration.uuid)):
        with pytest.raises(DomainBusy):
            await handle.remove(b"", Options())
        with pytest.raises(DomainBusy):
            await handle.resume()
    await migration.outgoing.set_bandwidth(0)
    await performing
    await migration.outgoing.remove((await armed).cookie, Options())
    assert await sides[0].state(guest) == ("absent", "")
    assert_perfect(guest)


# --- ended early


@pytest.mark.parametrize("early", [True, False], ids=["armed", "not-armed"])
async def test_abort_while_memory_flows(early: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed = migration.arm() if early else None
    performing = migration.perform()
    await migration.flowing()
    await migration.outgoing.abort()
    with pytest.raises(TransferFailed):
        await performing
    if armed:
        with pytest.raises(TransferFailed):
            await armed
    else:
        await migration.incoming.abandon()
    assert await sides[1].state(guest) == ("absent", "")
    assert (await sides[0].state(guest))[0] == "running"
    await migration.outgoing.abort()  # nothing to abort is no error
    await migration.close()
    await start().run()
    assert_perfect(guest)


async def test_abort_at_once_is_not_lost(start: Start, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    performing = migration.perform()
    await asyncio.sleep(0)  # the call is on its way, libvirt knows nothing of it
    await migration.outgoing.abort()
    with pytest.raises(TransferFailed):
        await performing
    assert_perfect(guest)


@pytest.mark.parametrize("fresh", [False, True], ids=["same-handle", "fresh-handle"])
@pytest.mark.parametrize("state", ["prepared", "armed", "flowing"])
async def test_abandon(state: str, fresh: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed = migration.arm() if state != "prepared" else None
    performing = migration.perform() if state == "flowing" else None
    if performing:
        await migration.flowing()
    elif armed:
        await asyncio.sleep(0.3)
        assert not armed.done()
    domain = await sides[1].driver.get_domain(guest.name)
    assert domain.incoming
    assert domain.job is Job.INCOMING
    handle = sides[1].driver.incoming(migration.uuid) if fresh else migration.incoming
    await handle.abandon()
    await handle.abandon()
    if armed:
        with pytest.raises(TransferFailed):
            await armed
    if performing:
        with pytest.raises(TransferFailed):
            await performing
    assert await sides[1].state(guest) == ("absent", "")
    await migration.outgoing.resume()
    assert (await sides[0].state(guest))[0] == "running"
    await handle.close()
    assert_perfect(guest)


async def test_definition_that_was_there_before_stays(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    lab["h2"].define(guest.with_(metadata="<x:mine xmlns:x='urn:test'/>"))
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    await asyncio.sleep(0.2)
    await migration.incoming.abandon()
    with pytest.raises(TransferFailed):
        await armed
    assert (await sides[1].state(guest))[0] == "shutoff"
    assert "urn:test" in lab["h2"].virsh("dumpxml", guest.name)


async def test_closing_undoes(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start()
    await migration.prepare()
    await migration.incoming.close()
    await becomes(lambda: sides[1].state(guest), ("absent", ""))
    assert (await sides[0].driver.get_domain(guest.name)).job is Job.OUTGOING
    await migration.outgoing.close()
    assert (await sides[0].driver.get_domain(guest.name)).job is Job.NONE
    assert_perfect(guest)


async def test_closing_while_memory_flows_aborts(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    performing = migration.perform()
    await migration.flowing()
    await migration.outgoing.close()
    with pytest.raises(TransferFailed):
        await performing
    assert (await sides[0].driver.get_domain(guest.name)).job is Job.NONE
    assert_perfect(guest)


async def test_resume_refuses_a_copy_that_arrives(start: Start, sides: tuple[Side, Side]) -> None:
    migration = start()
    await migration.prepare()
    handle = sides[1].driver.outgoing(migration.uuid)
    with pytest.raises(DomainBusy):
        await handle.resume()
    await handle.close()


async def test_postcopy_ended_without_its_agent(start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await migration.outgoing.start_postcopy()
    await performing
    await migration.outgoing.close()
    handle = sides[0].driver.outgoing(migration.uuid)
    await handle.set_bandwidth(0)
    await armed
    await handle.remove(b"", Options())
    assert await sides[0].state(guest) == ("absent", "")
    await handle.close()
    assert_perfect(guest)


async def test_abandon_refuses_a_guest_that_runs(sides: tuple[Side, Side], guest: Guest) -> None:
    handle = sides[0].driver.incoming(str(guest.stable_uuid))
    with pytest.raises(DomainBusy):
        await handle.abandon()
    await handle.close()
    assert_perfect(guest)


async def test_second_migration_of_a_guest_is_refused(start: Start) -> None:
    await start().prepare()
    with pytest.raises(DomainBusy):
        await start().prepare()


# --- come back


@pytest.mark.parametrize("fresh", [False, True], ids=["same-handle", "fresh-driver"])
async def test_resume_after_perform_without_finish(
    fresh: bool, lab: Lab, start: Start, sides: tuple[Side, Side], guest: Guest
) -> None:
    migration = start()
    await migration.prepare()
    await migration.perform()
    assert await sides[0].state(guest) == ("paused", "migration")
    assert not (await sides[0].driver.get_domain(guest.name)).incoming
    await migration.incoming.abandon()
    if fresh:
        await migration.outgoing.close()  # as its agent's death would
        restarted = LibvirtHypervisor(lab["h1"].libvirt_uri)
        handle: Outgoing = restarted.outgoing(migration.uuid)  # not opened: a handle serves recovery by itself
    else:
        handle = migration.outgoing
    await handle.resume()
    await handle.resume()
    assert (await sides[0].state(guest))[0] == "running"
    await handle.close()
    if fresh:
        await restarted.close()
    assert_perfect(guest)


@pytest.mark.parametrize("undefine", [True, False])
async def test_remove_by_a_fresh_handle(undefine: bool, start: Start, sides: tuple[Side, Side], guest: Guest) -> None:
    migration = start(Options(undefine_source=undefine))
    await migration.prepare()
    armed = migration.arm()
    await migration.perform()
    finished = await armed
    await migration.outgoing.close()
    assert (await sides[0].state(guest)) == ("paused", "migration")
    handle = sides[0].driver.outgoing(migration.uuid)
    for _ in range(2):
        await handle.remove(finished.cookie, migration.options)
    assert (await sides[0].state(guest))[0] == ("absent" if undefine else "shutoff")
    await handle.close()
    assert_perfect(guest)


async def test_remove_after_libvirtd_was_restarted(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start()
    await migration.prepare()
    armed = migration.arm()
    await migration.perform()
    finished = await armed
    await asyncio.to_thread(lab["h1"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await migration.outgoing.remove(finished.cookie, Options())
    await asyncio.to_thread(lab["h1"].start_libvirtd)
    await migration.outgoing.remove(finished.cookie, Options())
    assert await sides[0].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_libvirtd_killed_during_perform(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h1"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await performing
    await asyncio.to_thread(lab["h1"].start_libvirtd)
    with pytest.raises(TransferFailed):
        await armed
    domain = await sides[0].driver.get_domain(guest.name)
    assert (domain.state, domain.job) == (DomainState.RUNNING, Job.NONE)
    assert await sides[1].state(guest) == ("absent", "")
    assert_perfect(guest)


async def test_destination_libvirtd_killed_while_armed(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    migration = start(bandwidth=SLOW)
    await migration.prepare()
    armed, performing = migration.arm(), migration.perform()
    await migration.flowing()
    await asyncio.to_thread(lab["h2"].kill_libvirtd)
    with pytest.raises(HypervisorUnavailable):
        await armed
    await asyncio.to_thread(lab["h2"].start_libvirtd)
    with pytest.raises(TransferFailed):
        await performing
    await sides[1].driver.incoming(migration.uuid).abandon()
    assert (await sides[0].state(guest))[0] == "running"
    assert_perfect(guest)


async def test_libvirtd_that_hangs_is_unavailable_in_time(lab: Lab, guest: Guest) -> None:
    driver = LibvirtHypervisor(lab["h1"].libvirt_uri, call_timeout=0.5)
    await driver.open()
    lab["h1"].pause_libvirtd()
    try:
        began = perf_counter()
        for _ in range(2):  # on the open connection, and then on a new one
            with pytest.raises(HypervisorUnavailable, match=r"0\.5 s"):
                await driver.get_domain(guest.name)
        assert perf_counter() - began < 2
    finally:
        lab["h1"].resume_libvirtd()
    assert (await driver.get_domain(guest.name)).state is DomainState.RUNNING
    await driver.close()


# --- events and questions


async def test_events_tell_a_migration_and_survive_a_restart(start: Start, sides: tuple[Side, Side], lab: Lab, guest: Guest) -> None:
    first, second = sides[0].driver.events(), sides[0].driver.events()
    await start().run()

    async def until(kind: str) -> list[str]:
        seen: list[str] = []
        async with asyncio.timeout(10):
            while not seen or seen[-1] != kind:
                seen.append((await anext(first)).kind)
        return seen

    seen = await until("job-completed")
    assert "iteration" in seen
    assert "suspended" in seen
    assert (await anext(second)).uuid == str(guest.stable_uuid)
    await asyncio.to_thread(lab["h1"].restart_libvirtd)
    await until("reconnected")
    await start(back=True).run()
    await until("resumed")


async def test_incompatible_guests_are_named(sides: tuple[Side, Side], guest: Guest) -> None:
    driver = sides[1].driver
    _, needs = await sides[0].driver.describe(str(guest.stable_uuid))
    assert needs.memory_bytes == 64 << 20
    assert needs.machine.startswith("pc-q35-")
    (machine,) = await driver.incompatibilities(replace(needs, machine="pc-q35-99.9"))
    assert "pc-q35-99.9 is not known to QEMU" in machine
    assert "is the newest" in machine
    (arch,) = await driver.incompatibilities(replace(needs, arch="sparc"))
    assert "sparc" in arch
    (kind,) = await driver.incompatibilities(replace(needs, virt_type="xen"))
    assert "xen" in kind
    cpu = needs.cpu.replace("</cpu>", "<feature policy='require' name='avx512f'/></cpu>")
    (missing,) = await driver.incompatibilities(replace(needs, cpu=cpu))
    assert "avx512f" in missing


async def test_list_and_absent_domains(sides: tuple[Side, Side], guest: Guest) -> None:
    (domain,) = await sides[0].driver.list_domains()
    assert domain == await sides[0].driver.get_domain(guest.name)
    assert domain == Domain(guest.name, str(guest.stable_uuid), DomainState.RUNNING, "booted", 64 << 20, 1, persistent=True)
    for unknown in ("nobody", "00000000-0000-0000-0000-000000000001"):
        with pytest.raises(DomainNotFound):
            await sides[0].driver.get_domain(unknown)


async def test_unreachable_libvirtd_is_unavailable() -> None:
    with pytest.raises(HypervisorUnavailable):
        await LibvirtHypervisor("qemu:///system?socket=/nonexistent/libvirt-sock").open()
