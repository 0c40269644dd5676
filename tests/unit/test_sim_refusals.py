"""The simulated hypervisor refuses to let guests leave or arrive in the same cases as libvirt."""

import asyncio
import dataclasses

import msgspec
import pytest

from agent.hypervisor.base import DomainBusy, HypervisorError, HypervisorUnavailable, Incompatible, Job
from agent.hypervisor.options import Options
from agent.hypervisor.sim import SimHypervisor
from tests.unit.test_sim_migration import UUID, Move, facts, host, web


async def refusal(a: SimHypervisor, options: Options = Options(), kind: type[HypervisorError] = Incompatible) -> str:  # noqa: B008
    """Return the error of both `check_leaving` and Begin, which must be the same and leave the guest unchanged."""
    before = await facts(a)
    with pytest.raises(kind) as asked:
        await a.check_leaving(UUID, options, "")
    with pytest.raises(kind) as begun:
        await a.outgoing(UUID).begin(options, "")
    assert str(asked.value) == str(begun.value)
    assert await facts(a) == before
    return str(asked.value)


async def test_6_15_check_leaving_reports_what_keeps_a_guest_from_leaving() -> None:
    async with host("a", web(obstacle="cannot migrate domain with 1 snapshots")) as a:
        assert "snapshots" in await refusal(a, Options(unsafe=True))
    async with host("a", web(metadata="y" * (600 << 10))) as a:
        assert "shorten its metadata" in await refusal(a)
    async with host("a", web(unsafe=True)) as a:
        assert "unsafe=on" in await refusal(a)
        await a.check_leaving(UUID, Options(unsafe=True), "")


async def test_6_32_a_pause_that_is_not_the_users_keeps_the_guest() -> None:
    async with host("a", web(state="paused", pause_reason="ioerror")) as a:
        assert "paused (ioerror)" in await refusal(a)
    async with host("a", web(state="paused")) as a:
        await a.check_leaving(UUID, Options(), "")


async def test_6_15_check_leaving_changes_nothing() -> None:
    async with host("a", web()) as a:
        before = await facts(a)
        await a.check_leaving(UUID, Options(), "")
        assert await facts(a) == before
        outgoing = a.outgoing(UUID)
        await outgoing.begin(Options(), "")
        with pytest.raises(DomainBusy):
            await a.check_leaving(UUID, Options(), "")
        await outgoing.close()


async def test_6_15_the_same_guest_under_another_name_at_the_destination() -> None:
    guest = web()
    other = msgspec.structs.replace(guest, name="web1-old", uuid=UUID, state="shutoff")
    async with host("a", guest) as a, host("b", other) as b:
        with pytest.raises(HypervisorError, match="already defined here"):
            await Move(a, b).prepare()


async def test_6_30_a_forbidden_option_fails_in_prepare() -> None:
    async with host("a", web()) as a, host("b", forbidden={"post_copy": "the sysctl is 0"}) as b:
        refused = Move(a, b)
        with pytest.raises(HypervisorError, match="post_copy is not supported: the sysctl is 0"):
            await refused.prepare()
        await refused.out.close()
        await Move(a, b, Options(post_copy=False)).whole()


async def test_6_9_a_silent_guest_does_not_hold_up_the_others() -> None:
    silent, other = web(), msgspec.structs.replace(web(), name="other", uuid=None)
    async with host("a", silent, other, call_timeout=0.05) as a:
        a.silence("web")
        await asyncio.sleep(0)
        found = {domain.name: domain for domain in await a.list_domains()}
        assert (found["web"].job, found["other"].job) == (Job.UNKNOWN, Job.NONE)
        assert found["web"].silent_for > 0
        with pytest.raises(HypervisorUnavailable):
            await a.get_domain(UUID)


async def test_6_33_a_cpu_of_the_host_needs_the_same_one_at_the_destination() -> None:
    async with host("a", web(cpu="host-passthrough"), host_cpu="EPYC") as a:
        _, needs = await a.describe(UUID)
        async with host("b", host_cpu="Skylake") as b:
            (difference,) = await b.incompatibilities(needs)
            assert "EPYC at the source, Skylake here" in difference
        async with host("b", host_cpu="EPYC") as b:
            assert await b.incompatibilities(needs) == []
            assert await b.incompatibilities(dataclasses.replace(needs, host_cpu="")) != []


async def test_6_22_a_paused_guest_with_a_disk_that_has_not_run_since_it_arrived() -> None:
    async with host("a", web(disk=True, state="paused")) as a, host("b") as b:
        await Move(a, b).whole()
        with pytest.raises(Incompatible, match="has not run since it arrived"):
            await b.check_leaving(UUID, Options(), "")
        b.start(UUID)
        await b.suspend(UUID)
        await Move(b, a).whole()
