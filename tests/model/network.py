"""The drivers and their messages: calls, answers and losses. Mirrors `agent.handshake.drive.driver`."""

from collections.abc import Iterator

from agent.handshake.machines.decide import Call, assume, disputed, ended
from agent.handshake.machines.destination import DestinationEvent, DestinationState
from agent.handshake.machines.source import SourceEvent, SourceState
from tests.model import destination_agent, source_agent
from tests.model.agents import call, crashed, waits_for_turn
from tests.model.parts import NOBODY, Agent, Answer, Cost, Driver, Message, Mode, Side, Talk, Unanswered, Violation
from tests.model.world import World

Step = tuple[str, Talk, Agent, Cost]

TO_SOURCE = frozenset({Call.BEGIN, Call.PERFORM, Call.ABORT, Call.CONFIRM_RUNNING, Call.CONFIRM_GONE})
_CONFIRMS = frozenset({Call.CONFIRM_RUNNING, Call.CONFIRM_GONE})
_NAMES_PEER = frozenset({Call.BEGIN, Call.PERFORM})
"""Calls that name a destination, so that a source refuses those that name another one."""
_NEEDS_PLAN = frozenset({Call.RESERVE, Call.BEGIN, Call.PREPARE})

_SOURCE_ORDER = {state: place for place, state in enumerate([None, *SourceState])}
_DESTINATION_ORDER = {
    **{state: place for place, state in enumerate([None, *DestinationState])},
    DestinationState.RUNNING: len(DestinationState) - 0.5,  # it may follow ABANDONING, and only an operator's word ends it
}

DECIDE = "decide finds no impossible pair"


def start(world: World) -> Talk:
    """Return the drivers at the beginning. The last one is the source's own, for a take-over."""
    coordinators = (Driver(Mode.ON),) * world.coordinators
    foreign = (Driver(Mode.OFF, foreign=True),) if world.foreign_driver else ()
    return Talk(coordinators + foreign + ((Driver(Mode.OFF, plan=False),) if world.takeover else ()))


def _with(talk: Talk, index: int, driver: Driver) -> Talk:
    after = Talk((*talk.drivers[:index], driver, *talk.drivers[index + 1 :]), talk.flying)
    return _forget(after, index) if driver.mode in (Mode.OFF, Mode.ENDED, Mode.DEAD) else after


def _forget(talk: Talk, index: int) -> Talk:
    """Drop the answers to this driver. Its requests are still on their way."""
    flying = set()
    for message in talk.flying:
        if message.driver != index:
            flying.add(message)
        elif message.answer is Unanswered.YET:
            flying.add(message._replace(driver=NOBODY))
    return talk._replace(flying=frozenset(flying))


# ---- what needs no agent


def steps(world: World, talk: Talk) -> Iterator[tuple[str, Talk, Cost]]:
    for index, driver in enumerate(talk.drivers):
        yield from _driver(world, talk, index, driver)
    for message in sorted(talk.flying):
        what = f"{message.call} ({message.attempt})" if message.attempt > 1 else str(message.call)
        if isinstance(message.answer, Answer):
            learned = _learn(talk.drivers[message.driver], message)
            after = Talk(talk.drivers, talk.flying - {message})
            yield f"driver {message.driver}: hears of {what}", _with(after, message.driver, learned), Cost.FREE
        yield f"network: loses {_kind(message)} {what}", Talk(talk.drivers, talk.flying - {message}), Cost.LOSE


def _kind(message: Message) -> str:
    return "the call" if message.answer is Unanswered.YET else "the answer to"


