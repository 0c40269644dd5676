"""What must hold in every state, and what an end is.

By requirement: R1 at most one copy runs, and none goes back in time; also why this holds (removed only on RUNNING, resumed only
on GONE, recorded before it may start, reported only when durable). R2 an end can be reached from every state, if those that died
come back. R3 stale attempts are refused and ended records stay, whatever arrives twice. R4 a cancel can be obeyed until the guest
has left. R5 KEPT: the guest runs at the source; no guest is destroyed. R6 all of this holds over any restart.
"""

from collections.abc import Callable, Iterator

from agent.handshake.machines.destination import DestinationState as Dst
from agent.handshake.machines.source import SourceState as Src
from tests.model import network
from tests.model.agents import FENCE, FINAL, ONLY_COPY, PATH
from tests.model.hosts import AT_HOME, WAITS, undoes
from tests.model.parts import Agent, Answer, Copy, Finish, Guest, Hosts, Mode, Talk

Rule = Callable[[Agent, Agent, Hosts], bool]
"""Returns whether the rule is broken, by source, destination and hypervisors."""


def _two_run(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    return hosts.guest is Guest.RUNNING and hosts.copy in (Copy.RUNNING, Copy.AWAY)


def _lost(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """A guest that ran was destroyed, or the only copy that could run was."""
    gone = hosts.guest is Guest.REMOVED and hosts.copy not in (Copy.RUNNING, Copy.RAN, Copy.AWAY)
    return hosts.copy is Copy.KILLED or gone


def _goes_back(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """The guest ran at the destination, and now an older state of it runs at the source, on disks that have changed since. An
    operator who declares a host dead accepts that."""
    return hosts.copy in (Copy.RAN, Copy.KILLED) and hosts.guest is Guest.RUNNING and not source.statement


def _removed_early(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    leaving = source.state in (Src.REMOVING, Src.REMOVED) or hosts.guest is Guest.REMOVED
    return leaving and not (destination.state == Dst.RUNNING and destination.attempt == source.attempt)


def _resumed_early(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """The guest was paused by a completed Perform: only a durable GONE, or an operator's word, lets it run."""
    gone = destination.state == Dst.GONE and destination.attempt == source.attempt
    return source.state == Src.RESUMING and not (gone or source.statement)


def _gone_is_not_gone(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """A copy that libvirt destroys, as its agent died before it was recorded, does not count: nothing starts it."""
    here = hosts.copy is Copy.RUNNING or (hosts.copy in WAITS and not undoes(hosts))
    return destination.state == Dst.GONE and here


def _running_is_not_running(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    return destination.state == Dst.RUNNING and hosts.copy not in (Copy.RUNNING, Copy.RAN, Copy.AWAY)


def _kept_is_not_kept(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    return source.state == Src.KEPT and hosts.guest not in (*AT_HOME, Guest.LOST)


def _started_unrecorded(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """The copy may start, or has started, and the record does not show it."""
    armed = hosts.copy is Copy.RUNNING or (hosts.copy in WAITS and hosts.finish is Finish.WAITING)
    return armed and destination.durable not in (Dst.ARMED, Dst.ABANDONING, Dst.RUNNING)


TWO_RUN = "at most one copy runs"
LOST = "no guest is destroyed"
GOES_BACK = "no guest goes back in time"
REMOVED_ON_RUNNING = "the source is removed only on RUNNING"
RESUMED_ON_GONE = "the source resumes only on GONE"
GONE_IS_GONE = "GONE: no copy, and none ever"
RUNNING_IS_RUNNING = "RUNNING: it runs"
KEPT_IS_KEPT = "KEPT: it runs at the source"
RECORDED = "ARMED is recorded before the copy may start"

RULES: dict[str, Rule] = {
    TWO_RUN: _two_run,
    LOST: _lost,
    GOES_BACK: _goes_back,
    REMOVED_ON_RUNNING: _removed_early,
    RESUMED_ON_GONE: _resumed_early,
    GONE_IS_GONE: _gone_is_not_gone,
    RUNNING_IS_RUNNING: _running_is_not_running,
    KEPT_IS_KEPT: _kept_is_not_kept,
    RECORDED: _started_unrecorded,
}

TOLD = "only a durable decision is told"
STUCK = "an end can be reached"
CANCEL = "a cancel can be obeyed"
FORGOTTEN = "a cancel that was acknowledged is kept"

HARM = frozenset({TWO_RUN, LOST, GOES_BACK})
"""Rules whose violation harms the user. The other rules are the reasons why these hold."""

ALL = frozenset({*RULES, TOLD, STUCK, CANCEL, FORGOTTEN, network.DECIDE, FINAL, FENCE, ONLY_COPY, PATH})


def broken(source: Agent, destination: Agent, hosts: Hosts) -> Iterator[str]:
    """Return the names of the rules that this state breaks."""
    return (name for name, rule in RULES.items() if rule(source, destination, hosts))


def told_wrong(destination: Agent, talk: Talk) -> bool:
    """Return whether a driver knows, or an answer contains, a decision that is not the durable record. RUNNING and GONE are final,
    so never both were reported; an earlier attempt's record is not kept, and can only have been GONE."""
    if destination.statement:
        return False  # it ran here, until an operator's word took it
    return any(
        state != (destination.state if attempt == destination.attempt else Dst.GONE) or attempt > destination.attempt
        for attempt, state in _told(talk)
    )


def _told(talk: Talk) -> set[tuple[int, str]]:
    """Return the decisions that drivers know and answers contain, each with its attempt."""
    views = {(d.attempt, d.dst) for d in talk.drivers if d.mode in (Mode.ON, Mode.LOOK_DESTINATION) and not d.foreign}
    answers = {(m.attempt, m.answer.state) for m in talk.flying if isinstance(m.answer, Answer) and m.call not in network.TO_SOURCE}
    return {(attempt, state) for attempt, state in views | answers if state in (Dst.RUNNING, Dst.GONE)}


def settled(source: Agent, destination: Agent, hosts: Hosts) -> bool:
    """Return whether both records have ended and agree, with each other and with the hypervisors. A host that no call has reached
    has no record."""
    if source.state == Src.REMOVED:
        return hosts.guest is Guest.REMOVED and destination.state == Dst.RUNNING
    return at_home(source, hosts) and destination.state in (None, Dst.GONE) and hosts.copy in (Copy.NONE, Copy.RAN)


def at_home(source: Agent, hosts: Hosts) -> bool:
    """Return whether the guest stayed at the source, or died there without the migration's doing."""
    return source.state in (None, Src.KEPT) and hosts.guest in (*AT_HOME, Guest.LOST)


def cancelled(source: Agent, hosts: Hosts, talk: Talk) -> bool:
    """Return whether a driver was told to cancel and the guest has not left yet."""
    told = any(d.cancel and d.mode is Mode.ON and d.attempt >= source.attempt for d in talk.drivers)
    return told and hosts.guest in AT_HOME and hosts.copy in (Copy.NONE, Copy.INCOMING)


def forgotten(talk: Talk) -> bool:
    """Return whether a driver goes on although it has acknowledged a cancel to its user."""
    return any(d.mode is Mode.ON and d.told and not d.cancel for d in talk.drivers)


def nobody_drives(source: Agent, talk: Talk) -> bool:
    """Return whether every driver has seen the end, is dead, or drives an attempt that has been followed by another."""
    return all(d.mode in (Mode.OFF, Mode.ENDED, Mode.DEAD) or d.attempt < source.attempt for d in talk.drivers)
