"""The migration job of a domain on its source. Every function blocks, so it runs in a thread; `domain` is libvirt's."""

import contextlib
from typing import Any

import libvirt

from agent.hypervisor.base import DomainBusy, DomainState
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt.guard import is_held
from agent.hypervisor.libvirt.removal import flow, in_postcopy, refuse_arrival, state_of
from agent.transfer.progress import Progress


def abort(domain: Any) -> bool:
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and not in_postcopy(domain):
            return False  # there is no job
        raise
    return True


def progress(domain: Any) -> Progress | None:
    stats = flow(domain)
    return None if stats is None else domains.progress_of(stats, in_postcopy(domain))


def final(domain: Any) -> Progress:
    """Return the statistics of a transfer that has just ended; zeros where libvirt gives none (no reason to fail).

    They are those of the running job: it lasts until Confirm, and libvirt lists the job as completed only afterwards.
    """
    with contextlib.suppress(libvirt.libvirtError):
        return domains.progress_of(domain.jobStats(), in_postcopy(domain))
    return Progress()


def start_postcopy(domain: Any) -> bool:
    if flow(domain) is None:
        return False
    domain.migrateStartPostCopy()
    return True


def set_bandwidth(domain: Any, limit: int) -> bool:
    if flow(domain) is None:
        return False
    domain.migrateSetMaxSpeed(limit)
    domain.migrateSetMaxSpeed(limit, libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY)
    return True


def refuse_foreign(domain: Any) -> None:
    """Raise `DomainBusy` for what must not be resumed here: a guest that runs at the destination, and a copy that arrives."""
    if in_postcopy(domain):
        raise DomainBusy("the guest was switched to post-copy and runs at the destination, so it is not resumed here")
    refuse_arrival(domain)


def resume(domain: Any) -> None:
    """Resume a guest that a migration paused. Do nothing to one that its user paused, or that runs."""
    state, reason = state_of(domain)
    if (state is DomainState.PAUSED and reason == domains.MIGRATION) or is_held(domain):
        domain.resume()
