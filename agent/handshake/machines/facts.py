"""Pure functions from a guest's state, as the hypervisor reports it, to events of either side, and checks of it."""

from collections.abc import Mapping

from agent.handshake.machines.destination import DestinationEvent
from agent.handshake.machines.source import SourceEvent, SourceState
from agent.hypervisor.base import PAUSED_BY_USER, Domain, DomainState, Job
from agent.hypervisor.guest_fact import NO_PROCESS, GuestFact, GuestState
from agent.runtime.errors import DroverError, Reason
from agent.runtime.failure import Failure
from drover.agent.v1 import handshake_pb2 as pb


def source_fact(domain: Domain | None) -> SourceEvent | None:
    """Return the source's event for the guest's state; None while a job holds the guest or its process is ending."""
    if domain is None:
        return SourceEvent.SAW_DEAD
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        # A completed post-copy leaves the source shut off with the reason "migrated".
        return SourceEvent.SAW_STOPPED if domain.reason == "migrated" else SourceEvent.SAW_DEAD
    if domain.job is not Job.NONE or domain.ending:
        return None
    return SourceEvent.SAW_UNTOUCHED if domain.state is DomainState.RUNNING else SourceEvent.SAW_STOPPED


def destination_fact(domain: Domain | None) -> DestinationEvent | None:
    """Return the destination's event for the copy's state; None while it waits for its stream or its process is ending."""
    if domain is None:
        return DestinationEvent.SAW_ABSENT
    if domain.state in (DomainState.SHUTOFF, DomainState.CRASHED):
        # libvirt reports a copy that never ran as failed, destroyed, crashed or (after libvirtd's restart) unknown.
        return DestinationEvent.SAW_RUNNING if domain.has_run else DestinationEvent.SAW_ABSENT
    return None if domain.never_started or domain.ending else DestinationEvent.SAW_RUNNING


_BY_SOMEBODY = frozenset({"destroyed", "shutdown", "saved"})
"""libvirt's reasons for a guest that is shut off because somebody stopped it."""


def loss_of(domain: str, host: str, fact: GuestFact) -> Failure:
    """Return the failure for a guest that is lost on its host, by how it ended there."""
    metadata = {"host": host}
    if fact.state not in NO_PROCESS:
        text = f"guest {domain} is {fact.state} ({fact.reason}) on {host}, but the rest of its memory was lost with the other copy"
        return Failure(Reason.GUEST_CRASHED, f"{text}; start the guest again", metadata)
    if fact.state is GuestState.ABSENT and not fact.reason:
        text = f"guest {domain} is no longer on {host}: it has ended, and no definition of it is stored there"
        return Failure(Reason.DOMAIN_NOT_FOUND, text, metadata)
    if fact.reason in _BY_SOMEBODY:
        text = f"guest {domain} no longer runs on {host}: somebody stopped it ({fact.reason})"
        return Failure(Reason.DOMAIN_NOT_RUNNING, text, metadata)
    text = f"guest {domain} no longer runs on {host}: its hypervisor process died ({fact.reason}); start the guest again"
    return Failure(Reason.GUEST_CRASHED, text, metadata)


def check_place_is_free(found: Domain, uuid: str, name: str, host: str) -> None:
    """Check what a destination already has under the guest's UUID or name. Only a stored definition of that guest, under that name
    and without a saved image, is allowed: the next start would restore that image's memory over a disk that has changed since.

    Raises:
        DroverError: DOMAIN_EXISTS.
    """
    stored = found.state in (DomainState.SHUTOFF, DomainState.CRASHED)
    if found.uuid == uuid and found.name == name and stored and not found.saved_image:
        return
    state = f"{found.state}, with a saved image of its memory" if found.saved_image else str(found.state)
    if found.uuid == uuid and found.saved_image:
        advice = (
            "its next start there would restore that old memory over a disk that has changed since. Remove the image there: "
            f"`virsh managedsave-remove {found.name}`"
        )
    elif found.uuid == uuid and stored:
        advice = f"undefine it there (`virsh undefine {found.name}`), or migrate the guest under that name: --name {found.name}"
    elif found.uuid == uuid:
        advice = "it is this guest, or has the same UUID: check on both hosts which copy is the right one before anything else"
    else:
        advice = "it is another guest: choose another host, or another name with --name"
    raise DroverError(
        Reason.DOMAIN_EXISTS,
        f"{host} already has a guest {found.name} ({found.uuid}), {state}; {advice}. Nothing was done to the guest",
        metadata={"host": host, "domain": found.name, "state": found.state},
    )


_PAUSES: Mapping[str, str] = {
    "ioerror": "repair its disk, then `virsh resume {name}`",
    "watchdog": "its watchdog has fired: look at the guest, then `virsh reset {name}` and `virsh resume {name}`",
    "migration": "a migration left it paused: make sure that it runs on no other host, then `virsh resume {name}`",
    "unknown": "a program paused it behind libvirt's back, or a migration left it paused: make sure that it runs on no other "
    "host, then `virsh resume {name}`",
    "save": "its state is being saved: wait until that is done",
    "dump": "its memory is being dumped: wait until that is done",
    "snapshot": "a snapshot is being taken: wait until that is done",
    "post-copy failed": "its post-copy failed: destroy neither copy, and resume the transfer with libvirt's own tools",
}
"""What to do about a paused guest, by libvirt's reason for the pause."""


def check_movable(domain: Domain, host: str) -> None:
    """Check that the guest runs or was paused by its user, that its hypervisor answers, and that no other job holds it.

    Raises:
        DroverError: GUEST_CRASHED, DOMAIN_NOT_RUNNING, DOMAIN_BUSY.
    """
    if domain.reason == "crashed":
        raise DroverError(
            Reason.GUEST_CRASHED,
            f"guest {domain.name} does not run on {host}: its hypervisor process has died; start the guest again",
        )
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED):
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {domain.name} on {host} is {domain.state}; only a running guest can be migrated live, so start it first",
            metadata={"state": domain.state},
        )
    if domain.silent_for:
        raise DroverError(
            Reason.DOMAIN_BUSY,
            f"the hypervisor process of guest {domain.name} on {host} has not answered for {domain.silent_for:.0f} s, so the guest "
            f"cannot be moved now. Check its storage and its process; try again when `virsh domcontrol {domain.name}` says ok",
            metadata={"host": host},
        )
    if domain.job is not Job.NONE or domain.incoming:
        raise DroverError(
            Reason.DOMAIN_BUSY,
            f"guest {domain.name} on {host} is held by a migration job ({domain.job}) that is not Drover's; wait until it has ended",
        )
    if domain.state is DomainState.PAUSED and domain.reason != PAUSED_BY_USER:
        advice = _PAUSES.get(domain.reason, "remove the cause, then `virsh resume {name}`").format(name=domain.name)
        raise DroverError(
            Reason.DOMAIN_NOT_RUNNING,
            f"guest {domain.name} on {host} is paused ({domain.reason}), but not by its user, so it would arrive running: {advice}. "
            "Nothing was done to the guest: it is still paused there",
            metadata={"host": host, "state": domain.state, "reason": domain.reason},
        )


def sends(state: str | None, progress: pb.Progress | None) -> bool:
    """Return whether a source in this state, with this last reading of its transfer, sends memory. In post-copy it does so after the
    success of Perform, which hypervisors report at the switch, while the guest runs at the destination already."""
    if state in (SourceState.PERFORMED, SourceState.REMOVING):
        return progress is not None and progress.post_copy and progress.remaining_bytes > 0
    return state == SourceState.PERFORMING
