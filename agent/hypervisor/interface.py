"""The interface of a hypervisor driver: `Hypervisor`, and a handle for each side of a migration. The values are in `base`."""

from collections.abc import AsyncIterator
from typing import Protocol

from agent.hypervisor.base import (
    Begun,
    Domain,
    DomainEvent,
    Finished,
    HypervisorError,
    HypervisorInfo,
    Performed,
    Prepared,
    Requirements,
    Stored,
)
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import Options
from agent.transfer.progress import Progress


class Outgoing(Protocol):
    """One migration on its source. It has its own connection to the hypervisor; `close` undoes what is unfinished."""

    @property
    def paused_by_user(self) -> bool:
        """Whether the guest's user paused it while `perform` ran. The hypervisor forgets such a pause: afterwards the guest runs, on
        whichever host it is."""
        ...

    async def begin(self, options: Options, destination_name: str) -> Begun:
        """Lock the guest against changes and return its description. Nothing else is done to the guest."""
        ...

    async def perform(
        self,
        uri: str,
        domain_xml: str,
        cookie: bytes,
        options: Options,
        destination_name: str,
        bandwidth: int,
        max_downtime: float = 0.0,
    ) -> Performed:
        """Send the guest's memory and return when all of it has arrived. `bandwidth` in bytes per second, 0 for no limit, whatever
        earlier migrations of the guest or other programs have set. `max_downtime`: longest pause at the switch-over in seconds, 0
        for the hypervisor's default.

        Raises `TransferFailed` when the transfer ended without success. The caller then asks `get_domain`: ``running`` means that
        the guest never left.
        """
        ...

    async def abort(self) -> None:
        """Ask a running `perform` to stop (pre-copy only). Does nothing where none runs. Works on any handle."""
        ...

    async def connect_retries(self, uri: str) -> int | None:
        """Return how often the unanswered request to connect to `uri` was repeated; None where no such request is under way, or the
        driver cannot tell. Raises nothing.
        """
        ...

    async def stop_connecting(self, uri: str) -> None:
        """End an unanswered request to connect to `uri`: `perform` then fails at once. Does nothing where there is none.

        Raises `HypervisorError` where the request cannot be ended.
        """
        ...

    async def progress(self) -> Progress | None:
        """Return the latest reading; None where no transfer runs."""
        ...

    async def start_postcopy(self) -> None:
        """Switch the running transfer to post-copy. Needs `Options.post_copy` at `perform`. Raises `NoTransfer` where none runs."""
        ...

    async def set_bandwidth(self, bandwidth: int) -> int:
        """Change the limit of the running transfer, in pre-copy and in post-copy: bytes per second, 0 for no limit. Return the limit
        that the hypervisor then reports, in the same way. Raises `NoTransfer` where none runs."""
        ...

    async def set_max_downtime(self, seconds: float) -> float:
        """Change the longest pause at the switch-over of the running transfer; return what the hypervisor then reports, in seconds.
        Raises `NoTransfer` where none runs."""
        ...

    async def remove(self, cookie: bytes, options: Options) -> None:
        """Remove the copy here (by Confirm; where that is refused, destroy and undefine it). Only for a guest that runs at the
        destination.

        Idempotent. Keeps the definition where `undefine_source` is False. Afterwards no copy runs or waits here, and a
        definition that was to be removed is gone from the disk, too.
        """
        ...

    async def settle(self) -> None:
        """Make `get_domain` reliable where it is not known how `perform` ended. Call it once no job holds the guest.

        A hypervisor daemon that died and restarted may have resumed, by its own judgement, a guest whose whole state had left
        and that runs at the destination; such a guest is paused. Does nothing where the end of `perform` is known. Idempotent.
        """
        ...

    async def resume(self) -> None:
        """Let the guest run here again as it was before (paused, if its user had paused it). Only where no other copy exists.

        Idempotent, works on any handle; does nothing to a guest that runs.
        """
        ...

    async def close(self) -> None:
        """Close the connection. This ends the change protection of `begin`."""
        ...


