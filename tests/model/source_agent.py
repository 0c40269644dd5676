"""The source's agent: its effects on the hypervisor, and their reports. Mirrors `agent.handshake.host.source_effects`."""

from collections.abc import Iterator

from agent.handshake.machines.decision import source_obeys
from agent.handshake.machines.destination import DestinationState
from agent.handshake.machines.source import SourceEffect, SourceEvent, SourceState
from tests.model.agents import NO_WORK, PATH, finish_work, restarted, take, take_turn, written
from tests.model.hosts import AT_HOME, aborted, guest_dies, source_domain
from tests.model.parts import Agent, Copy, Cost, Guest, Hosts, Stage, Stream, Violation, Work
from tests.model.world import World

_S, _E, _F = SourceState, SourceEvent, SourceEffect

Step = tuple[str, Agent, Hosts, Cost]


def steps(world: World, agent: Agent, hosts: Hosts) -> Iterator[Step]:
    """Yield what the agent may do next with its hypervisor and its journal."""
    if hosts.locked and world.undone and not _holds_lock(agent):
        yield "hosts: the source lets go of the guest with the connection", agent, hosts._replace(locked=False), Cost.FREE
    if not agent.up:
        yield "source: restarts", tidy(restarted(world, world.source, agent, _E.RESTARTED)), hosts, Cost.FREE
        if not agent.dead and hosts.guest is not Guest.REMOVED and hosts.stream is not Stream.POSTCOPY:
            yield "hosts: the source's host dies, too", agent._replace(dead=True), guest_dies(hosts), Cost.HOST
        return
    if agent.behind is not None:
        yield f"source: the journal has {agent.state}", written(agent), hosts, Cost.FREE
    for work in sorted(agent.work):
        for label, after, hosts_after, cost in _work(world, agent, hosts, work):
            yield label, tidy(after), hosts_after, cost


