"""The destination's agent: its effects on the hypervisor, and their reports. Mirrors `agent.handshake.host.destination_effects`."""

from collections.abc import Iterator

from agent.handshake.machines.decision import destination_yields, yields_unrecorded
from agent.handshake.machines.destination import DestinationEffect, DestinationEvent, DestinationState
from agent.handshake.machines.source import SourceState
from tests.model.agents import FINISH_STARTS, ONLY_COPY, crashed, finish_work, restarted, take, take_turn, write_late, written
from tests.model.hosts import WAITS, destination_domain, prepared, source_domain, without_copy
from tests.model.parts import Agent, Copy, Cost, Finish, Guest, Hosts, Stage, Stream, Violation, Work
from tests.model.world import World

_S, _E, _F = DestinationState, DestinationEvent, DestinationEffect

Step = tuple[str, Agent, Hosts, Cost]

_FINAL = (_S.RUNNING, _S.GONE)


def steps(world: World, agent: Agent, hosts: Hosts) -> Iterator[Step]:
    """Yield what the agent may do next with its hypervisor and its journal, and how it and its QEMU may die."""
    running, seen = hosts.copy is Copy.RUNNING, world.copy_dies_early or agent.state == _S.RUNNING
    if running and seen:
        yield "hosts: destination QEMU dies, having run", agent, hosts._replace(copy=Copy.RAN), Cost.QEMU
    if not agent.up:
        if not agent.dead:
            yield "destination: restarts", back(world, agent), hosts, Cost.FREE
        return
    if agent.state is not None:
        yield "destination: dies", crashed(agent), hosts._replace(owned=False), Cost.CRASH_DESTINATION
        if not running or seen:
            off = hosts._replace(copy=Copy.RAN) if running else without_copy(hosts)
            yield "hosts: the destination's host dies", crashed(agent)._replace(dead=True), off, Cost.HOST
    if agent.behind is not None:
        yield f"destination: the journal has {agent.state}", written(agent), hosts, Cost.FREE
    if running and agent.state == _S.RUNNING and not (world.asks_before_leaving and agent.work & {_ASKS_OWNER, _DISOWNED}):
        yield "hosts: the guest moves on to a third host", agent, hosts._replace(copy=Copy.AWAY), Cost.MOVE
    for work in sorted(agent.work):
        for label, after, hosts_after, cost in _work(world, agent, hosts, work):
            came = after.state == _S.RUNNING != agent.state and world.may(Cost.MOVE)
            yield label, tidy(after._replace(work=after.work | {_ASKS_OWNER}) if came else after), hosts_after, cost


def back(world: World, agent: Agent) -> Agent:
    """Restart the agent. If a guest came here, it asks the source whether this host was declared dead meanwhile."""
    after = restarted(world, world.destination, agent, _E.RESTARTED)
    return tidy(after._replace(work=after.work | {_ASKS_OWNER}) if after.state == _S.RUNNING else after)