def _driver(world: World, talk: Talk, index: int, driver: Driver) -> Iterator[tuple[str, Talk, Cost]]:
    who = f"driver {index}"
    if driver.mode is Mode.ON:
        yield from _send(world, talk, index, driver)
        if disputed(*states(driver), by_statement=driver.by_statement):
            again = driver._replace(mode=Mode.LOOK_SOURCE)
            yield f"{who}: looks again", _with(talk, index, again), Cost.FREE
        if not driver.cancel:
            yield f"{who}: is cancelled", _with(talk, index, driver._replace(cancel=True, told=True)), Cost.CANCEL
    if driver.plan and not driver.foreign and driver.mode in (Mode.ON, Mode.LOOK_SOURCE, Mode.LOOK_DESTINATION):
        dead = Driver(Mode.DEAD, driver.attempt, told=driver.told)
        if world.durable_driver:
            dead = dead._replace(cancel=driver.told, dead=driver.dead)
        yield f"{who}: dies", _with(talk, index, dead), Cost.CRASH_DRIVER
    if driver.mode is Mode.DEAD and world.driver_returns:
        yield f"{who}: is back", _with(talk, index, driver._replace(mode=Mode.LOOK_SOURCE)), Cost.FREE
    if index == 0 and driver.mode is Mode.ENDED and driver.src is SourceState.KEPT and driver.attempt < world.attempts:
        yield f"{who}: tries again", _with(talk, index, Driver(Mode.ON, driver.attempt + 1)), Cost.FREE


def _send(world: World, talk: Talk, index: int, driver: Driver) -> Iterator[tuple[str, Talk, Cost]]:
    who = f"driver {index}"
    outstanding = {message.call for message in talk.flying if message.driver == index}
    for wanted in sorted(_wants(world, driver)):
        if not driver.plan and (wanted in _NEEDS_PLAN or (wanted is Call.PERFORM and driver.src is SourceState.BEGUN)):
            if not driver.cancel:
                yield f"{who}: cannot {wanted}, gives up", _with(talk, index, driver._replace(cancel=True)), Cost.FREE
        elif driver.foreign and wanted not in TO_SOURCE:
            seen = _settle(driver._replace(dst=_AT_THIRD_HOST[wanted]))
            yield f"{who}: calls {wanted} at the third host", _with(talk, index, seen), Cost.FREE
        elif wanted not in outstanding and len(talk.flying) < world.in_flight:
            statement = (driver.dead, wanted) in _RESTS_ON_STATEMENT
            message = Message(index, driver.attempt, wanted, statement=statement, foreign=driver.foreign)
            yield f"{who}: calls {wanted}", Talk(talk.drivers, talk.flying | {message}), Cost.FREE


_AT_THIRD_HOST = {
    Call.RESERVE: DestinationState.RESERVED,
    Call.PREPARE: DestinationState.PREPARED,
    Call.FINISH: DestinationState.ARMED,
    Call.ABANDON: DestinationState.GONE,
    Call.ABANDON_SOURCE_KEPT: DestinationState.GONE,
}
"""The result of a call at a host to which no memory flows."""

_RESTS_ON_STATEMENT = {(Side.DESTINATION, Call.CONFIRM_GONE), (Side.SOURCE, Call.ABANDON_SOURCE_KEPT)}


def _wants(world: World, driver: Driver) -> frozenset[Call]:
    mind = world.decide if driver.plan else world.decide_takeover
    src, dst = states(driver)
    stalled = (False, True) if world.stalls and (src, dst) == (SourceState.PERFORMED, DestinationState.ARMED) else (False,)
    try:
        return frozenset().union(
            *(mind(src, dst, cancel=driver.cancel, stalled=long, by_statement=driver.by_statement) for long in stalled)
        )
    except AssertionError as error:
        if world.checked(DECIDE):
            raise Violation(DECIDE, str(error)) from None
        return frozenset()


def states(driver: Driver) -> tuple[SourceState | None, DestinationState | None]:
    """Return the states to act on: those that the driver has read, corrected for a side that was declared dead."""
    return assume(
        driver.src,
        driver.dst,
        source_dead=driver.dead is Side.SOURCE,
        destination_dead=driver.dead is Side.DESTINATION,
    )


