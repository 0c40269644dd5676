"""agent.migration.slots: a migration to any host that takes another one, and what is left at those that it asked (issue 8)."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

import pytest

import agent.migration.slots
from agent.admission.values import Direction
from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.migration.placement import rank
from agent.runtime.errors import DroverError, Reason
from agent.service.host_service import get_domain
from agent.service.peers import leaving_request
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID, fails, until
from tests.unit.fake_directory import Driving, FakeDirectory, _host, _side
from tests.unit.two_agents import JOURNAL_DOWN, Agent, Line, Pair

SPEC = pb.MigrationSpec(domain="web1")
FULL = DroverError(Reason.JOURNAL_UNAVAILABLE, "the disk is full", metadata={"written": "no"})


class Three(FakeDirectory):
    """A directory of h1, the source, and of h2 and h3, in this order."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self.third = Agent("h3", pair.wire)
        self.third.other_side = pair.to_source
        self.to_third = Line(self.third)
        self.to_third.on_call = lambda call: self._ask_third() if call == "reserve_slot" else None

    def _ask_third(self) -> None:
        self.pair.source.other_side = self.to_third

    async def find(self, spec: pb.MigrationSpec) -> Ends:
        await self._wait()
        guest = await get_domain(_host(self.pair.source), leaving_request(spec))
        return Ends(self._sides()[0], self._to(spec.destination_host), guest)

    async def ends(self, migration: pb.Migration) -> tuple[Side, Side]:
        return self._sides()[0], self._to(migration.destination_host)

    def _to(self, name: str) -> Side:
        return _side(self.third, self.to_third, "10.91.0.3:7400") if name == "h3" else self._sides()[1]

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        guest = await get_domain(_host(self.pair.source), leaving_request(spec))
        return rank(spec, self._sides()[0], guest, {name: self._to(name) for name in ("h2", "h3")}, others)


@pytest.fixture
async def three(driving: Driving) -> AsyncIterator[Three]:
    directory = Three(driving.pair)
    driving.directory = directory
    await driving.migrations.close()
    driving.migrations = driving._new()
    driving._all.append(driving.migrations)
    yield directory
    await driving.migrations.close()
    await directory.third.close()


def arrived_at_third(three: Three) -> None:
    """The guest has been at h1 and h3 only, and h2 holds nothing."""
    copies = [a.name for a in (three.pair.source, three.pair.destination, three.third) for _ in a.hypervisor.domains.values()]
    assert copies == ["h3"]
    assert three.pair.destination.hypervisor.arguments.get("prepare") is None
    assert [holds(agent) for agent in (three.pair.source, three.pair.destination, three.third)] == [False] * 3


def holds(agent: Agent) -> bool:
    """Whether the migration has a slot of the agent's host."""
    claims = [queue.book.find(ID) for queue in agent.engine.desk.queues.values()]
    return any(claim is not None and claim.slot is not None for claim in claims)


@pytest.mark.parametrize("slot_wait", [0.0, 60.0])
async def test_8_2_a_slot_whose_answer_is_lost_is_given_back_and_the_next_host_taken(
    driving: Driving, three: Three, slot_wait: float
) -> None:
    driving.pair.to_destination.lose_answer["reserve_slot"] = 1
    await driving.migrations.start(ID, SPEC, slot_wait)
    ended = await driving.ended(ID)
    assert (ended.state, ended.destination_host, ended.attempt) == (pb.MIGRATION_STATE_SUCCEEDED, "h3", 2)
    assert driving.pair.destination.journalled == "gone"
    arrived_at_third(three)


async def test_8_2_a_slot_whose_answer_is_lost_at_a_host_that_is_cut_off_ends_with_its_lease(driving: Driving, three: Three) -> None:
    pair = driving.pair
    pair.destination.engine.host.lease_seconds = 0.5
    pair.to_destination.on_call = lambda _: setattr(pair.to_destination, "cut", pair.destination.journalled == "reserved")
    pair.to_destination.is_cut = lambda: pair.destination.journalled == "reserved"  # type: ignore[method-assign]
    await driving.migrations.start(ID, SPEC)
    ended = await driving.ended(ID)
    assert (ended.state, ended.destination_host, ended.attempt) == (pb.MIGRATION_STATE_SUCCEEDED, "h3", 2)
    await until(lambda: pair.destination.journalled == "gone")
    arrived_at_third(three)


