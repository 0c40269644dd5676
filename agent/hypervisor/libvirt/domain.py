"""A domain's state, job and progress, translated from libvirt's values. Blocking reads and pure translations."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import libvirt

from agent.hypervisor.base import ENDING, Domain, DomainAmbiguous, DomainState, Job
from agent.hypervisor.libvirt.events import constant_names
from agent.hypervisor.names import ambiguity, is_uuid
from agent.transfer.progress import Progress

_STATES: Mapping[int, DomainState] = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.OTHER,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: DomainState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.OTHER,
}

_SPECIAL = {"POSTCOPY": "post-copy", "POSTCOPY_FAILED": "post-copy failed"}

_REASONS: Mapping[int, Mapping[int, str]] = {
    libvirt.VIR_DOMAIN_RUNNING: constant_names("VIR_DOMAIN_RUNNING_", _SPECIAL),
    libvirt.VIR_DOMAIN_BLOCKED: constant_names("VIR_DOMAIN_BLOCKED_"),
    libvirt.VIR_DOMAIN_PAUSED: constant_names("VIR_DOMAIN_PAUSED_", _SPECIAL),
    libvirt.VIR_DOMAIN_SHUTDOWN: dict.fromkeys(constant_names("VIR_DOMAIN_SHUTDOWN_"), ENDING),
    libvirt.VIR_DOMAIN_SHUTOFF: constant_names("VIR_DOMAIN_SHUTOFF_"),
    libvirt.VIR_DOMAIN_CRASHED: constant_names("VIR_DOMAIN_CRASHED_"),
    libvirt.VIR_DOMAIN_PMSUSPENDED: constant_names("VIR_DOMAIN_PMSUSPENDED_"),
}

MIGRATION = "migration"
"""Reason of a pause that a migration caused (on either side)."""

UNDEFINE: int = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
)
"""Flags that remove everything stored with the definition except firmware variables and TPM state: these may be on shared storage
and then belong to the copy that runs elsewhere.
"""

_JOBS: Mapping[int, Job] = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: Job.OUTGOING,
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: Job.INCOMING,
}


def by_uuid(connection: Any, uuid: str) -> Any:
    """Return libvirt's domain with that UUID. Raises libvirt's NO_DOMAIN."""
    return connection.lookupByUUIDString(uuid)


def by_name(connection: Any, name: str) -> Any:
    """Return libvirt's domain with that name. Raises libvirt's NO_DOMAIN."""
    return connection.lookupByName(name)


def find(connection: Any, reference: str) -> Any:
    """Return libvirt's domain that a user means by a name or a UUID. Raises libvirt's NO_DOMAIN, `DomainAmbiguous`."""
    look_ups = (by_name, by_uuid) if is_uuid(reference) else (by_name,)
    found = [domain for look_up in look_ups if (domain := _look_up(look_up, connection, reference)) is not None]
    if text := ambiguity(reference, [(domain.name(), domain.UUIDString()) for domain in found]):
        raise DomainAmbiguous(text)
    return found[0] if found else by_name(connection, reference)


def _look_up(look_up: Callable[[Any, str], Any], connection: Any, reference: str) -> Any | None:
    """Return the domain; None where there is none. The error is not kept: its traceback would keep a domain and so the connection
    open."""
    try:
        return look_up(connection, reference)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def read_one(connection: Any, uuid: str) -> Domain:
    """Read the facts of the domain with that UUID. Raises libvirt's NO_DOMAIN."""
    return read(by_uuid(connection, uuid))


def read_all(connection: Any) -> Iterator[tuple[Any, Domain]]:
    """Yield each of libvirt's domains with its facts. A domain that disappears meanwhile is left out; a silent one is not waited
    for."""
    for domain in connection.listAllDomains():
        try:
            yield domain, read(domain, silent_for(domain))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise


SILENT_SECONDS = 0.5
"""A QEMU that leaves libvirt without an answer for longer than this is silent; a healthy one answers in milliseconds."""


def silent_for(domain: Any) -> float:
    """Return for how many seconds QEMU has not answered libvirt; 0 below `SILENT_SECONDS`. While QEMU is silent, every call that
    needs the domain's job lock waits, such as the one that reads its job. This call needs no lock.
    """
    if not domain.isActive():
        return 0.0
    state, _, milliseconds = domain.controlInfo()
    silent = milliseconds / 1000 if state in (libvirt.VIR_DOMAIN_CONTROL_OCCUPIED, libvirt.VIR_DOMAIN_CONTROL_JOB) else 0.0
    return silent if silent >= SILENT_SECONDS else 0.0


def read(domain: Any, silent_for: float = 0.0) -> Domain:
    """Read the facts of libvirt's domain. For a silent one (`silent_for` > 0), make no call that would wait for QEMU."""
    # Five short calls take 0.7 ms; domainListGetStats takes twice that, and asks QEMU, which may hang.
    _, maximum_kib, _, vcpus, _ = domain.info()
    code, reason_code = domain.state()
    state, reason = state_of(code), reason_name(code, reason_code)
    job = Job.NONE
    if state in (DomainState.RUNNING, DomainState.PAUSED):
        job = Job.UNKNOWN if silent_for else read_job(domain)
    return Domain(
        name=domain.name(),
        uuid=domain.UUIDString(),
        state=state,
        reason=reason,
        memory_bytes=maximum_kib * 1024,
        vcpus=vcpus,
        persistent=bool(domain.isPersistent()),
        job=job,
        incoming=job is Job.INCOMING and state is DomainState.PAUSED and reason == MIGRATION,
        postcopy=reason.startswith("post-copy"),
        silent_for=silent_for,
        saved_image=state in (DomainState.SHUTOFF, DomainState.CRASHED) and bool(domain.hasManagedSaveImage()),
    )


def state_of(code: int) -> DomainState:
    return _STATES.get(code, DomainState.OTHER)


def reason_name(state: int, reason: int) -> str:
    return _REASONS.get(state, {}).get(reason, str(reason))


def read_job(domain: Any) -> Job:
    """Return the migration job that holds the domain according to libvirt."""
    try:
        stats = domain.jobStats()
    except libvirt.libvirtError as error:
        # libvirt refuses the statistics of an incoming job with this code, and those of no other job.
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return Job.INCOMING
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return Job.NONE  # the domain has stopped meanwhile
        raise
    return job_of(stats)


def job_of(stats: Mapping[str, int]) -> Job:
    """Return the migration job in libvirt's statistics of the running job."""
    if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
        return Job.NONE
    return _JOBS.get(stats.get("operation", 0), Job.NONE)


def progress_of(stats: Mapping[str, int], postcopy: bool = False) -> Progress:
    """Convert libvirt's job statistics to `Progress`: milliseconds to seconds, pages per second to bytes per second."""
    return Progress(
        elapsed=stats.get("time_elapsed", 0) / 1000,
        iteration=stats.get("memory_iteration", 0),
        total_bytes=stats.get("data_total", 0),
        processed_bytes=stats.get("data_processed", 0),
        remaining_bytes=stats.get("data_remaining", 0),
        rate=stats.get("memory_bps", 0),
        dirty_rate=stats.get("memory_dirty_rate", 0) * stats.get("memory_page_size", 4096),
        downtime=stats.get("downtime", 0) / 1000,
        postcopy=postcopy,
    )
