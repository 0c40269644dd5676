"""The copy that a migration left on its source: what it is, and how it is removed as libvirt itself removes it.

libvirt removes the copy in Confirm, which needs the migration job of the connection that called Perform. Where that connection
is gone (the agent died), libvirt refuses it, and a plain `destroy` is no substitute:

- it gives the files of the guest (disks, firmware variables, TPM) back to root, although on storage that both hosts share they
  are in use by the copy that runs at the destination;
- whoever listens to libvirt hears "Stopped Destroyed" of a guest that runs on.

So a new migration job is begun only to be confirmed: nothing flows, and libvirt does all that it does at the end of its own.
"""

from collections.abc import Mapping
from typing import Any

import libvirt

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorUnavailable, Job
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt import phases
from agent.hypervisor.libvirt.errors import translate

_BEGIN = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE | libvirt.VIR_MIGRATE_CHANGE_PROTECTION
"""No flag with a condition of its own; CHANGE_PROTECTION keeps the job until Confirm, or until the connection closes."""

_CAME_BACK = (DomainState.RUNNING, "migrated")
"""Only a guest that arrived here is so, and stays so only until something stops it. The copy that a migration leaves behind was
stopped: it is paused, or was resumed by a libvirtd that came back ("migration canceled").
"""

# All of this blocks: it runs in a thread, on libvirt's domain.


def remove(domain: Any, undefine: bool) -> None:
    """Stop and undefine, each only where there is something left of it, and it is what this migration left behind. Raises libvirt's
    NO_DOMAIN where nothing is left after the first.

    To be called on a connection that is closed if this raises: a job that it began must not stay.
    """
    if domain.isActive():
        refuse_arrival(domain)
        if state_of(domain) == _CAME_BACK:
            raise DomainBusy("the guest has come back here by another migration")
        refuse_half_a_guest(domain)
        _stop(domain, undefine)
    if undefine and domain.isPersistent():
        domain.undefineFlags(domains.UNDEFINE)


def _stop(domain: Any, undefine: bool) -> None:
    """Afterwards libvirt may not know the domain any more."""
    flags = _BEGIN | (libvirt.VIR_MIGRATE_UNDEFINE_SOURCE if undefine else 0)
    try:
        phases.begin(domain, {}, flags)
    except libvirt.libvirtError as error:
        failure = translate(error)
        if isinstance(failure, DomainBusy | HypervisorUnavailable):
            raise
        domain.destroy()  # libvirt takes no migration of it
    else:
        phases.confirm(domain, {}, b"", flags, cancelled=False)


def state_of(domain: Any) -> tuple[DomainState, str]:
    """State and reason."""
    code, reason = domain.state()
    return domains.state_of(code), domains.reason_name(code, reason)


def flow(domain: Any) -> Mapping[str, int] | None:
    """The statistics of an outgoing transfer under way in QEMU itself; None for a job that is only between phases."""
    try:
        stats: Mapping[str, int] = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
            return None  # shut off, or an incoming copy
        raise
    return stats if domains.job_of(stats) is Job.OUTGOING and stats.get("memory_total", 0) > 0 else None


def in_postcopy(domain: Any) -> bool:
    return state_of(domain)[1].startswith("post-copy")


def refuse_half_a_guest(domain: Any) -> None:
    """In post-copy the guest runs at the destination, and the rest of its memory is nowhere but here."""
    left = (flow(domain) or {}).get("data_remaining", 0)
    if left and in_postcopy(domain):
        raise DomainBusy(f"{left} bytes of the guest's memory have yet to flow to the destination")


def refuse_arrival(domain: Any) -> None:
    """A copy that arrives here is none that was left behind."""
    if domains.read_job(domain) is Job.INCOMING:
        raise DomainBusy("this is the copy of a guest that arrives here")
