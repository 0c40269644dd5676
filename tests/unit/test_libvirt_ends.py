"""What either side of the libvirt driver makes of the end of its phases, with a libvirtd of a few lines."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import (  # noqa: E402 - after the skip
    DomainBusy,
    DomainEvent,
    HypervisorError,
    Incompatible,
    Options,
    TransferFailed,
)
from agent.hypervisor.events import Fanout  # noqa: E402
from agent.hypervisor.libvirt import connection, guard, phases  # noqa: E402
from agent.hypervisor.libvirt.connection import Link, Pool, Session  # noqa: E402
from agent.hypervisor.libvirt.guard import Guard  # noqa: E402
from agent.hypervisor.libvirt.outgoing import LibvirtOutgoing  # noqa: E402

UUID = "0b8c1f3e-54f1-5d0e-8f5e-d70000000001"
RUNNING = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED)


class FakeDomain:
    """One guest in one state; what is done to it is written into `done`."""

    def __init__(self) -> None:
        self.said = RUNNING
        self.done: list[str] = []

    def name(self) -> str:
        return "g1"

    def state(self) -> list[int]:
        return list(self.said)


class Libvirtd:
    """The domain, a connection to it, its events, and how the phases end."""

    def __init__(self) -> None:
        self.domain = FakeDomain()
        self.pool = Pool("", call_timeout=5)
        self.fanout = Fanout()
        self.loop = asyncio.get_running_loop()

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's name
        return True

    def close(self) -> None:
        pass

    def lookupByUUIDString(self, _uuid: str) -> FakeDomain:  # noqa: N802
        return self.domain

    def tell(self, kind: str) -> None:
        """An event, from whichever thread."""
        self.loop.call_soon_threadsafe(self.fanout.put, DomainEvent(UUID, kind))

    def ends(self, error: HypervisorError, *events: str) -> Callable[..., Any]:
        """A phase that fails after these events."""

        def phase(*_arguments: object) -> None:
            for event in events:
                self.tell(event)
            raise error

        return phase

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
async def test_a_guest_that_was_stopped_is_held_whatever_perform_says(
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
