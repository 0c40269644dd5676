"""What both agents have in common: they take an event as `agent.handshake.host.attempt` and fence attempts as `attempts`."""

from enum import StrEnum
from typing import TypeVar, cast

from agent.handshake.machines.machine import Machine, Refused
from tests.model.parts import Agent, Answer, Durable, Stage, Violation, Work
from tests.model.world import World

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)
F = TypeVar("F", bound=StrEnum)

NO_WORK: frozenset[Work] = frozenset()
FINISH_STARTS = Work(Stage.START, "finish")

FINAL = "an ended record stays"
FENCE = "a stale attempt is refused"
ONLY_COPY = "the only copy that can run is kept"
PATH = "memory goes only where the destination listens"


def take(world: World, machine: Machine[S, E, F], agent: Agent, event: E) -> Agent:
    """Take one event: the new record is durable and its effects are to be started. A stale report changes nothing. The record of
    an event that is written beside its effects is not durable yet; a later record is written after it.

    Raises `Refused`, and `Violation` where a record that had ended changes (but for a copy that an operator's word disowns).
    """
    state = cast("S | None", agent.state)
    transition = machine.step(state, event)
    if transition is None:
        return agent
    if state in machine.final and transition.state != state and event != "disowned" and world.checked(FINAL):
        raise Violation(FINAL, f"{state} became {transition.state} on {event}")
    starts = {Work(Stage.START, effect) for effect in transition.effects}
    behind = agent.behind
    if transition.state != state:
        behind = agent.behind or Durable(agent.attempt, state, agent.statement) if event in world.beside else None
    return agent._replace(state=transition.state, work=agent.work | starts, behind=behind)


def written(agent: Agent) -> Agent:
    """Make the record that was being written durable."""
    return agent._replace(behind=None)


def finish_work(agent: Agent, done: Work, then: str | None = None) -> Agent:
    """End a piece of work; `then` is the event that reports it."""
    left = agent.work - {done}
    return agent._replace(work=left if then is None else left | {Work(Stage.NEWS, then)})


def call(world: World, machine: Machine[S, E, F], agent: Agent, attempt: int, event: E) -> tuple[Agent, Answer]:
    """Take or refuse a call, after the fence by attempt. The answer is the record then."""
    if attempt < agent.attempt and world.fence:
        return agent, Answer(None, stale=True)
    if attempt > agent.attempt:
        return _first_call(world, machine, agent, attempt, event)
    if (late := _too_early(world, machine, agent, event)) is not None:
        return late
    try:
        agent = take(world, machine, agent, event)
    except Refused:
        pass
    else:
        if attempt < agent.attempt and world.checked(FENCE):
            raise Violation(FENCE, f"{event} of attempt {attempt} was taken by attempt {agent.attempt}")
    agent = agent._replace(quiet=False)
    return agent, Answer(agent.state)


def _first_call(world: World, machine: Machine[S, E, F], agent: Agent, attempt: int, event: E) -> tuple[Agent, Answer]:
    """Take a call that creates the attempt, if the one before has ended; a refused call leaves nothing behind."""
    if agent.state is not None and agent.state not in machine.final:
        return agent, Answer(None)
    try:
        made = take(world, machine, Agent(attempt, work=_lagging(agent)), event)
    except Refused:
        return agent, Answer(None)
    if made.behind is not None:
        made = made._replace(behind=Durable(agent.attempt, agent.state, agent.statement))
    return made, Answer(made.state)


def _lagging(agent: Agent) -> frozenset[Work]:
    """Return the calls of the attempt before that the hypervisor has not received yet."""
    return agent.work & {FINISH_STARTS}


def waits_for_turn(agent: Agent, what: str) -> Agent:
    """Let a call that has been checked wait for its turn."""
    return agent._replace(work=agent.work | {Work(Stage.TURN, what)}, quiet=False)


def take_turn(world: World, machine: Machine[S, E, F], agent: Agent, work: Work, event: E, *, unchecked: bool) -> Agent:
    """Apply a call whose turn has come. `unchecked`: this state would have required other checks than those that were made."""
    agent = finish_work(agent, work)
    if unchecked and event in world.looks_again:
        return agent
    try:
        return take(world, machine, agent, event)
    except Refused:
        return agent


def _too_early(world: World, machine: Machine[S, E, F], agent: Agent, event: E) -> tuple[Agent, Answer] | None:
    """Take a call in a mutation that acts, or answers, before the record is written."""
    if event not in world.effect_first and event not in world.answer_first:
        return None
    transition = machine.table.get((cast("S | None", agent.state), event))
    if transition is None or transition.state == agent.state:
        return None
    later = {Work(Stage.WRITE, event)}
    if event in world.answer_first:
        return agent._replace(work=agent.work | later), Answer("gone")
    starts = {Work(Stage.START, effect) for effect in transition.effects}
    return agent._replace(work=agent.work | later | starts), Answer(transition.state)


def write_late(world: World, machine: Machine[S, E, F], agent: Agent, work: Work, event: E) -> Agent:
    """Write the record of such a mutation."""
    agent = finish_work(agent, work)
    transition = machine.table.get((cast("S | None", agent.state), event))
    if transition is None:
        return agent
    if event in world.effect_first:
        return agent._replace(state=transition.state)
    return take(world, machine, agent, event)


def crashed(agent: Agent) -> Agent:
    """Return the agent after a crash: only the journal is left."""
    attempt, state, statement = agent.behind or Durable(agent.attempt, agent.state, agent.statement)
    return Agent(attempt, state, up=False, dead=agent.dead, statement=statement)


def restarted(world: World, machine: Machine[S, E, F], agent: Agent, event: E) -> Agent:
    """Start the agent, which reads its journal: only an attempt that has not ended is resumed."""
    agent = agent._replace(up=True, dead=False)
    if agent.state is None or agent.state in machine.final:
        return agent
    return take(world, machine, agent, event)
