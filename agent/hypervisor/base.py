"""What a hypervisor driver must offer, and the words it speaks in.

A driver is stateless towards migrations: it is told what to do and reports what is true. Who decides, and in which order,
is the business of `agent.handshake`; a driver never resumes, removes or starts a guest by its own judgement.

Units: memory in bytes, rates in bytes per second, times in seconds (float) unless a name says otherwise.
`None` in an option means that the user said nothing and the driver's default holds (requirement O1).

Errors (every driver method raises only these, and `asyncio.CancelledError`)::

    HypervisorError              the call failed; the facts on the host say what is true now
     ├── DomainNotFound          no such domain here
     ├── DomainAmbiguous         a name or UUID does not say which domain is meant
     ├── DomainBusy              another job holds the domain
     ├── InvalidDocument         a peer's domain document or cookie is none that a host of ours would send
     ├── Incompatible            this host cannot run or move that guest (CPU, machine type, disk, option)
     ├── Exhausted               this host has no room for another migration now (ports)
     ├── NoTransfer              no transfer runs that could be changed
     ├── TransferFailed          the transfer ended without success: the source never stopped, or is paused
     └── HypervisorUnavailable   the hypervisor did not answer, so nothing is known: ask again

Deadlines: every method ends within its own bound (a driver's `call_timeout`) and raises `HypervisorUnavailable` past it,
except `Outgoing.perform` and `Incoming.finish`, which last as long as the guest's memory flows and are ended by
`abort` and `abandon`. Cancelling an await of any method leaves the hypervisor consistent: the effect either happened or
will happen; ask `Hypervisor.get_domain`.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

ECHO: Final = "echo"
"""Key in `HypervisorError.native` of an error that tells only how this end noticed that the other one, or who aborted, had ended the
transfer, such as "Broken pipe": the cause stands elsewhere."""


class HypervisorError(Exception):
    """A hypervisor call failed. `native` keeps the driver's own code, domain and message as strings."""

    def __init__(self, message: str, native: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.native: Mapping[str, str] = dict(native or {})


class DomainNotFound(HypervisorError):  # noqa: N818 - reads as the fact that it states
    """No domain of that name or UUID on this host."""


class DomainAmbiguous(HypervisorError):  # noqa: N818
    """The name of one domain and the UUID of another."""


class DomainBusy(HypervisorError):  # noqa: N818
    """Another job (a migration, a save, a snapshot) holds the domain."""


class InvalidDocument(HypervisorError):  # noqa: N818
    """The domain document, or the cookie, cannot be used: a caller's mistake."""


class Incompatible(HypervisorError):  # noqa: N818
    """This host cannot run or move that guest."""


class Exhausted(HypervisorError):  # noqa: N818
    """This host lacks for now what a migration needs of it; later it may have it."""


class NoTransfer(HypervisorError):  # noqa: N818
    """No transfer runs that could be changed: it has not begun, or is over."""


class TransferFailed(HypervisorError):  # noqa: N818
    """The transfer ended without success."""


class HypervisorUnavailable(HypervisorError):  # noqa: N818
    """The hypervisor did not answer; nothing is known about the effect of the call."""


class Support(StrEnum):
    """What a driver says of an option (requirement H4)."""

    SUPPORTED = "supported"
    ALWAYS_ON = "always_on"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Options:
    """The user's word on each option: True, False, or None for the driver's default (requirements O1 to O6)."""

    live: bool | None = None
    """Guest CPUs run during the transfer. Default on."""
    persist_destination: bool | None = None
    """The definition is stored at the destination. Default on."""
    undefine_source: bool | None = None
    """The definition is removed from the source. Default on."""
    paused: bool | None = None
    """Not resumed on arrival. Default off; a guest that its user had paused always arrives paused."""
    offline: bool | None = None
    """Only the definition of a stopped guest moves. Default off."""
    change_protection: bool | None = None
    """Device changes are locked out from Begin on. Default on."""
    abort_on_error: bool | None = None
    """A disk I/O error of the guest during the transfer aborts the migration. Default off."""
    unsafe: bool | None = None
    """Accept a disk that the hypervisor believes is not shared. Default off."""
    copy_storage: bool | None = None
    """Copy the disks that are not shared. Default: when needed."""
    auto_converge: bool | None = None
    """Throttle the guest's CPUs when it dirties faster than the link. Default off."""
    post_copy: bool | None = None
    """Arm the switch to post-copy. Default: armed whenever both ends can."""
    compressed: bool | None = None
    """Compress memory pages. Default off."""
    parallel: bool | None = None
    """Several connections for the stream. Default off."""
    tunnelled: bool | None = None
    """The stream through the hypervisor daemons' own connection. Default off."""
    rdma: bool | None = None
    """The stream over RDMA. Default off."""
    encrypted: bool | None = None
    """TLS on the stream. Default on where certificates are there."""


@dataclass(frozen=True)
class Features:
    """`migration_features` of a host (requirement H4)."""

    options: Mapping[str, Support]
    """Support for each field of `Options`; one that is missing is unsupported."""
    uri_transports: tuple[str, ...]
    """Schemes that `Prepare` takes in a migration URI, such as ``tcp``."""
    ports: tuple[int, int]
    """First and last port that the destination listens on."""
    bandwidth: bool
    """A limit on the transfer's rate can be enforced, and changed while it runs."""
    split_phases: bool
    """Begin, Prepare, Perform, Finish and Confirm can be called one by one."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """For an option that this host lacks though the driver has it: what forbids it, and what would allow it."""


@dataclass(frozen=True)
class HypervisorInfo:
    driver: str
    """``libvirt`` or ``sim``."""
    hypervisor: str
    """What runs the guests and its version, such as ``QEMU 7.2.22``."""
    library_version: str
    """Version of the driver's library, such as ``libvirt 9.0.0``."""
    host_uuid: str
    """The hypervisor's identity of this host; two agents with the same one are the same host."""
    features: Features


MAX_DOMAIN_XML: Final = 512 * 1024
"""Bytes of a domain XML that can travel: the bound of the wire (`PrepareRequest.domain_xml`)."""


class DomainState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    OTHER = "other"


class Job(StrEnum):
    """The migration job that the hypervisor itself says holds the domain now."""

    NONE = "none"
    OUTGOING = "outgoing"
    INCOMING = "incoming"
    UNKNOWN = "unknown"
    """The guest's process does not answer, and nothing can be said without it."""


PAUSED_BY_USER: Final = "user"
"""`Domain.reason` of a guest that its user has paused: the only pause that it may travel with."""
POSTCOPY_FAILED: Final = "post-copy failed"
"""`Domain.reason` of a half whose post-copy broke: it may yet be recovered."""
_NEVER_RAN = frozenset({"migration", "starting up", "unknown"})
"""Reasons for being paused that a copy can have which waits for its memory."""
_HAS_RUN = frozenset({"shutdown", "saved", "migrated"})
"""Reasons for being shut off that only a guest can have that ran here: its user ended it before we looked."""


@dataclass(frozen=True)
class Domain:
    """What is true of a domain on this host at this moment, from the hypervisor and from nothing else."""

    name: str
    uuid: str
    state: DomainState
    reason: str
    """The hypervisor's reason for the state, in its own lower-case words, such as ``migration`` or ``post-copy``."""
    memory_bytes: int
    vcpus: int
    persistent: bool
    job: Job = Job.NONE
    incoming: bool = False
    """A copy that waits for (the rest of) an incoming stream; it never ran here."""
    postcopy: bool = False
    """The switch to post-copy happened: part of the memory is on the other host."""
    silent_for: float = 0.0
    """Seconds for which its process has owed the hypervisor an answer; 0 where it owes none."""
    running_version: str = ""
    """Version of the hypervisor that runs it. Empty: not told, or it does not run. In lists only, as the next one."""
    installed_version: str = ""
    """Version of the binary that the next start would run."""

    @property
    def unstarted(self) -> bool:
        """For a destination: an active copy that has never run. A daemon that has just come back knows the reason of the pause
        some milliseconds before it knows the job again, so the job alone does not say it."""
        return self.state is DomainState.PAUSED and (self.incoming or self.reason in _NEVER_RAN)

    @property
    def has_run(self) -> bool:
        """For a destination that had a copy: it is stopped now, and ran here before. False where that cannot be told."""
        return self.state in (DomainState.SHUTOFF, DomainState.CRASHED) and self.reason in _HAS_RUN


@dataclass(frozen=True)
class Requirements:
    """What a guest needs of the host that takes it; checked before the guest is touched (requirement H6)."""

    name: str
    uuid: str
    memory_bytes: int
    vcpus: int
    arch: str
    """Such as ``x86_64``."""
    machine: str
    """Machine type, such as ``pc-q35-7.2``."""
    virt_type: str
    """Such as ``qemu`` or ``kvm``."""
    cpu: str
    """The guest's CPU in the driver's own notation (libvirt: the ``<cpu>`` element), at most 64 KiB."""
    host_cpu: str = ""
    """For a guest that has whatever CPU its host's QEMU gives: that CPU, as words in the driver's notation (libvirt: ``model=EPYC
    vendor=AMD +avx2 -vme``), at most 64 KiB; another host must give the very same. Empty for a guest whose CPU is named."""


@dataclass(frozen=True)
class Begun:
    domain_xml: str
    cookie: bytes


@dataclass(frozen=True)
class Prepared:
    uri: str
    """The migration URI with the port on which the destination now listens: `uri_out`."""
    cookie: bytes


@dataclass(frozen=True)
class Progress:
    """One reading of a running transfer. Zero where the hypervisor does not say."""

    elapsed: float = 0.0
    iteration: int = 0
    """1 is the first pass over the memory."""
    total_bytes: int = 0
    processed_bytes: int = 0
    remaining_bytes: int = 0
    rate: int = 0
    """Bytes per second on the wire."""
    dirty_rate: int = 0
    """Bytes per second that the guest dirties; 0 during the first iteration."""
    downtime: float = 0.0
    """Expected downtime while running; the real one at the end."""
    postcopy: bool = False
    postcopy_requests: int = 0


@dataclass(frozen=True)
class Performed:
    """The whole state left the source, whose guest is paused now (post-copy: which is empty now)."""

    cookie: bytes
    final: Progress


@dataclass(frozen=True)
class Finished:
    """The guest runs here (or is paused here, where that was asked)."""

    cookie: bytes


class Outgoing(Protocol):
    """One migration on its source. Lives on its own connection to the hypervisor: `close` undoes what is not ended."""

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
        """The guest runs at the destination: remove the copy here (Confirm; without its connection, destroy, undefine).

        Idempotent. Keeps the definition where `undefine_source` is False. Afterwards no copy runs or waits here.
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

    async def finish(self, domain_xml: str, cookie: bytes, options: Options, destination_name: str) -> Finished:
        """Wait for the whole state, then start the guest. May be called while the memory still flows (armed early).

        Raises `TransferFailed` when the copy is gone for certain; `HypervisorUnavailable` when that is not known.
        """
        ...

    async def abandon(self) -> None:
        """Destroy the copy: afterwards there is none. Idempotent, from any connection.
        Raises `DomainBusy` for one that has run, even if it is stopped by now.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection; a copy that never ran goes with it."""
        ...


RESUMED = "resumed"
"""The one kind of event that every driver has: a guest starts to run, or goes on."""


@dataclass(frozen=True)
class DomainEvent:
    """Something happened to a domain: ask `get_domain` what is true now."""

    uuid: str
    kind: str
    """The driver's own word, such as ``resumed``, ``suspended``, ``stopped``, ``job-completed``."""
    detail: str = ""
    monotonic: float = field(default=0.0, compare=False)
    """`time.monotonic()` at which the driver heard of it."""


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
        """Whether `Outgoing.begin` with these would succeed: raises what it would raise. The guest is left as it is."""
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
        memory may be all that is left to look at. Raises `DomainNotFound`."""
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

    def outgoing(self, uuid: str) -> Outgoing:
        """A handle for a guest that leaves. Opens nothing until it is used, so it also serves recovery."""
        ...

    def incoming(self, uuid: str) -> Incoming:
        """A handle for a guest that arrives."""
        ...

    def events(self) -> AsyncIterator[DomainEvent]:
        """Domain events from this call on, at most 256 behind; a consumer that is slower loses the oldest. Needs no closing."""
        ...