def _learn(driver: Driver, message: Message) -> Driver:
    """Take an answer unless a newer one is known. One about a later attempt, or without a record, changes nothing."""
    assert isinstance(message.answer, Answer)
    if driver.dead is _side(message.call):
        driver = driver._replace(dead=None)  # it answers
    if message.answer.exists:
        return driver._replace(mode=Mode.ENDED, cancel=False, told=False)
    if message.attempt != driver.attempt or message.answer.stale or message.answer.state is None:
        return driver
    if message.call in TO_SOURCE:
        src = SourceState(message.answer.state)
        if _SOURCE_ORDER[src] >= _SOURCE_ORDER[driver.src]:
            driver = driver._replace(src=src, by_statement=message.answer.statement)
    else:
        dst = DestinationState(message.answer.state)
        driver = driver._replace(dst=dst) if _DESTINATION_ORDER[dst] >= _DESTINATION_ORDER[driver.dst] else driver
    return _settle(driver)


def _side(call: Call) -> Side:
    return Side.SOURCE if call in TO_SOURCE else Side.DESTINATION


def _settle(driver: Driver) -> Driver:
    """End a driver that has seen both records end."""
    return driver._replace(mode=Mode.ENDED, cancel=False, told=False) if ended(*states(driver)) else driver


# ---- with the source's agent


def at_source(world: World, talk: Talk, agent: Agent) -> Iterator[Step]:
    """Yield calls that reach the source, reads of its record, its driver's silence, its death."""
    for message in sorted(talk.flying):
        if message.call in TO_SOURCE:
            yield from _arrives(world, talk, agent, message, Side.SOURCE)
    if agent.dead or (world.wrong_statement and agent.up):
        yield from _declared_dead(world, talk, agent, Side.SOURCE)
    if not agent.up:
        return
    if world.may(Cost.BY_HAND):
        yield from _by_hand(world, talk, agent, Side.SOURCE)
    if world.foreign_driver and agent.state is not None:
        yield from _foreign_starts(talk, agent)
    for index, driver in enumerate(talk.drivers):
        if driver.mode is Mode.LOOK_SOURCE and agent.attempt <= driver.attempt:
            seen = SourceState(agent.state) if agent.attempt == driver.attempt and agent.state is not None else None
            looked = driver._replace(src=seen, mode=Mode.LOOK_DESTINATION, by_statement=seen is not None and agent.statement)
            yield f"driver {index}: looks at the source", _with(talk, index, looked), agent, Cost.FREE
    if source_agent.may_be_silent(agent):
        yield from _silence(world, talk, agent)
    if agent.state == SourceState.KEPT and not agent.statement and not agent.work and not _driven(talk):
        yield "source: its journal has no room for the record", talk, Agent(), Cost.FORGET
    if agent.state is not None and world.may(Cost.CRASH_SOURCE):
        yield "source: dies", _without_takeover(world, talk), crashed(agent), Cost.CRASH_SOURCE


def _silence(world: World, talk: Talk, agent: Agent) -> Iterator[Step]:
    cost = _timer(talk)
    after, drives = source_agent.silence(world, agent)
    if drives and world.takeover and talk.drivers[-1].mode is not Mode.OFF:
        return
    if drives and world.takeover:
        own = Driver(Mode.LOOK_SOURCE, agent.attempt, plan=False)
        talk = _with(talk, len(talk.drivers) - 1, own)
    yield "source: its driver is silent", talk, after, cost


def _foreign_starts(talk: Talk, agent: Agent) -> Iterator[Step]:
    """Somebody starts the same migration id once more, towards a third host."""
    for index, driver in enumerate(talk.drivers):
        if driver.foreign and driver.mode is Mode.OFF:
            yield "somebody: starts the same id to a third host", _with(talk, index, driver._replace(mode=Mode.ON)), agent, Cost.FREE


def _without_takeover(world: World, talk: Talk) -> Talk:
    """End the driver that took over, which dies with the source's agent, and its calls to that agent."""
    if not world.takeover:
        return talk
    last = len(talk.drivers) - 1
    flying = frozenset(m for m in talk.flying if m.driver != last or m.call not in TO_SOURCE)
    return _with(Talk(talk.drivers, flying), last, Driver(Mode.OFF, plan=False))