@pytest.mark.parametrize("fails_at", ["save", "source"])
async def test_8_2_the_slot_of_a_choice_is_free_at_once_if_the_start_fails(driving: Driving, three: Three, fails_at: str) -> None:
    if fails_at == "save":
        driving.log.fails = [FULL]
    else:
        driving.pair.to_source.refuse["acquire_slot"] = [DroverError(Reason.BUSY, "nobody may leave")]
    await fails(driving.migrations.start(ID, SPEC), Reason.JOURNAL_UNAVAILABLE if fails_at == "save" else Reason.BUSY)
    await until(lambda: not holds(driving.pair.destination))
    assert three.to_third.count["acquire_slot"] == 0


async def test_8_2_the_slot_at_the_next_host_is_free_at_once_if_the_move_is_not_saved(driving: Driving, three: Three) -> None:
    busy = DroverError(Reason.BUSY, "another one was quicker")
    driving.pair.to_destination.refuse["reserve_slot"] = [busy]
    driving.pair.to_destination.on_call = lambda call: setattr(
        driving.log, "fails", [JOURNAL_DOWN] if call == "reserve_slot" else []
    )
    await fails(driving.migrations.start(ID, SPEC), Reason.JOURNAL_UNAVAILABLE)
    assert three.to_third.count["acquire_slot"] == 1
    await until(lambda: not holds(three.third) and not holds(driving.pair.destination))


async def test_8_2_a_wait_goes_on_if_a_move_is_not_saved(driving: Driving, three: Three) -> None:
    pair = driving.pair
    pair.to_destination.lose_answer["reserve_slot"] = 1
    pair.to_destination.on_call = lambda call: setattr(driving.log, "fails", [JOURNAL_DOWN] if call == "reserve_slot" else [])
    await driving.migrations.start(ID, SPEC, 60.0)
    ended = await driving.ended(ID)
    assert ended.state == pb.MIGRATION_STATE_SUCCEEDED
    await until(lambda: not holds(three.third) and not holds(pair.destination) and not holds(pair.source))


async def test_8_2_the_slot_at_the_next_host_is_free_at_once_if_it_is_cancelled_during_the_move(
    driving: Driving, three: Three
) -> None:
    """It waits in the queue of h2 as h3 becomes free; the move is being saved when its user cancels it."""
    driving.pair.destination.room(0)
    three.third.room(0)
    await driving.migrations.start(ID, SPEC, 60.0)
    await until(lambda: "are taken" in driving.migrations.collection.get(ID).migration.waiting_for)
    driving.log.held = held = asyncio.Event()
    three.third.room(1)
    await driving.log.waiting.wait()
    cancelling = asyncio.create_task(driving.migrations.cancel(ID))
    await until(lambda: not holds(three.third))
    held.set()
    assert (await cancelling).state == pb.MIGRATION_STATE_CANCELLING
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED


async def test_8_2_a_choice_that_is_cancelled_before_its_slot_is_answered_gives_it_back(driving: Driving, three: Three) -> None:
    driving.pair.destination.room(0)
    three.third.room(0)
    await driving.migrations.start(ID, SPEC, 60.0)
    asked = three.to_third.count["acquire_slot"]
    three.to_third.hang = {"acquire_slot"}
    three.third.room(1)
    await until(lambda: three.to_third.count["acquire_slot"] > asked)
    assert three.to_third.count["release_slot"] == 0
    await driving.migrations.cancel(ID)
    assert (await driving.ended(ID)).state == pb.MIGRATION_STATE_CANCELLED
    await until(lambda: three.to_third.count["release_slot"])


@pytest.mark.parametrize("why", ["closed", "away"])
async def test_8_2_a_host_that_was_closed_or_away_for_a_moment_is_taken_later(
    driving: Driving, three: Three, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(agent.migration.slots, "AWAY_SECONDS", 0.1)
    pair, third, entry = driving.pair, three.third, driving.migrations.collection.get
    queue = pair.destination.engine.desk.queues[Direction.INCOMING]
    limits = queue.book.limits
    pair.destination.room(0)
    third.room(0)
    await driving.migrations.start(ID, SPEC, 60.0)
    await until(lambda: "are taken" in entry(ID).migration.waiting_for)
    assert entry(ID).migration.destination_host == "h2"
    if why == "closed":
        queue.limit(dataclasses.replace(limits, limit=0))
    else:
        pair.to_destination.refuse["acquire_slot"] = [pair.to_destination.unreachable()]
    await until(lambda: entry(ID).migration.destination_host == "h3")
    queue.limit(limits)
    pair.destination.room(1)
    ended = await driving.ended(ID)
    assert (ended.state, ended.runs_on) == (pb.MIGRATION_STATE_SUCCEEDED, "h2")
