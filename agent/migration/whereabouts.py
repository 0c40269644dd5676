"""Where a guest is, from the last reports of both hosts' hypervisors. Pure.

Everything that shows where a guest runs (the migration resource, errors of the client, the command line and its exit codes) uses
`whereabouts`, never the state of a migration or a plan."""

from dataclasses import dataclass
from enum import StrEnum

from drover.agent.v1 import handshake_pb2
from drover.agent.v1 import migration_pb2 as pb

_RUNS = handshake_pb2.GUEST_STATE_RUNNING
_STANDS = (handshake_pb2.GUEST_STATE_PAUSED, handshake_pb2.GUEST_STATE_OTHER)
_NO_PROCESS = (handshake_pb2.GUEST_STATE_SHUTOFF, handshake_pb2.GUEST_STATE_CRASHED, handshake_pb2.GUEST_STATE_ABSENT)
_ENDED = (pb.MIGRATION_STATE_SUCCEEDED, pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED)
BY_MIGRATION = ("migration", "post-copy", "unknown")
"""Reasons of a pause at the source by a migration; with ``unknown`` the guest is held until the decision."""
MOVED = "moved or removed"
"""Reason in the fact of a guest that is leaving or has left its host without the migration that waits there for it."""
_BROKEN = "post-copy failed"
_STATE_NAMES = {number: name.removeprefix("GUEST_STATE_").lower() for name, number in handshake_pb2.GuestState.items() if number}


class Place(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere"
    """It has no process on either host."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Whereabouts:
    """Where a guest is, as last seen."""

    place: Place
    runs_on: str
    """The host on which it runs. Empty: it does not run, or that is unknown."""
    sentence: str
    """For a person, beginning with the guest's name in quotes."""
    usual: bool = True
    """It runs, or its user has paused it."""


def whereabouts(migration: pb.Migration) -> Whereabouts:
    """Return where a guest is, from the facts of both hosts. The destination's comes first: the guest runs there only after the
    decision. The fact of a host that an operator declared dead does not count."""
    name = f'"{migration.domain_name or migration.spec.domain}"'
    here, there = migration.source_host or migration.spec.source_host, migration.destination_host or migration.spec.destination_host
    dead = migration.statement.dead_host
    src, dst = migration.source_guest, migration.destination_guest
    if not (migration.HasField("source_guest") or migration.HasField("destination_guest")):
        return _by_driver(migration, name, here, there)
    if src.reason == MOVED and dst.state not in (_RUNS, *_STANDS):
        sentence = f"{name} is leaving or has left {here} without this migration: another one moves it, or somebody has removed it"
        return Whereabouts(Place.UNKNOWN, "", f"{sentence}; `drover domain list` shows where it is", usual=False)
    if src.reason == _BROKEN and dst.state in _NO_PROCESS:
        sentence = f"{name} runs nowhere: {there} had a part of its memory, and its copy is gone; start it again"
        return Whereabouts(Place.NOWHERE, "", sentence, usual=False)
    if _BROKEN in (src.reason, dst.reason):
        sentence = f"{name} has its memory in two parts, on {here} and on {there}: its stream broke after the switch to post-copy"
        return Whereabouts(Place.UNKNOWN, "", f"{sentence}; destroy neither copy", usual=False)
    unknown = Whereabouts(Place.UNKNOWN, "", _unknown_sentence(name, (here, src), (there, dst)), usual=False)
    if migration.state == pb.MIGRATION_STATE_OUTCOME_UNKNOWN:
        return unknown
    if dst.state in (_RUNS, *_STANDS) and dead != there:
        return _is_on(Place.DESTINATION, name, there, dst, migration)
    if dead == here:
        sentence = f"{name} runs nowhere: {here}, where it was, was declared dead by an operator; start it again on another host"
        return Whereabouts(Place.NOWHERE, "", sentence, usual=False)
    ended = migration.state in _ENDED
    if src.state == _RUNS or (src.state in _STANDS and (ended or src.reason not in BY_MIGRATION)):
        return _is_on(Place.SOURCE, name, here, src, migration)
    waits = dst.state == handshake_pb2.GUEST_STATE_WAITING and not ended and dead != there
    if src.state in _NO_PROCESS and not waits:
        host, fact = (there, dst) if migration.state == pb.MIGRATION_STATE_SUCCEEDED and dst.state else (here, src)
        return Whereabouts(Place.NOWHERE, "", f"{name} runs nowhere: {_why_nowhere(host, fact)}", usual=False)
    return unknown


def _is_on(place: Place, name: str, host: str, fact: handshake_pb2.GuestFact, migration: pb.Migration) -> Whereabouts:
    silence = f"{fact.silence}" or (f"{host} does not answer" if host in migration.silent_hosts else "")
    when = f" when its hypervisor last answered, at {_clock(fact)} ({silence})" if silence else ""
    if fact.state == _RUNS:
        return Whereabouts(place, host, f"{name} {'ran' if when else 'runs'} on {host}{when}")
    wanted = fact.reason == "user"
    sentence = f"{name} {'was' if when else 'is'} {_state(fact)} on {host}{when}"
    advice = "" if wanted else f"; to let it run: `virsh resume` on {host}"
    return Whereabouts(place, "", sentence + advice, usual=wanted)


def _unknown_sentence(name: str, *hosts: tuple[str, handshake_pb2.GuestFact]) -> str:
    reports = ", ".join(f"{host} last reported {_state(fact)} at {_clock(fact)}" for host, fact in hosts if fact.state)
    return f"{name} is on {hosts[0][0]} or on {hosts[1][0]}; it is unknown on which{f' ({reports})' if reports else ''}"


def said(host: str, fact: handshake_pb2.GuestFact) -> str:
    """Return a clause with the last report of a host's hypervisor on the guest."""
    if not fact.state:
        return f"{host} has not reported on the guest yet"
    return f"{host} last reported that the guest is {_state(fact)} there, at {_clock(fact)}"


def _state(fact: handshake_pb2.GuestFact) -> str:
    state = _STATE_NAMES.get(fact.state, "in a state that this version does not know")
    return f"{state} ({fact.reason})" if fact.reason else state


def _clock(fact: handshake_pb2.GuestFact) -> str:
    return f"{fact.see_time.ToDatetime():%H:%M:%S} UTC" if fact.HasField("see_time") else "an unknown time"


def _why_nowhere(host: str, fact: handshake_pb2.GuestFact) -> str:
    if fact.state == handshake_pb2.GUEST_STATE_CRASHED:
        return f"its QEMU on {host} died; start it again"
    if fact.state == handshake_pb2.GUEST_STATE_ABSENT:
        return f"{host} has no such guest any more; define and start it again if it is to run"
    return f"it is {_state(fact)} on {host}; start it again if it is to run"


def _by_driver(migration: pb.Migration, name: str, here: str, there: str) -> Whereabouts:
    """Return where the guest is by the driver's report, for older agents, which report no facts."""
    if migration.runs_on and migration.state != pb.MIGRATION_STATE_OUTCOME_UNKNOWN:
        place = Place.DESTINATION if migration.runs_on == there else Place.SOURCE
        return Whereabouts(place, migration.runs_on, f"{name} runs on {migration.runs_on}")
    if migration.state in _ENDED:
        return Whereabouts(Place.NOWHERE, "", f"{name} runs nowhere; start it again if it is to run", usual=False)
    return Whereabouts(Place.UNKNOWN, "", f"{name} is on {here} or on {there}; it is unknown on which", usual=False)