class Incoming(Protocol):
    """One migration on its destination. It has its own connection; closing that destroys a copy that never ran."""

    async def prepare(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, listen_address: str, uri: str
    ) -> Prepared:
        """Start an empty copy that listens on `listen_address` only. `uri` may name a port, or be empty."""
        ...

    async def finish(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, stored: Stored | None = None
    ) -> Finished:
        """Wait for the whole state, then start the guest. May be called while the memory still flows (armed early).

        A persistent guest's definition for the next boot becomes that of `stored`, under its new name; with None, that of
        the running copy.

        Raises `TransferFailed` when the copy is certainly gone, `HypervisorUnavailable` when that is not known.
        """
        ...

    @property
    def never_ran(self) -> bool:
        """Whether the process of the copy that this handle prepared has ended and certainly had not started the guest. False where
        that is not known."""
        ...

    async def destroyed(self) -> HypervisorError | None:
        """Return an error that describes the destruction of the copy that this handle prepared, if it was destroyed by neither this
        handle nor the end of its connection. None where it was not, or that is not known. Raises nothing."""
        ...

    async def abandon(self) -> None:
        """Destroy the copy; afterwards there is none. Idempotent, works on any handle.
        Raises `DomainBusy` for a copy that has run, even if it is stopped by now.
        """
        ...

    async def close(self) -> None:
        """Close the connection. A copy that never ran is destroyed with it."""
        ...


class Hypervisor(Protocol):
    """The hypervisor of this host."""

    async def open(self) -> None:
        """Connect. Raises `HypervisorUnavailable`. Afterwards the driver reconnects by itself."""
        ...

    async def close(self) -> None:
        """Close all connections. Guests keep running."""
        ...

    async def info(self) -> HypervisorInfo: ...

    async def list_domains(self) -> list[Domain]:
        """Return every domain, running or not, sorted by name. One whose process does not answer (`Domain.silent_for`) does not
        hold up the others."""
        ...

    async def get_domain(self, uuid: str) -> Domain:
        """Return the guest with that UUID, never one with that name. Raises `DomainNotFound`, `HypervisorUnavailable`."""
        ...

    async def get_named(self, name: str) -> Domain:
        """Return the guest with exactly that name, UUID-like or not. Raises `DomainNotFound`, `HypervisorUnavailable`."""
        ...

    async def describe(self, reference: str) -> tuple[Domain, Requirements]:
        """Return the guest that a user means by a name or a UUID, running or not, and what it needs of a host.

        Raises `DomainNotFound`, `DomainAmbiguous`, `HypervisorUnavailable`.
        """
        ...

    async def check_leaving(self, uuid: str, options: Options, destination_name: str) -> None:
        """Check whether `Outgoing.begin` with these arguments would succeed. Raises what that would raise, and `DomainBusy` with its
        `why_unresponsive` for a guest that would not answer. The guest is not changed."""
        ...

    async def incompatibilities(self, requirements: Requirements) -> list[str]:
        """Return why this host cannot run that guest, as plain sentences; empty when it can."""
        ...

    def check_document(self, uuid: str, domain_xml: str) -> None:
        """Raise `InvalidDocument` for a domain document that cannot be read, is of another guest, or has a name that no host takes.

        Must be called for every document that a peer sends, before the driver's library sees it.
        """
        ...

    async def disown(self, uuid: str) -> None:
        """Give up this host's copy because an operator has stated that another host keeps the guest. A copy that does not run is
        undefined. A running one is paused and kept, because its memory may be needed to examine what happened, and its autostart is
        switched off. Raises `DomainNotFound`."""
        ...

    async def why_unresponsive(self, name: str) -> str:
        """Return why calls about a guest may get no answer, and what helps; for example, its process is stopped. Empty: not known.
        Raises nothing.
        """
        ...

    async def death(self, name: str) -> HypervisorError | None:
        """Return how the latest process of a guest that was here died, with the last lines that it logged; None where it lives, was
        ended by its hypervisor, or that is not known. Raises nothing."""
        ...

    async def stored(self, uuid: str) -> Stored | None:
        """Return what this host stores of a guest; None for a transient one. Raises `DomainNotFound`."""
        ...

    async def set_autostart(self, uuid: str, autostart: bool) -> None:
        """Set whether a persistent guest starts with this host, and read it back. Does nothing to a transient one. Idempotent.
        Waits for a migration job that holds the guest. Raises `DomainNotFound`."""
        ...

    async def set_settings(self, uuid: str, settings: GuestSettings) -> Domain:
        """Write a guest's own settings into its definition, live and stored as far as it has each, and read them back; empty ones:
        remove them. Raises `DomainNotFound`, `DomainBusy` (a migration holds the guest)."""
        ...

    async def suspend(self, uuid: str) -> None:
        """Pause a running guest, as its user would. Does nothing to one that does not run. Raises `DomainNotFound`."""
        ...

    def outgoing(self, uuid: str) -> Outgoing:
        """Return a handle for a guest that leaves. It opens no connection until it is used, so it also serves recovery."""
        ...

    def incoming(self, uuid: str) -> Incoming:
        """Return a handle for a guest that arrives."""
        ...

    def events(self) -> AsyncIterator[DomainEvent]:
        """Return the domain events from this call on. At most 256 wait; a slower consumer loses the oldest. Needs no closing."""
        ...
