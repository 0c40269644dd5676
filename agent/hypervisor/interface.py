"""What a hypervisor driver must offer: `Hypervisor`, and a handle for each side of a migration. The values are in `base`."""

from collections.abc import AsyncIterator
from typing import Protocol

from agent.hypervisor.base import (
    Begun,
    Domain,
    DomainEvent,
    Finished,
    HypervisorError,
    HypervisorInfo,
    Options,
    Performed,
    Prepared,
    Progress,
    Requirements,
    Stored,
)


class Outgoing(Protocol):
    """One migration on its source. Lives on its own connection to the hypervisor: `close` undoes what is not ended."""

    @property
    def paused_by_user(self) -> bool:
        """The guest's user paused it while `perform` ran. The hypervisor forgets that: afterwards the guest runs, here or there."""
        ...

    async def begin(self, options: Options, destination_name: str) -> Begun:
        """Lock the guest against changes and describe it. The guest is untouched otherwise."""
        ...

    async def perform(
        self, uri: str, domain_xml: str, cookie: bytes, options: Options, destination_name: str, bandwidth: int
    ) -> Performed:
        """Send the memory until it all is there. `bandwidth` in bytes per second, 0 for no limit.

        Raises `TransferFailed` when it ended without success; the caller then asks `get_domain`: ``running`` says that
        the guest never left.
        """
        ...

    async def abort(self) -> None:
        """Ask a running `perform` to stop (pre-copy only). Nothing to stop is no error. From any connection."""
        ...

    async def unanswered(self, uri: str) -> int | None:
        """How often the request to connect to `uri` was repeated, while nobody answers it; None where no such request is under way,
        or the driver cannot tell. Raises nothing.
        """
        ...

    async def stop_connecting(self, uri: str) -> None:
        """End a request to connect to `uri` that nobody has answered: `perform` then fails at once. Nothing to end is no error.

        Raises `HypervisorError` where it cannot be ended.
        """
        ...

    async def progress(self) -> Progress | None:
        """The latest reading; None where no transfer runs."""
        ...

    async def start_postcopy(self) -> None:
        """Switch the running transfer to post-copy; it was armed with `Options.post_copy`."""
        ...

    async def set_bandwidth(self, bandwidth: int) -> None:
        """Change the limit of the running transfer: bytes per second, 0 for no limit."""
        ...

    async def remove(self, cookie: bytes, options: Options) -> None:
        """The guest runs at the destination: remove the copy here (Confirm; where that is refused, destroy and undefine).

        Idempotent. Keeps the definition where `undefine_source` is False. Afterwards no copy runs or waits here, and a
        definition that was to go is gone from the disk, too.
        """
        ...

    async def settle(self) -> None:
        """For whoever does not know how `perform` ended, once no job holds the guest: afterwards `get_domain` can be believed.

        A hypervisor daemon that died and came back may have resumed, by its own judgement, a guest whose whole state had left
        and that runs at the destination: it is paused. Costs nothing where the end of `perform` is known. Idempotent.
        """
        ...

    async def resume(self) -> None:
        """There is no other copy: let the guest run here again, as it was before (paused, if its user had paused it).

        Idempotent, from any connection; does nothing to a guest that runs.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection. Ends the change protection of `begin`."""
        ...


class Incoming(Protocol):
    """One migration on its destination. Lives on its own connection: closing it undoes a copy that never ran."""

    async def prepare(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, listen_address: str, uri: str
    ) -> Prepared:
        """Start an empty copy that listens on `listen_address` only. `uri` may fix a port, or be empty."""
        ...

    async def finish(
        self, domain_xml: str, cookie: bytes, options: Options, destination_name: str, stored: Stored | None = None
    ) -> Finished:
        """Wait for the whole state, then start the guest. May be called while the memory still flows (armed early).

        A persistent guest's definition for the next boot becomes that of `stored`, under its new name; with None, that of
        the copy that runs.

        Raises `TransferFailed` when the copy is gone for certain; `HypervisorUnavailable` when that is not known.
        """
        ...

    @property
    def never_ran(self) -> bool:
        """The process of the copy which this handle has prepared has ended, and certainly had not started the guest. False where
        that is not known."""
        ...

    async def destroyed(self) -> HypervisorError | None:
        """That the copy which this handle has prepared was destroyed, and neither by this handle nor with its connection. None where
        that is not so, or not known. Raises nothing."""
        ...

    async def abandon(self) -> None:
        """Destroy the copy: afterwards there is none. Idempotent, from any connection.
        Raises `DomainBusy` for one that has run, even if it is stopped by now.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection; a copy that never ran goes with it."""
        ...


