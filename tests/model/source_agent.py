"""The source's agent: its effects on the hypervisor, and their news. Mirrors `agent.handshake.source_side`."""

from collections.abc import Iterator

from agent.handshake.source import SourceEffect, SourceEvent, SourceState
from tests.model.agents import NO_WORK, finish_work, restarted, take
from tests.model.hosts import AT_HOME, aborted, guest_dies, source_domain
from tests.model.parts import Agent, Copy, Cost, Guest, Hosts, Stage, Stream, Work
from tests.model.world import World

_S, _E, _F = SourceState, SourceEvent, SourceEffect

Step = tuple[str, Agent, Hosts, Cost]


def steps(world: World, agent: Agent, hosts: Hosts) -> Iterator[Step]:
    """What the agent may do next with its hypervisor and its journal."""
    if not agent.up:
        yield "source: restarts", tidy(restarted(world, world.source, agent, _E.RESTARTED)), hosts, Cost.FREE
        if not agent.dead and hosts.guest is not Guest.REMOVED and hosts.stream is not Stream.POSTCOPY:
            yield "hosts: the source's host dies, too", agent._replace(dead=True), guest_dies(hosts), Cost.HOST
        return
    for work in sorted(agent.work):
        for label, after, hosts_after, cost in _work(world, agent, hosts, work):
            yield label, tidy(after), hosts_after, cost


def _work(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    if work.stage is Stage.NEWS:
        yield f"source: records {work.what}", take(world, world.source, finish_work(agent, work), _E(work.what)), hosts, Cost.FREE
    elif work.stage is Stage.CALLED:
        yield from _performing(agent, hosts, work)
    else:
        yield from _EFFECTS[_F(work.what)](world, agent, hosts, work)


def _begin(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    failed = finish_work(agent, work, _E.BEGIN_FAILED)
    if hosts.guest not in AT_HOME:
        yield "source: Begin finds no guest that runs", failed, hosts, Cost.FREE
        return
    yield "source: Begin locks the guest", finish_work(agent, work, _E.BEGIN_DONE), hosts, Cost.FREE
    yield "source: Begin fails", failed, hosts, Cost.FAIL


def _perform(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    failed = finish_work(agent, work, _E.PERFORM_FAILED)
    if hosts.guest in AT_HOME and (hosts.copy, hosts.stream) == (Copy.INCOMING, Stream.NONE):
        called = agent._replace(work=agent.work - {work} | {Work(Stage.CALLED, _F.PERFORM)})
        yield "source: Perform, the memory flows", called, hosts._replace(stream=Stream.FLOWING), Cost.FREE
        yield "source: Perform fails before it connects", failed, hosts, Cost.FAIL
    else:
        yield "source: Perform finds nobody to connect to", failed, hosts, Cost.FREE


def _performing(agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Perform ends when the stream does."""
    failed = finish_work(agent, work, _E.PERFORM_FAILED)
    if hosts.stream is Stream.DONE:
        yield "source: Perform returns", finish_work(agent, work, _E.PERFORM_DONE), hosts, Cost.FREE
    elif hosts.stream in (Stream.BROKEN, Stream.NONE):
        yield "source: Perform fails", failed, hosts, Cost.FREE
    elif hosts.stream is Stream.FLOWING:
        yield "source: libvirtd's answer to Perform is lost", failed, hosts, Cost.FAIL


def _abort(world: World, agent: Agent, hosts: Hosts, work: Work) -> Iterator[Step]:
    """Tried again until Perform has ended; `tidy` ends it."""
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


_EFFECTS = {
    _F.BEGIN: _begin,
    _F.PERFORM: _perform,
    _F.ABORT: _abort,
    _F.LOOK: _look,
    _F.REMOVE: _remove,
    _F.RESUME: _resume,
}


def tidy(agent: Agent) -> Agent:
    """Leave out work that cannot matter any more, so that equal futures are equal states.

    RELEASE only closes a connection; an abort ends with Perform; what an ended attempt still has to tell is stale.
    """
    work = agent.work - {Work(Stage.START, _F.RELEASE)}
    if agent.state != _S.PERFORMING:
        work -= {Work(Stage.START, _F.ABORT)}
    if agent.state in (_S.REMOVED, _S.KEPT):
        work = NO_WORK
    return agent if work == agent.work else agent._replace(work=work)


def silence(world: World, agent: Agent) -> tuple[Agent, bool]:
    """The timer of the driver's silence runs out, once: the agent after it, and whether it takes over."""
    alone = agent.state in (_S.BEGINNING, _S.BEGUN)
    after = take(world, world.source, agent._replace(quiet=True), _E.DRIVER_SILENT)
    return tidy(after), not alone


def may_be_silent(agent: Agent) -> bool:
    return agent.up and not agent.quiet and agent.state is not None and agent.state not in (_S.REMOVED, _S.KEPT)
