"""What the hypervisor's word on a guest means for either side of a migration. Pure."""

from agent.errors import DroverError, Reason
from agent.handshake.destination import DestinationEvent
from agent.handshake.source import SourceEvent
from agent.hypervisor.base import Domain, DomainState, Job


def source_fact(domain: Domain | None) -> SourceEvent | None:
    """What the hypervisor's word on the guest means for its source; None while a job holds it."""
    if domain is None:
        return SourceEvent.SAW_DEAD
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        return (
            SourceEvent.SAW_STOPPED if domain.reason == "migrated" else SourceEvent.SAW_DEAD
        )  # a post-copy that ended leaves it so
    if domain.job is not Job.NONE:
        return None
    return SourceEvent.SAW_UNTOUCHED if domain.state is DomainState.RUNNING else SourceEvent.SAW_STOPPED


def destination_fact(domain: Domain | None) -> DestinationEvent | None:
    """What the hypervisor's word on the copy means for its destination; None while it waits for its stream."""
    if domain is None:
        return DestinationEvent.SAW_ABSENT
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        # A copy that never ran can be seen as failed, destroyed, crashed or (after libvirtd's restart) unknown.
        return DestinationEvent.SAW_RUNNING if domain.has_run else DestinationEvent.SAW_ABSENT
    return None if domain.unstarted else DestinationEvent.SAW_RUNNING


def check_movable(domain: Domain, host: str) -> None:
    """A guest that runs, or that its user paused, and that no other job holds.

    Raises:
        DroverError: GUEST_CRASHED, DOMAIN_NOT_RUNNING, DOMAIN_BUSY.
    """
    if domain.reason == "crashed":
        raise DroverError(
            Reason.GUEST_CRASHED,
            f"the hypervisor process of guest {domain.name} on {host} has died. That was no error of a migration; "
            "start the guest again",
        )
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED):
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {domain.name} on {host} is {domain.state}, and only a running guest can be migrated live; start it first",
            metadata={"state": domain.state},
        )
    if domain.job is not Job.NONE or domain.incoming:
        raise DroverError(
            Reason.DOMAIN_BUSY,
            f"guest {domain.name} on {host} is held by another migration job ({domain.job}) that is not Drover's; wait for its end",
        )