def _work(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    if work.stage is Stage.NEWS:
        event, statement = _E(work.what.removesuffix(_BY_STATEMENT)), work.what.endswith(_BY_STATEMENT)
        after = take(world, world.source, finish_work(agent, work), event)
        yield f"source: records {work.what}", after._replace(statement=after.statement or statement), hosts, Cost.FREE
    elif work.stage is Stage.TURN:
        yield f"source: the turn of {work.what} comes", _turn(world, agent, work), hosts, Cost.FREE
    elif work.what in _READS:
        return  # it waits for the destination's answer: see `reads`
    elif work.stage is Stage.CALLED:
        yield from _performing(agent, hosts, work)
    else:
        yield from _EFFECTS[_F(work.what)](world, agent, hosts, work)


UNCHECKED, ASTRAY = ", unchecked", ", astray"


def _turn(world: World, agent: Agent, work: Work) -> Agent:
    event = _E(work.what.split(",")[0])
    unchecked = agent.state in DECIDED_BY_OTHER if event in _CONFIRMS else agent.state == _S.BEGUN and UNCHECKED in work.what
    after = take_turn(world, world.source, agent, work, event, unchecked=unchecked)
    if ASTRAY in work.what and (agent.state, after.state) == (_S.BEGUN, _S.PERFORMING) and world.checked(PATH):
        raise Violation(PATH, "a Perform whose URI nobody has compared with the destination's record")
    return after


def _begin(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    failed = finish_work(agent, work, _E.BEGIN_FAILED)
    if hosts.guest not in AT_HOME:
        yield "source: Begin finds no guest that runs", failed, hosts, Cost.FREE
        return
    if hosts.locked:  # by a call before a restart, whose closed connection libvirtd has not noticed yet
        yield "source: Begin finds the guest held", failed, hosts, Cost.FREE
        return
    done = finish_work(agent, work, _E.BEGIN_DONE)
    yield "source: Begin locks the guest", done, hosts._replace(locked=True), Cost.FREE
    yield "source: Begin fails", failed, hosts, Cost.FAIL


def _holds_lock(agent: Agent) -> bool:
    """Return whether the agent called Begin since its last start, so that the connection is still open."""
    return agent.up and agent.state in (_S.BEGINNING, _S.BEGUN) and Work(Stage.START, _F.BEGIN) not in agent.work


def _perform(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    failed = finish_work(agent, work, _E.PERFORM_FAILED)
    if hosts.guest in AT_HOME and (hosts.copy, hosts.stream) == (Copy.INCOMING, Stream.NONE):
        called = agent._replace(work=agent.work - {work} | {Work(Stage.CALLED, _F.PERFORM)})
        yield "source: Perform, the memory flows", called, hosts._replace(stream=Stream.FLOWING, locked=False), Cost.FREE
        yield "source: Perform fails before it connects", failed, hosts, Cost.FAIL
    else:
        yield "source: Perform finds nobody to connect to", failed, hosts, Cost.FREE


def _performing(agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Perform ends with the stream."""
    failed = finish_work(agent, work, _E.PERFORM_FAILED)
    if hosts.stream is Stream.DONE:
        yield "source: Perform returns", finish_work(agent, work, _E.PERFORM_DONE), hosts, Cost.FREE
    elif hosts.stream in (Stream.BROKEN, Stream.NONE):
        yield "source: Perform fails", failed, hosts, Cost.FREE
    elif hosts.stream is Stream.FLOWING:
        yield "source: libvirtd's answer to Perform is lost", failed, hosts, Cost.FAIL


def _abort(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Abort is repeated until Perform has ended; `tidy` ends it."""
    if hosts.stream is Stream.FLOWING:
        yield "source: aborts the job", agent, aborted(hosts), Cost.FREE


def _look(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    fact = world.source_fact(source_domain(hosts))
    if fact is not None:
        yield f"source: looks, {fact}", finish_work(agent, work, fact), hosts, Cost.FREE


def _remove(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    removed = hosts._replace(guest=Guest.REMOVED)
    yield "source: removes its copy", finish_work(agent, work, _E.REMOVE_DONE), removed, Cost.FREE


def _resume(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    resumed = hosts._replace(guest=Guest.RUNNING, stream=Stream.NONE) if hosts.guest is Guest.PAUSED else hosts
    yield "source: resumes the guest", finish_work(agent, work, _E.RESUME_DONE), resumed, Cost.FREE


DECIDED_BY_OTHER = (_S.PERFORMED, _S.LOST)
"""States in which the guest is stopped here and only the destination's record decides."""

_BY_STATEMENT = " by statement"
_CONFIRMS = (_E.CONFIRM_RUNNING, _E.CONFIRM_GONE)
_READS = {
    "read": None,
    "read, relayed running": DestinationState.RUNNING,
    "read, relayed gone": DestinationState.GONE,
    "read, stated dead": None,
}
"""By question to the destination: the record that counts if the destination does not answer."""


def begins_to_read(agent: Agent, event: SourceEvent, *, relayed: bool, statement: bool) -> Agent:
    """Take a Confirm: it prompts the agent to read the destination's record."""
    if statement:
        what = "read, stated dead"
    elif relayed:
        what = "read, relayed running" if event is _E.CONFIRM_RUNNING else "read, relayed gone"
    else:
        what = "read"
    return agent._replace(work=agent.work | {Work(Stage.CALLED, what)}, quiet=False)


def reads(agent: Agent, destination: Agent) -> Iterator[tuple[str, Agent, Agent, Cost]]:
    """Read the destination's record as it is now; the event that follows from it is taken later."""
    for work in sorted(agent.work):
        if work.stage is not Stage.CALLED or work.what not in _READS:
            continue
        if destination.up:
            after = _read(agent, work, _record_of(agent, destination), answered=True)
            yield "source: reads the destination's record", after, destination, Cost.FREE
        after = _read(agent, work, _READS[work.what], answered=False)
        cost = Cost.LOSE if destination.up else Cost.FREE
        yield "source: cannot reach the destination", after, destination, cost


def _record_of(agent: Agent, destination: Agent) -> DestinationState | None:
    """Return the destination's state in this attempt. An attempt that a later one followed has ended, and can only be GONE."""
    if destination.attempt > agent.attempt:
        return DestinationState.GONE
    return DestinationState(destination.state) if destination.attempt == agent.attempt and destination.state else None


def _read(agent: Agent, work: Work, state: DestinationState | None, *, answered: bool) -> Agent:
    stated = work.what == "read, stated dead"
    event = source_obeys(state, answered=answered, stated_dead=stated)
    by_statement = _BY_STATEMENT if stated and not answered and event is _E.CONFIRM_GONE else ""
    return tidy(finish_work(agent, work, event and f"{event}{by_statement}"))


_EFFECTS = {
    _F.BEGIN: _begin,
    _F.PERFORM: _perform,
    _F.ABORT: _abort,
    _F.LOOK: _look,
    _F.REMOVE: _remove,
    _F.RESUME: _resume,
}


def tidy(agent: Agent) -> Agent:
    """Drop work that cannot matter any more, so that equal futures are equal states.

    RELEASE only closes a connection; an abort ends with Perform; reports for an ended attempt are stale.
    """
    work = agent.work - {Work(Stage.START, _F.RELEASE)}
    if agent.state != _S.PERFORMING:
        work -= {Work(Stage.START, _F.ABORT)}
    if agent.state not in DECIDED_BY_OTHER:
        work = frozenset(w for w in work if w.stage is Stage.TURN or (w.what not in _READS and not w.what.startswith(_CONFIRMS)))
    if agent.state in (_S.REMOVED, _S.KEPT):
        work = NO_WORK
    return agent if work == agent.work else agent._replace(work=work)


def silence(world: World, agent: Agent) -> tuple[Agent, bool]:
    """Let the timer of the driver's silence run out, once. Return the agent after that, and whether it takes over."""
    alone = agent.state in (_S.BEGINNING, _S.BEGUN)
    after = take(world, world.source, agent._replace(quiet=True), _E.DRIVER_SILENT)
    return tidy(after), not alone


def may_be_silent(agent: Agent) -> bool:
    return agent.up and not agent.quiet and agent.state is not None and agent.state not in (_S.REMOVED, _S.KEPT)