# ---- with the destination's agent


def at_destination(world: World, talk: Talk, agent: Agent) -> Iterator[Step]:
    """Yield calls that reach the destination, reads of its record, the end of its lease."""
    for message in sorted(talk.flying):
        if message.call not in TO_SOURCE:
            yield from _arrives(world, talk, agent, message, Side.DESTINATION)
    if agent.dead or (world.wrong_statement and agent.up):
        yield from _declared_dead(world, talk, agent, Side.DESTINATION)
    if agent.dead:
        yield "hosts: the destination's host is back", talk, destination_agent.back(world, agent), Cost.FREE
    if not agent.up:
        return
    if world.may(Cost.BY_HAND):
        yield from _by_hand(world, talk, agent, Side.DESTINATION)
    for index, driver in enumerate(talk.drivers):
        if driver.mode is Mode.LOOK_DESTINATION and agent.attempt <= driver.attempt:
            seen = DestinationState(agent.state) if agent.attempt == driver.attempt and agent.state is not None else None
            looked = _settle(driver._replace(dst=seen, mode=Mode.ON))
            yield f"driver {index}: looks at the destination", _with(talk, index, looked), agent, Cost.FREE
    expired = destination_agent.expired(world, agent)
    if expired != agent:
        yield "destination: the lease expires", talk, expired, _timer(talk)
    asking = destination_agent.begins_to_ask(world, agent)
    if asking != agent:
        yield "destination: its driver is silent", talk, asking, _timer(talk)


_AFTER_WORD = {
    (Side.SOURCE, Mode.LOOK_SOURCE): Mode.LOOK_DESTINATION,
    (Side.SOURCE, Mode.ON): Mode.ON,
    (Side.DESTINATION, Mode.LOOK_DESTINATION): Mode.ON,
    (Side.DESTINATION, Mode.ON): Mode.ON,
}
"""The driver's mode once a side was declared dead: it does not read the record there any more."""
_LOOKS_THERE = {(Side.SOURCE, Mode.LOOK_SOURCE), (Side.DESTINATION, Mode.LOOK_DESTINATION)}


def _declared_dead(world: World, talk: Talk, agent: Agent, side: Side) -> Iterator[Step]:
    """An operator states at a coordinator that a host is dead. The statement counts only while the host does not answer."""
    for index, driver in enumerate(talk.drivers):
        if driver.dead is side and agent.up and driver.mode is Mode.ON:
            # The call that rests on the statement is refused, as the host answers the one that would act on it.
            refuted = driver._replace(dead=None)
            yield f"driver {index}: is told that the {side} answers", _with(talk, index, refuted), agent, Cost.FREE
        if driver.dead is side and agent.dead and (side, driver.mode) in _LOOKS_THERE:
            told = _settle(driver._replace(mode=_AFTER_WORD[side, driver.mode]))
            yield f"driver {index}: remembers that the {side} is dead", _with(talk, index, told), agent, Cost.FREE
        if driver.foreign:
            continue
        mode = _AFTER_WORD.get((side, driver.mode)) if driver.plan and driver.dead is None else None
        answers = any(message.driver == index and _side(message.call) is side for message in talk.flying)
        if mode is not None and not answers:
            told = _settle(driver._replace(dead=side, mode=mode))
            yield f"operator: tells driver {index} that the {side} is dead", _with(talk, index, told), agent, Cost.STATEMENT


def _timer(talk: Talk) -> Cost:
    """Return the cost of believing that a driver is silent: nothing if it is."""
    return Cost.EXPIRE if _driven(talk) else Cost.FREE


def _driven(talk: Talk) -> bool:
    return any(d.mode in (Mode.LOOK_SOURCE, Mode.LOOK_DESTINATION, Mode.ON) for d in talk.drivers)


# ---- arrival


