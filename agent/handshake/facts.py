"""What the hypervisor's word on a guest means for either side of a migration. Pure."""

from collections.abc import Mapping

from agent.errors import DroverError, Reason
from agent.handshake.destination import DestinationEvent
from agent.handshake.guest_fact import NO_PROCESS, GuestFact, GuestState
from agent.handshake.records import Failure
from agent.handshake.source import SourceEvent
from agent.hypervisor.base import PAUSED_BY_USER, Domain, DomainState, Job


def source_fact(domain: Domain | None) -> SourceEvent | None:
    """What the hypervisor's word on the guest means for its source; None while a job holds it, or it ends."""
    if domain is None:
        return SourceEvent.SAW_DEAD
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        return (
            SourceEvent.SAW_STOPPED if domain.reason == "migrated" else SourceEvent.SAW_DEAD
        )  # a post-copy that ended leaves it so
    if domain.job is not Job.NONE or domain.ending:
        return None
    return SourceEvent.SAW_UNTOUCHED if domain.state is DomainState.RUNNING else SourceEvent.SAW_STOPPED


def destination_fact(domain: Domain | None) -> DestinationEvent | None:
    """What the hypervisor's word on the copy means for its destination; None while it waits for its stream, or ends."""
    if domain is None:
        return DestinationEvent.SAW_ABSENT
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        # A copy that never ran can be seen as failed, destroyed, crashed or (after libvirtd's restart) unknown.
        return DestinationEvent.SAW_RUNNING if domain.has_run else DestinationEvent.SAW_ABSENT
    return None if domain.unstarted or domain.ending else DestinationEvent.SAW_RUNNING


_BY_SOMEBODY = frozenset({"destroyed", "shutdown", "saved"})
"""Reasons for being shut off that say that somebody wanted it."""


def loss_of(domain: str, host: str, fact: GuestFact) -> Failure:
    """That a guest has no process on its host any more, by how it ended."""
    metadata = {"host": host}
    if fact.state not in NO_PROCESS:
        text = f"guest {domain} is {fact.state} ({fact.reason}) on {host}, and the rest of its memory is lost with the other copy"
        return Failure(Reason.GUEST_CRASHED, f"{text}; start the guest again", metadata)
    if fact.state is GuestState.ABSENT and not fact.reason:
        text = f"guest {domain} is not on {host} any more: it has ended, and no definition of it is stored there"
        return Failure(Reason.DOMAIN_NOT_FOUND, text, metadata)
    if fact.reason in _BY_SOMEBODY:
        text = f"guest {domain} does not run on {host} any more: somebody stopped it ({fact.reason})"
        return Failure(Reason.DOMAIN_NOT_RUNNING, text, metadata)
    text = f"guest {domain} does not run on {host} any more: its hypervisor process died ({fact.reason}); start the guest again"
    return Failure(Reason.GUEST_CRASHED, text, metadata)


def check_place_is_free(found: Domain, uuid: str, name: str, host: str) -> None:
    """Of what a destination has under the guest's UUID or name, only a stored definition of that guest, under that name, may stay,
    and no memory with it: the guest's next start would bring that back, over the disk of a later time.

    Raises:
        DroverError: DOMAIN_EXISTS.
    """
    stored = found.state in (DomainState.SHUTOFF, DomainState.CRASHED)
    if found.uuid == uuid and found.name == name and stored and not found.saved_image:
        return
    state = f"{found.state}, with a saved image of its memory" if found.saved_image else str(found.state)
    if found.uuid == uuid and found.saved_image:
        advice = (
            "its next start there would bring that memory back, over the disk as it is by then: remove the image there, "
            f"`virsh managedsave-remove {found.name}`"
        )
    elif found.uuid == uuid and stored:
        advice = f"undefine it there (virsh undefine {found.name}), or let the guest arrive under that name with --name {found.name}"
    elif found.uuid == uuid:
        advice = "it is this guest, or has its UUID: look at both before anything else"
    else:
        advice = "it is another guest: choose another host, or another name with --name"
    raise DroverError(
        Reason.DOMAIN_EXISTS,
        f"{host} already has a guest {found.name} ({found.uuid}), {state}; {advice}. Nothing was done to the guest",
        metadata={"host": host, "domain": found.name, "state": found.state},
    )


_PAUSES: Mapping[str, str] = {
    "ioerror": "mend its disk, then `virsh resume {name}`",
    "watchdog": "its watchdog has fired: look at the guest, then `virsh reset {name}` and `virsh resume {name}`",
    "migration": "a migration has left it so: make sure that it runs on no other host, then `virsh resume {name}`",
    "unknown": "a program has stopped it behind libvirt's back, or a migration has left it so: make sure that it runs on no other "
    "host, then `virsh resume {name}`",
    "save": "its state is being saved: wait for that",
    "dump": "its memory is being dumped: wait for that",
    "snapshot": "a snapshot is being taken: wait for that",
    "post-copy failed": "its post-copy has failed: destroy neither copy, and resume the transfer with libvirt's own tools",
}
"""What would help a guest that is paused for one of libvirt's reasons."""


def check_movable(domain: Domain, host: str) -> None:
    """A guest that runs, or that its user paused, and that no other job holds.

    Raises:
        DroverError: GUEST_CRASHED, DOMAIN_NOT_RUNNING, DOMAIN_BUSY.
    """
    if domain.reason == "crashed":
        raise DroverError(
            Reason.GUEST_CRASHED,
            f"the hypervisor process of guest {domain.name} on {host} has died; start the guest again",
        )
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED):
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {domain.name} on {host} is {domain.state}, and only a running guest can be migrated live; start it first",
            metadata={"state": domain.state},
        )
    if domain.silent_for:
        raise DroverError(
            Reason.DOMAIN_BUSY,
            f"the hypervisor process of guest {domain.name} on {host} has not answered for {domain.silent_for:.0f} s: it cannot be "
            f"moved now. See to its storage and its process, and try again when `virsh domcontrol {domain.name}` says ok",
            metadata={"host": host},
        )
    if domain.job is not Job.NONE or domain.incoming:
        raise DroverError(
            Reason.DOMAIN_BUSY,
            f"guest {domain.name} on {host} is held by another migration job ({domain.job}) that is not Drover's; wait for its end",
        )
    if domain.state is DomainState.PAUSED and domain.reason != PAUSED_BY_USER:
        advice = _PAUSES.get(domain.reason, "see to that, then `virsh resume {name}`").format(name=domain.name)
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {domain.name} on {host} is paused ({domain.reason}), and not by its user, so it would arrive running: {advice}. "
            "Nothing was done to the guest: it is paused as before",
            metadata={"host": host, "state": domain.state, "reason": domain.reason},
        )
