"""Removal of the copy that a migration left on its source, with the same effects as libvirt's own removal.

libvirt removes the copy in Confirm, which needs the migration job of the connection that called Perform. Where that connection
is gone (the agent died), libvirt refuses Confirm, and a plain `destroy` is no substitute:

- it gives the files of the guest (disks, firmware variables, TPM) back to root, although on storage that both hosts share they
  are in use by the copy that runs at the destination;
- every listener of libvirt receives "Stopped Destroyed" for a guest that still runs.

So a new migration job is begun only to be confirmed: no data flows, and libvirt does all that it does at the end of a migration.
"""

from collections.abc import Mapping
from typing import Any

import libvirt

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorUnavailable, Job
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import phases
from agent.hypervisor.libvirt.errors import translate

_BEGIN = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE | libvirt.VIR_MIGRATE_CHANGE_PROTECTION
"""Flags of that job: none with a condition of its own; CHANGE_PROTECTION keeps the job until Confirm or the connection closes."""

_RETURNED = (DomainState.RUNNING, "migrated")
"""State and reason of a guest that arrived here, until something stops it. The copy that a migration leaves behind was stopped: it
is paused, or was resumed by a restarted libvirtd ("migration canceled").
"""

# Every function below blocks: it runs in a thread, on libvirt's domain.


def remove(domain: Any, undefine: bool) -> None:
    """Stop and undefine the copy that this migration left behind; each step only where there is still something to do. Raises
    `DomainBusy` for any other copy, and libvirt's NO_DOMAIN where nothing is left after the stop.

    The caller must close the connection if this raises: otherwise a job that this began would stay.
    """
    if domain.isActive():
        refuse_arrival(domain)
        if state_of(domain) == _RETURNED:
            raise DomainBusy("the guest has returned to this host by another migration")
        refuse_incomplete_postcopy(domain)
        _stop(domain, undefine)
    if undefine and domain.isPersistent():
        domain.undefineFlags(domains.UNDEFINE)


def _stop(domain: Any, undefine: bool) -> None:
    """Stop the copy, as Confirm does. Afterwards libvirt may not know the domain any more."""
    flags = _BEGIN | (libvirt.VIR_MIGRATE_UNDEFINE_SOURCE if undefine else 0)
    try:
        phases.begin(domain, {}, flags)
    except libvirt.libvirtError as error:
        failure = translate(error)
        if isinstance(failure, DomainBusy | HypervisorUnavailable):
            raise
        domain.destroy()  # libvirt refuses to migrate this domain
    else:
        phases.confirm(domain, {}, b"", flags, cancelled=False)


def state_of(domain: Any) -> tuple[DomainState, str]:
    """Return the state and its reason."""
    code, reason = domain.state()
    return domains.state_of(code), domains.reason_name(code, reason)


def flow(domain: Any) -> Mapping[str, int] | None:
    """Return the statistics of an outgoing transfer that QEMU has started; None without one, also for a job between two phases."""
    try:
        stats: Mapping[str, int] = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
            return None  # shut off, or an incoming copy
        raise
    return stats if domains.job_of(stats) is Job.OUTGOING and stats.get("memory_total", 0) > 0 else None


def in_postcopy(domain: Any) -> bool:
    return state_of(domain)[1].startswith("post-copy")


def refuse_incomplete_postcopy(domain: Any) -> None:
    """Raise `DomainBusy` in post-copy while memory remains here: the guest runs at the destination and needs it."""
    left = (flow(domain) or {}).get("data_remaining", 0)
    if left and in_postcopy(domain):
        raise DomainBusy(f"post-copy is not complete: {left} bytes of the guest's memory are still only on this host")


def refuse_arrival(domain: Any) -> None:
    """Raise `DomainBusy` for the copy of an incoming migration: no outgoing migration left it behind."""
    if domains.read_job(domain) is Job.INCOMING:
        raise DomainBusy("the copy here belongs to an incoming migration")
