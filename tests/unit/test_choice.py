"""agent.migration.choice: the destination of a migration to any host (issue 8, point 2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agent.handshake.drive.ends import Candidate, Ends, Side
from agent.migration.choice import Chooser
from agent.migration.collection import Collection
from agent.migration.planning import make_plan
from agent.runtime.errors import DroverError, Reason
from agent.runtime.events import Bus
from drover.agent.v1 import admission_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.unit.asking import ID
from tests.unit.test_placement import GUEST, host

SPEC = pb.MigrationSpec(domain="web1", importance=pb.IMPORTANCE_HIGH)
BUSY = DroverError(Reason.BUSY, "all slots are taken", metadata={"limit_value": "2"}, retry_after=7.0)


class Handshake:
    """A destination that answers AcquireSlot with a slot, or raises."""

    def __init__(self, error: DroverError | None) -> None:
        self.error = error
        self.asked: list[admission_pb2.AcquireSlotRequest] = []

    async def acquire_slot(self, request: admission_pb2.AcquireSlotRequest) -> admission_pb2.AcquireSlotResponse:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        return admission_pb2.AcquireSlotResponse()


class Hosts:
    """A directory of h1, the source, and destinations in the order of their rank. `free`: by their reports."""

    def __init__(self, errors: Mapping[str, DroverError | None], free: bool = True) -> None:
        self.handshakes = {name: Handshake(error) for name, error in errors.items()}
        self.free = free
        self.fails: DroverError | None = None

    async def candidates(self, spec: pb.MigrationSpec, others: Sequence[pb.Migration] = ()) -> list[Candidate]:
        if self.fails is not None:
            raise self.fails
        return [self._candidate(name, handshake) for name, handshake in self.handshakes.items()]

    def _candidate(self, name: str, handshake: Any) -> Candidate:
        ends = Ends(host("h1"), Side(host(name).host, handshake, f"{name}:7400"), GUEST)
        return Candidate(ends, *make_plan(SPEC, ends), name, free=self.free)

    def asked(self) -> list[str]:
        return [name for name, handshake in self.handshakes.items() if handshake.asked]


def choice_of(hosts: Hosts) -> Chooser:
    directory: Any = hosts
    return Chooser(directory, Collection("co", Bus()), "co")


async def chosen(hosts: Hosts, *, may_wait: bool = False, without: set[str] | None = None) -> str:
    found = await choice_of(hosts).choose(ID, SPEC, may_wait=may_wait, without=without or set())
    return found.plan.destination_host


async def refused(hosts: Hosts, *, may_wait: bool = False) -> DroverError:
    with pytest.raises(DroverError) as caught:
        await chosen(hosts, may_wait=may_wait)
    return caught.value


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.HOST_CLOSED, Reason.DRAINING, Reason.DOMAIN_EXISTS])
async def test_8_2_a_host_that_refuses_is_passed_by(reason: Reason) -> None:
    hosts = Hosts({"h2": DroverError(reason, "no"), "h3": None, "h4": None})
    assert await chosen(hosts) == "h3"
    assert hosts.asked() == ["h2", "h3"], "no slot is taken at a host that is not needed"


async def test_8_2_the_slot_is_asked_for_with_the_importance_and_the_driver() -> None:
    for may_wait, kind in ((False, admission_pb2.SLOT_KIND_TRANSFERRING), (True, admission_pb2.SLOT_KIND_PREPARED)):
        hosts = Hosts({"h2": None})
        await chosen(hosts, may_wait=may_wait)
        (request,) = hosts.handshakes["h2"].asked
        assert (request.migration_id, request.kind, request.importance, request.driver) == (ID, kind, pb.IMPORTANCE_HIGH, "co")
        assert request.direction == admission_pb2.SLOT_DIRECTION_INCOMING
        assert not request.HasField("wait")


async def test_8_2_where_all_are_busy_one_that_may_wait_gets_the_best_and_another_one_an_error() -> None:
    hosts = Hosts({"h2": DroverError(Reason.HOST_CLOSED, "closed"), "h3": BUSY, "h4": BUSY})
    assert await chosen(hosts, may_wait=True) == "h3"
    error = await refused(hosts)
    assert (error.reason, error.retry_after) == (Reason.BUSY, 7.0)
    assert (error.metadata["hosts"], error.metadata["limit_value"]) == ("h3,h4", "2")
    assert "Nothing was done to the guest" in error.message


async def test_8_2_where_none_can_take_the_guest_waiting_is_no_use() -> None:
    hosts = Hosts(
        {
            "away": DroverError(Reason.HOST_UNREACHABLE, "away does not answer"),
            "h3": DroverError(Reason.DOMAIN_EXISTS, "h3 has such a guest"),
        }
    )
    error = await refused(hosts, may_wait=True)
    assert error.reason is Reason.NO_HOST
    assert "away: away does not answer; h3: h3 has such a guest" in error.message


async def test_8_2_an_error_that_is_not_of_the_host_ends_the_choice() -> None:
    hosts = Hosts({"h2": DroverError(Reason.DOMAIN_NOT_RUNNING, "no"), "h3": None})
    assert (await refused(hosts)).reason is Reason.DOMAIN_NOT_RUNNING
    assert hosts.asked() == ["h2"]


async def test_8_2_hosts_that_were_tried_are_left_out() -> None:
    assert await chosen(Hosts({"h2": None, "h3": None}), without={"h2"}) == "h3"


async def test_8_2_an_older_agent_without_slots_is_chosen() -> None:
    assert await chosen(Hosts({"h2": DroverError(Reason.UNIMPLEMENTED, "unknown")})) == "h2"


async def test_8_2_one_that_waits_moves_to_a_free_host_only() -> None:
    for hosts, expected in (
        (Hosts({"h2": None, "h3": BUSY, "h4": None}), "h4"),
        (Hosts({"h2": None, "h3": BUSY}), None),
        (Hosts({"h3": None}, free=False), None),
    ):
        found = await choice_of(hosts).free(ID, SPEC, without={"h2"})
        assert (found.plan.destination_host if found else None) == expected
        assert "h2" not in hosts.asked()


async def test_8_2_a_wait_goes_on_where_no_candidate_can_be_found() -> None:
    hosts = Hosts({"h2": None})
    hosts.fails = DroverError(Reason.NO_HOST, "none")
    assert await choice_of(hosts).free(ID, SPEC, without=set()) is None
    assert await choice_of(hosts).alternatives(SPEC, "h9") == ()
    hosts.fails = DroverError(Reason.DOMAIN_NOT_FOUND, "no such guest")
    with pytest.raises(DroverError):
        await choice_of(hosts).free(ID, SPEC, without=set())


async def test_8_2_alternatives_are_the_other_free_hosts_and_cost_no_slot() -> None:
    hosts = Hosts({f"h{number}": None for number in range(2, 14)})
    assert await choice_of(hosts).alternatives(SPEC, "h3") == ("h2", "h4", "h5", "h6", "h7", "h8", "h9", "h10")
    assert hosts.asked() == []
