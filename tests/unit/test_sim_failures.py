"""Failures between two simulated hosts: what is left on each is what `facts/libvirt.md` observed with real libvirt."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorError, HypervisorUnavailable, Incompatible, Job, TransferFailed
from agent.hypervisor.options import Options
from agent.hypervisor.sim import Latencies, SimGuest, SimHypervisor
from agent.hypervisor.sim.cookie import Cookie
from agent.hypervisor.sim.receiver import receiver_of
from agent.hypervisor.sim.stream import connect
from tests.unit.test_sim_migration import MIB, UUID, Move, facts, host, slow, state_text, until, web

Hosts = Callable[..., Awaitable[tuple[SimHypervisor, SimHypervisor]]]


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:

        async def make(*guests: SimGuest, **config: Any) -> tuple[SimHypervisor, SimHypervisor]:
            a = await stack.enter_async_context(host("a", *guests, **config))
            return a, await stack.enter_async_context(host("b", **config))

        yield make


async def fails(task: "asyncio.Task[Any]", kind: type[HypervisorError] = TransferFailed, match: str | None = None) -> None:
    with pytest.raises(kind, match=match):
        await task


# --- before the end of the transfer: the guest never left -------------------------------------------------------------


async def test_abort_twice_and_the_guest_never_stopped(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    await a.outgoing(UUID).abort()
    await move.out.abort()
    await fails(performing, match="aborted")
    await fails(finishing, match="gone")
    assert (state_text(await facts(a)), state_text(await facts(b))) == ("running (booted)", "none")
    await move.out.abort()
    await move.out.resume()
    assert await move.out.progress() is None
    await Move(a, b).prepare()  # succeeds only if nothing holds the guest any more


async def test_abort_before_the_stream_is_connected(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    performing = move.perform()
    await asyncio.sleep(0)
    await move.out.abort()
    await fails(performing, match="aborted")
    assert state_text(await facts(a)) == "running (booted)"


@pytest.mark.parametrize("end", ["a", "b"])
async def test_a_stream_that_is_cut(hosts: Hosts, end: str) -> None:
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    {"a": a, "b": b}[end].cut(UUID)
    await fails(performing)
    await fails(finishing)
    assert (state_text(await facts(a)), state_text(await facts(b))) == ("running (booted)", "none")


async def test_closing_the_destination_undoes_it(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    performing = move.perform()
    await move.flow()
    await move.into.close()
    await move.into.close()
    await fails(performing)
    assert (state_text(await facts(a)), state_text(await facts(b))) == ("running (booted)", "none")
    with pytest.raises(TransferFailed, match="no copy"):
        await move.finish()


async def test_closing_during_prepare(hosts: Hosts) -> None:
    a, b = await hosts(web(), latencies=Latencies(prepare=0.05))
    move = Move(a, b)
    preparing = asyncio.create_task(move.prepare())
    await until(lambda: facts(b), lambda domain: domain is not None)
    await move.into.close()
    await fails(preparing)
    await move.out.close()
    assert await b.list_domains() == []
    await Move(a, b).prepare()


async def test_abandon_is_idempotent_and_from_any_handle(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    await b.incoming(UUID).abandon()
    await b.incoming(UUID).abandon()
    await fails(performing)
    await fails(finishing, match="abandoned")


async def test_the_copy_is_removed_when_the_source_dies(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    await a.close()
    await fails(performing, match="closing")
    await fails(finishing)
    with pytest.raises(HypervisorUnavailable):
        await a.get_domain(UUID)


async def test_a_silent_peer_is_given_up(hosts: Hosts) -> None:
    a, b = await hosts(slow(), peer_timeout=0.5)
    move = Move(a, b)
    await move.prepare()
    performing = move.perform()
    await move.flow()
    receiver = receiver_of(b._host, UUID)
    assert receiver is not None
    assert receiver._stream is not None
    receiver._stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
    await fails(performing)
    assert state_text(await facts(a)) == "running (booted)"


# --- after the end of the transfer: the destination decides -----------------------------------------------------------


async def test_a_copy_that_never_ran_is_abandoned_and_the_source_resumes(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    await move.perform()
    await move.out.abort()  # too late, and no error
    await move.into.close()
    assert await b.list_domains() == []
    assert state_text(await facts(a)) == "paused (migration)"
    fresh = a.outgoing(UUID)
    await fresh.resume()
    await fresh.resume()
    there = await a.get_domain(UUID)
    assert (state_text(there), there.job) == ("running (unpaused)", Job.NONE)
    with pytest.raises(DomainBusy, match="not sent away"):
        await fresh.remove(b"", Options())


async def test_a_guest_that_its_user_paused_is_not_resumed(hosts: Hosts) -> None:
    a, b = await hosts(web(state="paused"))
    move = Move(a, b)
    await move.prepare()
    await move.perform()
    await move.into.abandon()
    await move.out.resume()
    assert state_text(await facts(a)) == "paused (user)"


async def test_a_copy_that_has_run_is_not_destroyed(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.whole()
    with pytest.raises(DomainBusy):
        await move.into.abandon()
    await move.into.close()
    assert state_text(await facts(b)) == "running (migrated)"


async def test_a_stream_that_breaks_at_complete_leaves_the_source_paused(hosts: Hosts) -> None:
    """The destination may have the whole state. The source cannot know, so its guest stays paused."""
    a, b = await hosts(web(), peer_timeout=1)
    move = Move(a, b)
    await move.prepare()
    receiver = receiver_of(b._host, UUID)
    assert receiver is not None
    complete = receiver._complete

    def complete_and_cut(clock: float, wants_run: bool) -> None:
        complete(clock, wants_run)
        receiver.cut()

    receiver._complete = complete_and_cut  # type: ignore[method-assign]
    finishing = move.finish()
    await fails(move.perform())
    assert state_text(await facts(a)) == "paused (migration)"
    await finishing
    assert state_text(await facts(b)) == "running (migrated)"


# --- post-copy that breaks --------------------------------------------------------------------------------------------


async def broken_postcopy(a: SimHypervisor, b: SimHypervisor) -> Move:
    move = Move(a, b, bandwidth=MIB)
    await move.prepare()
    finishing, performing = move.finish(), move.perform()
    await move.flow()
    await move.out.start_postcopy()
    await until(lambda: facts(b), lambda domain: domain.state is DomainState.RUNNING)
    a.cut(UUID)
    assert (await performing).final.postcopy
    await fails(finishing, HypervisorError, "post-copy of web failed")
    return move


async def test_a_broken_post_copy_keeps_both_halves(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = await broken_postcopy(a, b)
    await until(lambda: facts(a), lambda domain: state_text(domain) == "paused (post-copy failed)")
    there = await b.get_domain(UUID)
    assert (state_text(there), there.postcopy) == ("running (post-copy failed)", True)
    assert not b._host.guest(UUID).ticking
    with pytest.raises(HypervisorError):
        await move.out.resume()
    with pytest.raises(DomainBusy):
        await move.into.abandon()
    await move.into.close()
    assert await b.get_domain(UUID) == there


async def test_a_broken_post_copy_is_recovered_by_repeating_the_phases(hosts: Hosts) -> None:
    a, b = await hosts(slow(), link_rate=1 << 50)
    await broken_postcopy(a, b)
    again = Move(a, b)
    assert state_text(await again.whole()) == "running (migrated)"
    assert await a.list_domains() == []


async def test_post_copy_without_finish_is_lost_when_the_destination_closes(hosts: Hosts) -> None:
    a, b = await hosts(slow())
    move = Move(a, b, bandwidth=MIB)
    await move.prepare()
    performing = move.perform()
    await move.flow()
    await move.out.start_postcopy()
    there = await until(lambda: facts(b), lambda domain: domain.postcopy)
    assert (state_text(there), there.incoming) == ("paused (migration)", True)
    assert (await performing).final.postcopy
    await move.into.close()
    assert (
        state_text(await until(lambda: facts(a), lambda domain: domain.reason == "post-copy failed")) == "paused (post-copy failed)"
    )


# --- strangers, ports, and invalid requests ---------------------------------------------------------------------------


async def test_a_wrong_token_is_refused_and_the_copy_keeps_waiting(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    right = Cookie.decode(move.prepared.cookie)
    for token in (b"", b"x" * 32):
        wrong = msgspec.structs.replace(right, token=token).encode()
        with pytest.raises(TransferFailed, match="refused the stream"):
            await move.out.perform(move.prepared.uri, move.begun.domain_xml, wrong, move.options, "", 0)
    await move.perform()
    await move.finish()
    assert state_text(await facts(b)) == "running (migrated)"


async def test_invalid_data_from_a_stranger_does_no_harm(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    strangers = [await connect(move.address, 49_152, 5, 5) for _ in range(6)]
    for stranger in strangers:
        stranger._writer.write(b"GET / HTTP/1.1\r\n\r\n")
    finishing = move.finish()
    await until(lambda: asyncio.sleep(0), lambda _: (receiver := receiver_of(b._host, UUID)) is not None and not receiver._greeting)
    await move.perform()
    await finishing
    assert state_text(await facts(b)) == "running (migrated)"
    for stranger in strangers:
        await stranger.close()


async def test_ports_are_used_up_and_freed(hosts: Hosts) -> None:
    a, b = await hosts(web(), web(name="db"), ports=(49_152, 49_152))
    first, second = Move(a, b), Move(a, b, uuid=(await a.get_named("db")).uuid)
    second.address = first.address
    await first.prepare()
    with pytest.raises(HypervisorError, match="no free port"):
        await second.prepare()
    assert len(await b.list_domains()) == 1
    await first.into.abandon()
    assert (await second.prepare()).uri == first.prepared.uri


async def test_a_port_given_in_the_uri(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    assert (await move.prepare(f"tcp://{move.address}:49200")).uri == f"tcp://{move.address}:49200"
    with socket.socket() as taken, pytest.raises(OSError, match="in use"):
        taken.bind((move.address, 49_200))


@pytest.mark.parametrize("uri", ["tcp://{}:80", "tcp://127.0.0.254:49152", "rdma://{}:49152", "tcp://host.example", "{}"])
async def test_a_uri_that_leads_elsewhere_is_refused(hosts: Hosts, uri: str) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    with pytest.raises(HypervisorError):
        await move.prepare(uri.format(move.address))
    assert await b.list_domains() == []


async def test_a_guest_that_is_here_is_not_prepared_again(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    again = Move(a, b)
    again.out = move.out
    with pytest.raises(DomainBusy):
        await again.prepare()
    await move.perform()
    await move.finish()
    with pytest.raises(HypervisorError, match="already active"):
        await again.into.prepare(move.begun.domain_xml, b"", Options(), "", move.address, "")


async def test_only_one_migration_holds_a_guest(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    with pytest.raises(DomainBusy):
        await a.outgoing(UUID).begin(Options(), "")
    await move.out.close()
    await a.outgoing(UUID).begin(Options(), "")


async def test_a_guest_is_not_migrated_to_its_own_host(hosts: Hosts) -> None:
    a, _ = await hosts(web())
    with pytest.raises(HypervisorError, match="already on this host"):
        await Move(a, a).prepare()


@pytest.mark.parametrize("option", ["copy_storage", "compressed", "parallel", "tunnelled", "rdma", "encrypted"])
async def test_an_unsupported_option_is_an_error_that_names_it(hosts: Hosts, option: str) -> None:
    a, b = await hosts(web())
    with pytest.raises(Incompatible, match=option):
        await Move(a, b, cast(Options, {option: True})).prepare()
    await Move(a, b, cast(Options, {option: False})).whole()


@pytest.mark.parametrize(("state", "offline", "match"), [("running", True, "exist twice"), ("shutoff", False, "not running")])
async def test_offline_is_for_a_stopped_guest_only(hosts: Hosts, state: str, offline: bool, match: str) -> None:
    a, b = await hosts(web(state=state))
    with pytest.raises(HypervisorError, match=match):
        await Move(a, b, Options(offline=offline)).prepare()


async def test_a_log_outside_the_root_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    a, b = await hosts(web(), log_root=str(tmp_path))
    move = Move(a, b)
    document = (await move.out.begin(Options(), "")).domain_xml
    for path in ("/etc/passwd", f"{tmp_path}/../x", str(tmp_path), "x"):
        bad = document.replace('"log":""', f'"log":"{path}"')
        with pytest.raises(Incompatible, match="log_root"):
            await move.into.prepare(bad, b"", Options(), "", move.address, "")


@pytest.mark.parametrize("document", ["", "<domain/>", "{}", "x" * 600_000, "\udc80"])
async def test_an_invalid_document_is_refused(hosts: Hosts, document: str) -> None:
    _, b = await hosts()
    with pytest.raises(HypervisorError, match="document"):
        await b.incoming(UUID).prepare(document, b"", Options(), "", "127.0.0.1", "")


# --- faults and restarts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["begin", "prepare", "perform", "remove"])
async def test_an_injected_fault_fails_once(hosts: Hosts, method: str) -> None:
    a, b = await hosts(web(), fail_next={method: "out of luck"})
    with pytest.raises(HypervisorError, match="out of luck"):
        await Move(a, b).whole()
    assert not (b if method == "prepare" else a)._host.fail_next


async def test_an_injected_fault_of_finish_removes_the_copy(hosts: Hosts) -> None:
    a, b = await hosts(web())
    move = Move(a, b)
    await move.prepare()
    await move.perform()
    b.fail_next("finish", "out of luck")
    await fails(move.finish(), match="out of luck")
    assert await b.list_domains() == []


async def test_a_frozen_hypervisor_is_unavailable(hosts: Hosts) -> None:
    a, _ = await hosts(web(), call_timeout=0.2)
    a.freeze()
    with pytest.raises(HypervisorUnavailable):
        await a.get_domain(UUID)
    a.thaw()
    assert state_text(await facts(a)) == "running (booted)"
