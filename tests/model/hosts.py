"""The hypervisors: what happens without a call, and the effects of calls, by `facts/libvirt.md`, sections 3 and 4.

A rule takes a part of the state and yields what may follow, as `(label, ..., cost)`.
"""

from collections.abc import Iterator

from agent.hypervisor.base import Domain, DomainState, Job
from tests.model.parts import Copy, Cost, Finish, Guest, Hosts, Stream
from tests.model.world import World

AT_HOME = (Guest.RUNNING, Guest.HELD)
"""States of a guest that no migration has stopped."""

WAITS = (Copy.INCOMING, Copy.COMPLETE)
"""States of a copy that never ran."""


def happens(world: World, hosts: Hosts) -> Iterator[tuple[str, Hosts, Cost]]:
    """Yield the steps that need no agent."""
    if hosts.stream is Stream.FLOWING:
        yield from _flow(world, hosts)
    if hosts.stream is Stream.POSTCOPY:
        done = hosts._replace(stream=Stream.DONE, finish=Finish.DONE)
        yield "hosts: the last page arrives", done, Cost.FREE
    if hosts.stream is Stream.BROKEN and hosts.copy is Copy.INCOMING and world.break_noticed:
        yield "hosts: destination notices the broken stream", without_copy(hosts), Cost.FREE
    if hosts.copy is Copy.COMPLETE and hosts.finish is Finish.WAITING:
        yield "hosts: Finish starts the guest", hosts._replace(copy=Copy.RUNNING, finish=Finish.DONE), Cost.FREE
    if undoes(hosts) and world.undone:
        yield "hosts: the copy goes with its connection", without_copy(hosts), Cost.FREE
    if hosts.copy in WAITS:
        yield "hosts: destination QEMU dies", without_copy(hosts), Cost.QEMU
    if hosts.guest in (Guest.RUNNING, Guest.PAUSED, Guest.HELD) and hosts.stream is not Stream.POSTCOPY:
        yield "hosts: source QEMU dies", guest_dies(hosts), Cost.QEMU


def undoes(hosts: Hosts) -> bool:
    """Return whether libvirt destroys the copy as soon as it notices that the connection that prepared it is closed: nobody has
    called Finish, so nothing can start the copy before."""
    return hosts.copy in WAITS and hosts.finish is Finish.NONE and not hosts.owned


def _flow(world: World, hosts: Hosts) -> Iterator[tuple[str, Hosts, Cost]]:
    switched = hosts._replace(guest=_stopped(hosts.guest), stream=Stream.DONE)
    yield "hosts: the whole state arrives", switched._replace(copy=Copy.COMPLETE), Cost.FREE
    yield "hosts: the stream breaks", _cut(hosts), Cost.FAIL
    lost = without_copy(switched) if world.break_noticed else switched
    yield "hosts: sent to the last byte, which is lost", lost, Cost.FAIL
    if world.torn_end:
        torn = hosts._replace(stream=Stream.BROKEN, copy=Copy.COMPLETE)
        yield "hosts: all arrives, and the source believes it failed", torn, Cost.FAIL
    if world.postcopy and hosts.finish is Finish.WAITING:
        switch = hosts._replace(guest=_stopped(hosts.guest), stream=Stream.POSTCOPY, copy=Copy.RUNNING)
        yield "hosts: switched to post-copy", switch, Cost.FREE


def guest_dies(hosts: Hosts) -> Hosts:
    """End the source's QEMU, and with it the stream."""
    return _cut(hosts)._replace(guest=Guest.LOST, locked=False)


def _stopped(guest: Guest) -> Guest:
    return Guest.PAUSED if guest is Guest.RUNNING else guest


def _cut(hosts: Hosts) -> Hosts:
    return hosts._replace(stream=Stream.BROKEN) if hosts.stream is Stream.FLOWING else hosts


def without_copy(hosts: Hosts) -> Hosts:
    """Remove the copy: destroyed by libvirt or by hand, or failed."""
    copy = {Copy.RUNNING: Copy.KILLED, Copy.AWAY: Copy.AWAY}.get(hosts.copy, Copy.NONE)
    finish = Finish.FAILED if hosts.finish is Finish.WAITING else hosts.finish
    return _cut(hosts)._replace(copy=copy, finish=finish, owned=False)


def prepared(hosts: Hosts, *, owned: bool = True) -> Hosts:
    """Create an empty copy that listens."""
    return hosts._replace(stream=Stream.NONE, copy=Copy.INCOMING, finish=Finish.NONE, owned=owned)


def aborted(hosts: Hosts) -> Hosts:
    """Abort the job: before the switch-over the guest runs on at the source."""
    return _cut(hosts)


def source_domain(hosts: Hosts) -> Domain | None:
    """Return the guest as the source's hypervisor reports it."""
    if hosts.guest is Guest.REMOVED:
        return None
    state, reason = {
        Guest.RUNNING: (DomainState.RUNNING, "migration canceled"),
        Guest.PAUSED: (DomainState.PAUSED, "migration"),
        Guest.HELD: (DomainState.PAUSED, "user"),
        Guest.LOST: (DomainState.SHUTOFF, "crashed"),
    }[hosts.guest]
    job = Job.OUTGOING if hosts.stream in (Stream.FLOWING, Stream.POSTCOPY) else Job.NONE
    return _domain(state, reason, job, incoming=False)


def destination_domain(hosts: Hosts) -> Domain | None:
    """Return the copy as the destination's hypervisor reports it."""
    if hosts.copy in (Copy.NONE, Copy.KILLED, Copy.AWAY):
        return None
    if hosts.copy in WAITS:
        return _domain(DomainState.PAUSED, "migration", Job.INCOMING, incoming=True)
    if hosts.copy is Copy.RAN:
        return _domain(DomainState.SHUTOFF, "crashed", Job.NONE, incoming=False)
    return _domain(DomainState.RUNNING, "migrated", Job.NONE, incoming=False)


def _domain(state: DomainState, reason: str, job: Job, *, incoming: bool) -> Domain:
    return Domain("guest", "", state, reason, 0, 1, persistent=True, job=job, incoming=incoming)
