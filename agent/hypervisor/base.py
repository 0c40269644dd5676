"""Values and errors of a hypervisor driver. `interface` has the methods that a driver must offer.

A driver is stateless towards migrations: it does what it is asked and reports what is true. `agent.handshake` decides what is
done and in which order; a driver never resumes, removes or starts a guest by its own judgement.

Units: memory in bytes, rates in bytes per second, times in seconds (float) unless a name says otherwise.

Errors (every driver method raises only these, and `asyncio.CancelledError`)::

    HypervisorError              the call failed; `get_domain` says what is true now
     ├── DomainNotFound          no such domain on this host
     ├── DomainAmbiguous         the reference is the name of one domain and the UUID of another
     ├── DomainBusy              another job holds the domain
     ├── InvalidDocument         a peer sent a domain document or cookie that no Drover host would send
     ├── Incompatible            this host cannot run or move that guest (CPU, machine type, disk, option)
     ├── Exhausted               this host has no room for another migration now (ports)
     ├── NoTransfer              no transfer is running that could be changed
     ├── TransferFailed          the transfer ended without success: the guest at the source never stopped, or is paused
     └── HypervisorUnavailable   the hypervisor did not answer, so the effect of the call is unknown: ask again

Deadlines: every method returns within its own bound (a driver's `call_timeout`) or raises `HypervisorUnavailable`.
`Outgoing.perform` and `Incoming.finish` have no bound: they last as long as the guest's memory flows and are ended by
`abort` and `abandon`. Cancelling an await of any method leaves the hypervisor consistent: the effect either happened or
will happen; ask `Hypervisor.get_domain`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import Support
from agent.transfer.progress import Progress


class HypervisorError(Exception):
    """A hypervisor call failed. `native` keeps the driver's own code, domain and message as strings."""

    def __init__(self, message: str, native: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.native: Mapping[str, str] = dict(native or {})


class DomainNotFound(HypervisorError):  # noqa: N818 - reads as the fact that it states
    """No domain of that name or UUID on this host."""


class DomainAmbiguous(HypervisorError):  # noqa: N818
    """The reference is the name of one domain and the UUID of another."""


class DomainBusy(HypervisorError):  # noqa: N818
    """Another job (a migration, a save, a snapshot) holds the domain."""


class InvalidDocument(HypervisorError):  # noqa: N818
    """The domain document or the cookie cannot be used. It is the caller's mistake."""


class Incompatible(HypervisorError):  # noqa: N818
    """This host cannot run or move that guest."""


class Exhausted(HypervisorError):  # noqa: N818
    """A resource that the migration needs on this host is used up for now; a later try may succeed."""


class NoTransfer(HypervisorError):  # noqa: N818
    """No transfer is running that could be changed: it has not begun, or has ended."""


class TransferFailed(HypervisorError):  # noqa: N818
    """The transfer ended without success."""


class HypervisorUnavailable(HypervisorError):  # noqa: N818
    """The hypervisor did not answer; nothing is known about the effect of the call."""


@dataclass(frozen=True)
class Features:
    """`migration_features` of a host (requirement H4)."""

    options: Mapping[str, Support]
    """By name of an option; one that is missing is unsupported."""
    uri_transports: tuple[str, ...]
    """Schemes that Prepare accepts in a migration URI, such as ``tcp``."""
    ports: tuple[int, int]
    """First and last port that the destination listens on."""
    bandwidth: bool
    """A limit on the transfer's rate can be enforced, and changed while the transfer runs."""
    split_phases: bool
    """Begin, Prepare, Perform, Finish and Confirm can be called one by one."""
    bandwidth_unit: int = 1
    """Bytes per second. A limit is enforced in multiples of it."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """By name of an option that the driver supports but this host does not: what forbids it, and what would allow it."""


@dataclass(frozen=True)
class HypervisorInfo:
    driver: str
    """``libvirt`` or ``sim``."""
    hypervisor: str
    """Program that runs the guests, and its version, such as ``QEMU 7.2.22``."""
    library_version: str
    """Version of the driver's library, such as ``libvirt 9.0.0``."""
    host_uuid: str
    """Identity that the hypervisor gives this host; two agents with the same one are on the same host."""
    features: Features


MAX_DOMAIN_XML: Final = 512 * 1024
"""Most bytes of a domain XML that can be sent: the bound of `PrepareRequest.domain_xml`."""


class DomainState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    OTHER = "other"


class Job(StrEnum):
    """Migration job that holds the domain now, as the hypervisor reports it."""

    NONE = "none"
    OUTGOING = "outgoing"
    INCOMING = "incoming"
    UNKNOWN = "unknown"
    """The guest's process does not answer, and the job cannot be read without it."""


PAUSED_BY_USER: Final = "user"
"""`Domain.reason` of a guest that its user has paused: the only pause with which a guest may be migrated."""
POSTCOPY_FAILED: Final = "post-copy failed"
"""`Domain.reason` of a copy, on either side, whose post-copy transfer broke: it can still be recovered."""
ENDING: Final = "in shutdown"
"""`Domain.reason` of a guest whose process is about to end, because of its user, the guest itself, or a signal."""
_NEVER_RAN = frozenset({"migration", "starting up", "unknown"})
"""Reasons of the pause of a copy that waits for its memory."""
_HAS_RUN = frozenset({"shutdown", "saved", "migrated"})
"""Reasons of the shut-off state that only a guest that ran here can have: its user ended it before the agent looked."""


@dataclass(frozen=True)
class Domain:
    """Facts of a domain on this host at this moment, read from the hypervisor and from nothing else."""

    name: str
    uuid: str
    state: DomainState
    reason: str
    """The hypervisor's reason for the state, in its own lower-case terms, such as ``migration`` or ``post-copy``."""
    memory_bytes: int
    vcpus: int
    persistent: bool
    job: Job = Job.NONE
    incoming: bool = False
    """This is a copy that waits for (the rest of) an incoming stream; it never ran here."""
    postcopy: bool = False
    """The guest was switched to post-copy: part of its memory is on the other host."""
    silent_for: float = 0.0
    """Seconds since the hypervisor asked the guest's process something that is not answered yet; 0 where nothing is open."""
    running_version: str = ""
    """Version of the hypervisor that runs it. Empty: not known, or it does not run. Set by `list_domains` only, as the next one."""
    installed_version: str = ""
    """Version of the binary that the next start would run."""
    settings: GuestSettings | None = None
    """The guest's own settings, if it has any. Set by `list_domains`, `describe` and `set_settings` only."""
    saved_image: bool = False
    """The guest does not run, and its next start would restore a memory image that was saved here instead of booting."""

    @property
    def never_started(self) -> bool:
        """Whether this is an active copy that has never run; asked at a destination. The job alone does not show it: a daemon that
        has just restarted knows the reason of the pause some milliseconds before it knows the job again."""
        return self.state is DomainState.PAUSED and (self.incoming or self.reason in _NEVER_RAN)

    @property
    def ending(self) -> bool:
        """Whether the process is ending now; `has_run` is known only afterwards. A destroyed waiting copy passes this state, too."""
        return self.state is DomainState.OTHER and self.reason == ENDING

    @property
    def has_run(self) -> bool:
        """Whether the copy ran here and is stopped now; asked at a destination that had one. False where that cannot be told."""
        return self.state in (DomainState.SHUTOFF, DomainState.CRASHED) and self.reason in _HAS_RUN


@dataclass(frozen=True)
class Requirements:
    """Needs of a guest that a destination must meet; checked before the guest is touched (requirement H6)."""

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
    """The CPU that the source's QEMU gives, for a guest that takes its host's CPU; the destination must give the very same. In the
    driver's notation (libvirt: ``model=EPYC vendor=AMD +avx2 -vme``), at most 64 KiB. Empty for a guest whose CPU is named."""


@dataclass(frozen=True)
class Stored:
    """Data that a host stores for a persistent guest beside the running copy. It migrates with the guest."""

    definition: str = ""
    """Definition for the next boot, in the driver's own notation, secrets included. Empty: the one that runs."""
    autostart: bool = False
    """The guest starts with its host."""


@dataclass(frozen=True)
class Begun:
    domain_xml: str
    """Document for the destination, in the driver's own notation. Tells whether the guest is persistent, or paused by its user."""
    cookie: bytes


@dataclass(frozen=True)
class Prepared:
    uri: str
    """`uri_out`: the migration URI with the port on which the destination now listens."""
    cookie: bytes


@dataclass(frozen=True)
class Performed:
    """Result of a successful Perform: the whole state has left the source, whose guest is paused now (after post-copy: empty)."""

    cookie: bytes
    final: Progress


@dataclass(frozen=True)
class Finished:
    """Result of a successful Finish: the guest runs here (or is paused here, where that was requested)."""

    cookie: bytes


RESUMED = "resumed"
"""The only `DomainEvent.kind` that every driver has: a guest starts or continues to run."""


@dataclass(frozen=True)
class DomainEvent:
    """A change of a domain. It is a hint only: ask `get_domain` what is true now."""

    uuid: str
    kind: str
    """The driver's own term, such as ``resumed``, ``suspended``, ``stopped``, ``job-completed``."""
    detail: str = ""
    monotonic: float = field(default=0.0, compare=False)
    """`time.monotonic()` when the driver received it."""
