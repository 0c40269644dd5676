"""The migration job of a domain on its source. Every function blocks, so it runs in a thread; `domain` is libvirt's."""

import contextlib
from collections.abc import Iterator
from typing import Any

import libvirt

from agent.hypervisor.base import DomainBusy, DomainState, HypervisorError
from agent.hypervisor.libvirt import domain as domains
from agent.hypervisor.libvirt.guard import is_held
from agent.hypervisor.libvirt.options import NO_LIMIT
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


def set_bandwidth(domain: Any, limit: int) -> int | None:
    """Set the limit (MiB/s, 0 for none) of both ways to copy, so that a later switch to post-copy keeps it. Return it as read back;
    None where no transfer runs. Raises `HypervisorError` where libvirt reports two limits."""
    if flow(domain) is None:
        return None
    domain.migrateSetMaxSpeed(limit, _IN_POSTCOPY)
    domain.migrateSetMaxSpeed(limit)
    # After the switch libvirt has reset the other one, which acts no more.
    limits = {domain.migrateGetMaxSpeed(way) for way in ((_IN_POSTCOPY,) if in_postcopy(domain) else (0, _IN_POSTCOPY))}
    if {0 if reported == NO_LIMIT else reported for reported in limits} != {limit}:
        raise HypervisorError(f"libvirt accepted a limit of {limit} MiB/s, and now reports {max(limits)} MiB/s")
    return limit


@contextlib.contextmanager
def max_downtime(domain: Any, milliseconds: int) -> Iterator[None]:
    """Set the longest pause at the switch-over before Perform begins; 0: leave it. libvirt has no parameter of Perform for it. Where
    Perform fails, set it back: it would hold for the guest's next migration (as it does where the agent dies meanwhile)."""
    before = domain.migrateGetMaxDowntime() if milliseconds else 0
    try:
        if milliseconds:
            domain.migrateSetMaxDowntime(milliseconds)
        yield
    except Exception:
        with contextlib.suppress(libvirt.libvirtError):
            if milliseconds:
                domain.migrateSetMaxDowntime(before)
        raise


def set_max_downtime(domain: Any, milliseconds: int) -> int | None:
    """Set the longest pause at the switch-over. Return it as read back; None where no transfer runs."""
    if flow(domain) is None:
        return None
    domain.migrateSetMaxDowntime(milliseconds)
    return int(domain.migrateGetMaxDowntime())


_IN_POSTCOPY = libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY


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
