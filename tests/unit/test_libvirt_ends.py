"""How both sides of the libvirt driver handle the end of a phase, with a minimal fake libvirtd."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import (  # noqa: E402 - after the skip
    DomainBusy,
    DomainEvent,
    HypervisorError,
    HypervisorUnavailable,
    Incompatible,
    TransferFailed,
)
from agent.hypervisor.events import Fanout  # noqa: E402
from agent.hypervisor.libvirt import connection, guard, incoming, phases  # noqa: E402
from agent.hypervisor.libvirt.connection import Link, Pool, Session  # noqa: E402
from agent.hypervisor.libvirt.guard import Guard  # noqa: E402
from agent.hypervisor.libvirt.incoming import LibvirtIncoming  # noqa: E402
from agent.hypervisor.libvirt.outgoing import LibvirtOutgoing  # noqa: E402
from agent.hypervisor.options import Options  # noqa: E402 - after the skip

UUID = "0b8c1f3e-54f1-5d0e-8f5e-d70000000001"
RUNNING = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED)
CAME_BACK = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED)
LEFT = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)


def refusal(code: int) -> Exception:
    """Return a libvirt error with this code."""
    error: Exception = libvirt.libvirtError("")
    vars(error)["err"] = (code, libvirt.VIR_FROM_QEMU, "", 0, "", None, None, 0, 0)
    return error


class FakeDomain:
    """One guest in one state. `done` records the calls that change it."""

    def __init__(self) -> None:
        self.current = RUNNING
        self.arrives = False
        self.done: list[str] = []

    def name(self) -> str:
        return "g1"

    def UUIDString(self) -> str:  # noqa: N802 - libvirt's names
        return UUID

    def state(self) -> list[int]:
        return list(self.current)

    def info(self) -> list[int]:
        return [self.current[0], 65536, 65536, 1, 0]

    def isActive(self) -> bool:  # noqa: N802
        return bool(self.current[0] != libvirt.VIR_DOMAIN_SHUTOFF)

    def jobStats(self) -> dict[str, int]:  # noqa: N802
        if self.arrives:
            raise refusal(libvirt.VIR_ERR_OPERATION_UNSUPPORTED)
        return {}

    def abortJob(self) -> None:  # noqa: N802
        self.done.append("abort")

    def destroy(self) -> None:
        self.done.append("destroy")

    def isPersistent(self) -> bool:  # noqa: N802
        return True

    def hasManagedSaveImage(self) -> bool:  # noqa: N802
        return False

    def undefineFlags(self, _flags: int) -> None:  # noqa: N802
        self.done.append("undefine")


class Libvirtd:
    """A fake libvirtd: one domain, a connection, its events, and the end of the phases."""

    def __init__(self) -> None:
        self.domain = FakeDomain()
        self.pool = Pool("", call_timeout=5)
        self.fanout = Fanout()
        self.loop = asyncio.get_running_loop()
        self.closed = 0

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's name
        return True

    def close(self) -> None:
        self.closed += 1

    def lookupByUUIDString(self, _uuid: str) -> FakeDomain:  # noqa: N802
        return self.domain

    def tell(self, kind: str) -> None:
        """Emit an event; callable from any thread."""
        self.loop.call_soon_threadsafe(self.fanout.put, DomainEvent(UUID, kind))

    def ends(self, error: HypervisorError, *events: str) -> Callable[..., Any]:
        """Return a phase function that fails after these events."""

        def phase(*_arguments: object) -> None:
            for event in events:
                self.tell(event)
            raise error

        return phase

    def incoming(self) -> LibvirtIncoming:
        return LibvirtIncoming(UUID, Session(self.pool), self.pool, (49152, 49215), self.fanout.stream)

    def outgoing(self) -> LibvirtOutgoing:
        return LibvirtOutgoing(UUID, Session(self.pool), self.pool, Guard("", UUID), self.fanout.stream)


@pytest.fixture
async def libvirtd(monkeypatch: pytest.MonkeyPatch) -> Libvirtd:
    found = Libvirtd()
    monkeypatch.setattr(connection, "connect", lambda _uri: Link(found))
    monkeypatch.setattr(guard, "_ask", lambda domain, command: domain.done.append(command) or {})
    return found


async def perform(outgoing: LibvirtOutgoing) -> None:
    await outgoing.perform("tcp://10.0.0.1:49152", "<domain/>", b"", Options(), "", 0)


# --- the source

ERRORS = [HypervisorError("it broke"), DomainBusy("cannot acquire state change lock"), Incompatible("operation unsupported")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_guest_that_was_stopped_is_held_for_every_error_of_perform(
    error: HypervisorError, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "perform", libvirtd.ends(error, "suspended"))
    with pytest.raises(TransferFailed):
        await perform(libvirtd.outgoing())
    assert libvirtd.domain.done == ["stop"]


@pytest.mark.parametrize("error", ERRORS[1:], ids=lambda error: type(error).__name__)
async def test_an_early_refusal_of_perform_leaves_the_guest_alone(
    error: HypervisorError, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "perform", libvirtd.ends(error))
    with pytest.raises(type(error)):
        await perform(libvirtd.outgoing())
    assert libvirtd.domain.done == []


async def test_an_unanswered_perform_leaves_no_job_of_begin(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "perform", libvirtd.ends(HypervisorUnavailable("no thread for the call")))
    with pytest.raises(HypervisorUnavailable):
        await perform(libvirtd.outgoing())
    assert libvirtd.closed == 1


async def test_abort_never_aborts_the_guests_next_migration(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = libvirtd.outgoing()
    await handle.abort()  # by a new handle: the job may have been begun before a restart of the agent
    assert libvirtd.domain.done == ["abort"]
    monkeypatch.setattr(phases, "perform", libvirtd.ends(HypervisorError("it broke")))
    with pytest.raises(TransferFailed):
        await perform(handle)
    await handle.abort()
    assert libvirtd.domain.done == ["abort"]
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY)
    await handle.abort()  # Perform returns at the switch; libvirt itself refuses the abort
    assert libvirtd.domain.done == ["abort", "abort"]


@pytest.mark.parametrize(
    ("current", "arrives", "done"),
    [
        (LEFT, False, ["begin", "confirm", "undefine"]),
        (RUNNING, False, ["begin", "confirm", "undefine"]),  # resumed by a restarted libvirtd
        (LEFT, True, []),
        (CAME_BACK, False, []),
    ],
    ids=["left", "resumed", "arrives", "came-back"],
)
async def test_only_the_copy_that_the_migration_left_is_removed(
    current: tuple[int, int], arrives: bool, done: list[str], libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "begin", lambda domain, *_: domain.done.append("begin"))
    monkeypatch.setattr(phases, "confirm", lambda domain, *_, cancelled: domain.done.append("resume" if cancelled else "confirm"))
    libvirtd.domain.current, libvirtd.domain.arrives = current, arrives
    with nullcontext() if done else pytest.raises(DomainBusy):
        await libvirtd.outgoing().remove(b"", Options())
    assert libvirtd.domain.done == done


async def test_6_31_a_copy_that_libvirt_cannot_confirm_is_destroyed(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object) -> None:
        raise refusal(libvirt.VIR_ERR_OPERATION_INVALID)

    monkeypatch.setattr(phases, "begin", begin)
    libvirtd.domain.current = LEFT
    await libvirtd.outgoing().remove(b"", Options())
    assert libvirtd.domain.done == ["destroy", "undefine"]


async def test_6_31_an_unconfirmed_job_ends_with_its_connection(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(*_: object, cancelled: bool) -> None:
        raise refusal(libvirt.VIR_ERR_OPERATION_FAILED)

    monkeypatch.setattr(phases, "begin", lambda *_: ("", b""))
    monkeypatch.setattr(phases, "confirm", confirm)
    libvirtd.domain.current = LEFT
    with pytest.raises(HypervisorError):
        await libvirtd.outgoing().remove(b"", Options())
    assert libvirtd.closed == 1


# --- the destination


async def prepare(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> LibvirtIncoming:
    """Return a destination handle whose Prepare has made a copy on a host without the guest."""
    monkeypatch.setattr(incoming, "_definition", lambda *_: None)
    monkeypatch.setattr(phases, "prepare", lambda *_: ("tcp://10.0.0.1:49152", b""))
    made = libvirtd.incoming()
    await made.prepare("<domain/>", b"", Options(), "", "10.0.0.1", "")
    return made


async def finish(made: LibvirtIncoming) -> None:
    await made.finish("<domain/>", b"", Options(), "")


@pytest.mark.parametrize(("reason", "events"), [("SHUTDOWN", []), ("CRASHED", ["resumed"]), ("DESTROYED", ["resumed"])])
async def test_a_guest_that_ran_and_was_ended_before_finish_returned_keeps_its_definition(
    reason: str, events: list[str], libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "ENDS_SECONDS", 0.2)  # nothing tells of its end
    made = await prepare(libvirtd, monkeypatch)
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_SHUTOFF, getattr(libvirt, f"VIR_DOMAIN_SHUTOFF_{reason}"))
    monkeypatch.setattr(phases, "finish", libvirtd.ends(HypervisorError("domain is not running"), *events))
    with pytest.raises(HypervisorUnavailable):
        await finish(made)
    with pytest.raises(DomainBusy):
        await made.abandon()
    assert libvirtd.domain.done == []


async def test_a_copy_that_never_ran_leaves_no_definition(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await prepare(libvirtd, monkeypatch)
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED)
    monkeypatch.setattr(phases, "finish", libvirtd.ends(HypervisorError("the stream broke")))
    with pytest.raises(TransferFailed):
        await finish(made)
    assert libvirtd.domain.done == ["undefine"]


async def test_6_13_a_copy_that_is_being_destroyed_does_not_count_as_run(
    libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt takes some 200 ms to end a copy. For a part of that it reports "in shutdown", as for a guest that its user stopped."""
    made = await prepare(libvirtd, monkeypatch)
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_SHUTDOWN, 0)
    with pytest.raises(HypervisorUnavailable, match="in shutdown"):
        await made.abandon()
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED)
    await made.abandon()
    assert libvirtd.domain.done == ["undefine"]


async def test_a_guest_that_was_here_before_a_failed_prepare_is_no_copy(libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    libvirtd.domain.current = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED)
    monkeypatch.setattr(incoming, "_definition", libvirtd.ends(DomainBusy("cannot acquire state change lock")))
    made = libvirtd.incoming()
    with pytest.raises(DomainBusy):
        await made.prepare("<domain/>", b"", Options(), "", "10.0.0.1", "")
    await made.abandon()
    assert libvirtd.domain.done == []
