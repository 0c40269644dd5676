"""The values and errors that a hypervisor driver speaks in; what it must offer is `interface`.

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

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

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
    """The definition is stored at the destination. Default: as it is at the source, so off for a transient guest."""
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
    bandwidth_unit: int = 1
    """Bytes per second: a limit is enforced in multiples of it."""
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
ENDING: Final = "in shutdown"
"""`Domain.reason` of a guest whose process is about to end: by its user, by the guest itself, or by a signal."""
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
    saved_image: bool = False
    """It does not run, and its next start would not boot it but restore a memory that was saved here."""

    @property
    def unstarted(self) -> bool:
        """For a destination: an active copy that has never run. A daemon that has just come back knows the reason of the pause
        some milliseconds before it knows the job again, so the job alone does not say it."""
        return self.state is DomainState.PAUSED and (self.incoming or self.reason in _NEVER_RAN)

    @property
    def ending(self) -> bool:
        """Its process ends at this moment. Whether it ran is told when it has ended: a waiting copy that is destroyed is so, too."""
        return self.state is DomainState.OTHER and self.reason == ENDING

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
class Stored:
    """What a host stores of a persistent guest beside the copy that runs. It goes with the guest."""

    definition: str = ""
    """For the next boot, in the driver's own notation, secrets included. Empty: the one that runs."""
    autostart: bool = False
    """The guest starts with its host."""


@dataclass(frozen=True)
class Begun:
    domain_xml: str
    """For the destination, in the driver's own notation. It also says whether the guest is persistent, and paused by its user."""
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