def _arrives(world: World, talk: Talk, agent: Agent, message: Message, side: Side) -> Iterator[Step]:
    left = talk.flying - {message}
    what = f"{message.call} of attempt {message.attempt}" if message.attempt > 1 or agent.attempt > 1 else str(message.call)
    if not agent.up:
        yield f"{side}: is down, {_kind(message)} {what} is lost", Talk(talk.drivers, left), agent, Cost.FREE
        return
    if message.answer is not Unanswered.YET:
        return
    after, answer = _called(world, agent, message, side)
    back = frozenset({message._replace(answer=answer)}) if message.driver != NOBODY else frozenset()
    yield f"{side}: gets {what}", Talk(talk.drivers, left | back), after, Cost.FREE
    again = message._replace(driver=NOBODY)
    if again not in talk.flying:
        yield f"{side}: gets {what}, to arrive again", Talk(talk.drivers, left | back | {again}), after, Cost.REPEAT


def _by_hand(world: World, talk: Talk, agent: Agent, side: Side) -> Iterator[Step]:
    """Any caller may make any call at any moment with any claim, but cannot relay a record of another host."""
    for made in sorted(Call):
        if _side(made) is side:
            for astray in (False, True) if world.turns and made is Call.PERFORM else (False,):
                message = Message(NOBODY, agent.attempt or 1, made, foreign=made not in _NAMES_PEER, astray=astray)
                after, _ = _called(world, agent, message, side)
                yield f"somebody: calls {made} by hand{', astray' if astray else ''}", talk, after, Cost.BY_HAND


_TURNS = frozenset({Call.PERFORM, Call.CONFIRM_RUNNING, Call.CONFIRM_GONE, Call.ABANDON_SOURCE_KEPT})


def _waits_for_turn(agent: Agent, message: Message) -> Agent:
    """Let a call wait for its turn that needs no record of the other host in this state, or a Perform whose URI was checked."""
    if message.call is not Call.PERFORM:
        return waits_for_turn(agent, str(message.call))
    if agent.state == SourceState.BEGUN:
        return agent if message.astray else waits_for_turn(agent, str(message.call))
    astray = source_agent.ASTRAY if message.astray else ""
    return waits_for_turn(agent, f"{message.call}{source_agent.UNCHECKED}{astray}")


def _called(world: World, agent: Agent, message: Message, side: Side) -> tuple[Agent, Answer]:
    here = agent.state is not None and agent.attempt == message.attempt
    reads, relayed = here and side in world.reads, not message.foreign
    if side is Side.SOURCE and here and message.foreign and message.call in _NAMES_PEER and world.checks_peer:
        return agent, Answer(agent.state, exists=True)
    if reads and message.call in _CONFIRMS and agent.state in source_agent.DECIDED_BY_OTHER:
        after = source_agent.begins_to_read(agent, SourceEvent(message.call), relayed=relayed, statement=message.statement)
        return after, Answer(agent.state, statement=after.statement, exists=message.foreign and world.checks_peer)
    if reads and message.call is Call.ABANDON_SOURCE_KEPT and agent.state == DestinationState.ARMED:
        return destination_agent.begins_to_read(agent, relayed=relayed, statement=message.statement), Answer(agent.state)
    if world.turns and here and message.call in _TURNS:
        return _waits_for_turn(agent, message), Answer(agent.state, statement=agent.statement)
    if side is Side.SOURCE:
        after, answer = call(world, world.source, agent, message.attempt, SourceEvent(message.call))
        if message.statement and after.attempt == message.attempt and after.state in (SourceState.RESUMING, SourceState.KEPT):
            after = after._replace(statement=True)
        exists = message.foreign and world.checks_peer and here
        return source_agent.tidy(after), answer._replace(
            statement=after.statement and after.attempt == message.attempt, exists=exists
        )
    after, answer = call(world, world.destination, agent, message.attempt, DestinationEvent(message.call))
    return destination_agent.tidy(after), answer