def _work(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    what = work.what
    if work.stage is Stage.NEWS:
        if what in (_E.ABANDON_DONE, _E.ABANDON_REFUSED) and FINISH_STARTS in agent.work and world.abandon_awaits_finish:
            return
        after = take(world, world.destination, finish_work(agent, work), _E(what))
        after = after._replace(statement=after.statement or what == _E.DISOWNED)
        yield f"destination: records {what}", after, hosts, Cost.FREE
    elif work.stage is Stage.TURN:
        after = take_turn(world, world.destination, agent, work, _E(what), unchecked=agent.state == _S.ARMED)
        yield f"destination: the turn of {what} comes", after, hosts, Cost.FREE
    elif work.stage is Stage.WRITE:
        after = write_late(world, world.destination, agent, work, _E(what))
        yield f"destination: records {what}, late", after, hosts, Cost.FREE
    elif work.stage is Stage.CALLED:
        yield from _UNDER_WAY[what](world, agent, hosts, work)
    else:
        yield from _EFFECTS[_F(what)](world, agent, hosts, work)


def _prepare(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    failed = finish_work(agent, work, _E.PREPARE_FAILED)
    if hosts.copy in WAITS or hosts.copy is Copy.RUNNING:
        yield "destination: Prepare is refused, a copy is here", failed, hosts, Cost.FREE
        return
    yield "destination: Prepare makes the copy", finish_work(agent, work, _E.PREPARE_DONE), prepared(hosts), Cost.FREE
    yield "destination: Prepare fails", failed, hosts, Cost.FAIL
    yield "destination: Prepare times out, a copy is made", failed, prepared(hosts, owned=False), Cost.FAIL


def _finish(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    if hosts.copy in WAITS and hosts.finish is not Finish.WAITING:
        called = agent._replace(work=agent.work - {work} | {Work(Stage.CALLED, _F.FINISH)})
        yield "destination: Finish waits in libvirtd", called, hosts._replace(finish=Finish.WAITING), Cost.FREE
    else:
        yield "destination: Finish finds no copy", finish_work(agent, work, _E.FINISH_FAILED), hosts, Cost.FREE


def _finishing(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Finish ends when the guest has started or the copy is gone."""
    if hosts.finish is Finish.DONE:
        yield "destination: Finish returns", finish_work(agent, work, _E.FINISH_DONE), hosts, Cost.FREE
    elif hosts.finish in (Finish.FAILED, Finish.NONE):
        yield "destination: Finish fails", finish_work(agent, work, _E.FINISH_FAILED), hosts, Cost.FREE
    else:
        unknown = finish_work(agent, work, _E.FINISH_UNKNOWN)
        yield "destination: libvirtd's answer to Finish is lost", unknown, hosts, Cost.FAIL
        news = Work(Stage.NEWS, _E.SAW_RUNNING)
        if hosts.stream is Stream.POSTCOPY and agent.state == _S.ARMED and news not in agent.work:
            yield "destination: sees it run in post-copy", agent._replace(work=agent.work | {news}), hosts, Cost.FREE


def _abandon(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Abandon waits for a Prepare under way. A careful hypervisor checks that the copy never ran and destroys it in one step; a
    careless one takes two."""
    if Work(Stage.START, _F.PREPARE) in agent.work:
        return
    done = finish_work(agent, work, _E.ABANDON_DONE)
    if hosts.copy is Copy.RUNNING:
        yield "destination: cannot abandon, it runs", finish_work(agent, work, _E.ABANDON_REFUSED), hosts, Cost.FREE
    elif hosts.copy not in WAITS:
        yield "destination: nothing to abandon", done, hosts, Cost.FREE
    elif world.careless_abandon:
        called = agent._replace(work=agent.work - {work} | {Work(Stage.CALLED, _F.ABANDON)})
        yield "destination: is about to destroy the copy", called, hosts, Cost.FREE
    else:
        if hosts.copy is Copy.COMPLETE and hosts.guest is Guest.LOST and world.checked(ONLY_COPY):
            raise Violation(ONLY_COPY, "the whole state is here, and only here; and the copy is destroyed")
        yield "destination: destroys the copy", done, without_copy(hosts), Cost.FREE


def _abandoning(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    done = finish_work(agent, work, _E.ABANDON_DONE)
    yield "destination: destroys the copy", done, without_copy(hosts), Cost.FREE


def _look(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    fact = world.destination_fact(destination_domain(hosts))
    if fact is not None:
        yield f"destination: looks, {fact}", finish_work(agent, work, fact), hosts, Cost.FREE


def _disown(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    stopped = hosts._replace(copy=Copy.RAN) if hosts.copy is Copy.RUNNING else without_copy(hosts)
    done = finish_work(agent, work, _E.ABANDON_DONE)
    yield "destination: removes the copy that it was told is not its own", done, stopped, Cost.FREE


def _asking(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """No step: it waits for the source's answer, see `asks`."""
    yield from ()


def _asks_for_guest(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """The source has no record, so its hypervisor is asked for the guest."""
    yields = yields_unrecorded(world.source_fact(source_domain(hosts)))
    after = finish_work(agent, work, _E.ABANDON_SOURCE_KEPT if yields else None)
    yield "destination: asks the source's hypervisor", after, hosts, Cost.FREE


_YIELDS = {"read": None, "read, relayed": SourceState.KEPT, "read, stated dead": None}
"""By question to the source: the record that counts if the source does not answer. A driver relays that of a source from which
nothing flows; which of those states it is makes no difference."""

_UNDER_WAY = {
    _F.FINISH: _finishing,
    _F.ABANDON: _abandoning,
    **dict.fromkeys(("ask", "ask whose", *_YIELDS), _asking),
    "ask for the guest": _asks_for_guest,
}
_EFFECTS = {_F.PREPARE: _prepare, _F.FINISH: _finish, _F.ABANDON: _abandon, _F.LOOK: _look, _F.DISOWN: _disown}


def tidy(agent: Agent) -> Agent:
    """Drop work that cannot matter any more, so that equal futures are equal states."""
    work = agent.work
    if agent.state != _S.ARMED:
        seen = {Work(Stage.NEWS, _E.SAW_RUNNING), Work(Stage.NEWS, _E.SAW_ABSENT)}
        reads = {Work(Stage.CALLED, what) for what in _YIELDS}
        work -= {Work(Stage.START, _F.LOOK), _ASKS, _ASKS_FOR_GUEST, _SOURCE_KEPT, *seen, *reads}
    if agent.state in _FINAL:
        work &= {FINISH_STARTS, _ASKS_OWNER, _DISOWNED}
    return agent if work == agent.work else agent._replace(work=work)


_ASKS = Work(Stage.CALLED, "ask")
_ASKS_FOR_GUEST = Work(Stage.CALLED, "ask for the guest")
_ASKS_OWNER = Work(Stage.CALLED, "ask whose")
_DISOWNED = Work(Stage.NEWS, _E.DISOWNED)
_SOURCE_KEPT = Work(Stage.NEWS, _E.ABANDON_SOURCE_KEPT)


def begins_to_ask(world: World, agent: Agent) -> Agent:
    """Let an armed destination whose driver is silent ask the source."""
    if not world.destination_asks or not agent.up or agent.state != _S.ARMED:
        return agent
    return agent._replace(work=agent.work | {_ASKS})


def asks(world: World, source: Agent, agent: Agent) -> Iterator[tuple[str, Agent, Agent, Cost]]:
    """Read the source's record as it is now; the event that follows from it is taken later."""
    for work in sorted(agent.work):
        if work.stage is Stage.CALLED and work.what in _YIELDS:
            if source.up:
                after = _read(agent, work, _record_of(source, agent), answered=True)
                yield "destination: reads the source's record", source, after, Cost.FREE
            after = _read(agent, work, _YIELDS[work.what], answered=False)
            yield "destination: cannot reach the source", source, after, Cost.LOSE if source.up else Cost.FREE
    if not source.up:
        return
    here = source.attempt == agent.attempt
    kept = here and source.state == SourceState.KEPT
    goes_on_there = here and source.statement and source.state in (SourceState.RESUMING, SourceState.KEPT)
    if _ASKS in agent.work:
        left = agent.work - {_ASKS}
        if kept:
            left |= {_SOURCE_KEPT}
        elif source.state is None and world.asks_for_guest:
            left |= {_ASKS_FOR_GUEST}
        yield "destination: asks the source", source, agent._replace(work=left), Cost.FREE
    ended = source.attempt > agent.attempt or (here and source.state in (SourceState.REMOVED, SourceState.KEPT))
    if _ASKS_OWNER in agent.work and (goes_on_there or ended):  # until then it goes on asking
        left = agent.work - {_ASKS_OWNER}
        after = agent._replace(work=left | {_DISOWNED} if goes_on_there else left)
        yield "destination: asks whose the guest is", source, after, Cost.FREE


def begins_to_read(agent: Agent, *, relayed: bool, statement: bool) -> Agent:
    """Take a caller's claim that the source keeps the guest: it prompts the agent to read the source's record."""
    what = "read, stated dead" if statement else "read, relayed" if relayed else "read"
    return agent._replace(work=agent.work | {Work(Stage.CALLED, what)}, quiet=False)


def _record_of(source: Agent, agent: Agent) -> SourceState | None:
    """Return the source's state in this attempt. An attempt that a later one followed has ended, and can only be KEPT."""
    if source.attempt > agent.attempt:
        return SourceState.KEPT
    return SourceState(source.state) if source.attempt == agent.attempt and source.state else None


def _read(agent: Agent, work: Work, state: SourceState | None, *, answered: bool) -> Agent:
    yields = destination_yields(state, answered=answered, stated_dead=work.what == "read, stated dead")
    return finish_work(agent, work, _E.ABANDON_SOURCE_KEPT if yields else None)


def expired(world: World, agent: Agent) -> Agent:
    """Let the lease of the slot end."""
    if not agent.up or agent.state is None or agent.state in _FINAL:
        return agent
    return tidy(take(world, world.destination, agent, _E.LEASE_EXPIRED))