class Hypervisor(Protocol):
    """The hypervisor of this host."""

    async def open(self) -> None:
        """Connect. Raises `HypervisorUnavailable`. A driver reconnects by itself after that."""
        ...

    async def close(self) -> None:
        """Let go of everything; guests go on."""
        ...

    async def info(self) -> HypervisorInfo: ...

    async def list_domains(self) -> list[Domain]:
        """Every domain, running or not, by name. One whose process does not answer (`Domain.silent_for`) hides no other."""
        ...

    async def get_domain(self, uuid: str) -> Domain:
        """The guest with that UUID, whatever others are named. Raises `DomainNotFound`, `HypervisorUnavailable`."""
        ...

    async def get_named(self, name: str) -> Domain:
        """The guest with exactly that name, whatever it looks like. Raises `DomainNotFound`, `HypervisorUnavailable`."""
        ...

    async def describe(self, reference: str) -> tuple[Domain, Requirements]:
        """The guest that a user means by a name or a UUID, running or not, and what it needs of a host.

        Raises `DomainNotFound`, `DomainAmbiguous`, `HypervisorUnavailable`.
        """
        ...

    async def check_leaving(self, uuid: str, options: Options, destination_name: str) -> None:
        """Whether `Outgoing.begin` with these would succeed: raises what it would raise, and `DomainBusy` with its `hindrance` for a
        guest that would not answer. The guest is left as it is."""
        ...

    async def incompatibilities(self, requirements: Requirements) -> list[str]:
        """Why this host cannot run that guest: plain sentences, empty when it can."""
        ...

    def check_document(self, uuid: str, domain_xml: str) -> None:
        """Refuse a domain document that cannot be read, is not of that guest, or names a guest as no host may.

        Called for whatever a peer sends, before the driver's library sees it. Raises `InvalidDocument`.
        """
        ...

    async def disown(self, uuid: str) -> None:
        """Another host keeps this guest, by an operator's word: undefine a copy that does not run here, and pause one that does: its
        memory may be all that is left to look at. It does not start with this host. Raises `DomainNotFound`."""
        ...

    async def hindrance(self, name: str) -> str:
        """Why calls about a guest may get no answer, and what helps, such as that its process is stopped. Empty: not known.
        Raises nothing.
        """
        ...

    async def death(self, name: str) -> HypervisorError | None:
        """How the latest process of a guest that was here died, with its last words; None where it lives, or was ended by its
        hypervisor, or that is not known. Raises nothing."""
        ...

    async def stored(self, uuid: str) -> Stored | None:
        """What this host stores of a guest; None for a transient one. Raises `DomainNotFound`."""
        ...

    async def set_autostart(self, uuid: str, autostart: bool) -> None:
        """Whether a persistent guest starts with this host; nothing for a transient one. Afterwards it is read back.
        Idempotent. Raises `DomainNotFound`; waits for a migration job that holds the guest."""
        ...

    async def suspend(self, uuid: str) -> None:
        """Pause a guest that runs, as its user does. Raises `DomainNotFound`. Does nothing to one that does not run."""
        ...

    def outgoing(self, uuid: str) -> Outgoing:
        """A handle for a guest that leaves. Opens nothing until it is used, so it also serves recovery."""
        ...

    def incoming(self, uuid: str) -> Incoming:
        """A handle for a guest that arrives."""
        ...

    def events(self) -> AsyncIterator[DomainEvent]:
        """Domain events from this call on, at most 256 behind; a consumer that is slower loses the oldest. Needs no closing."""
        ...
