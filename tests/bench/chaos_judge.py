"""The judge of a migration with faults: waits until the migration has ended, then returns what is wrong.

Required at the end, whatever died (the one rule of the design, requirements R1 to R6):

- exactly one host's libvirt reports that the guest runs, the one that the records and every driver name, and no host has another
  copy, half defined or half arrived;
- the guest's serial log is perfect: no number repeated, falling or missing, no page lost;
- the records of both agents are final and agree, and so does the migration if its driver knows it;
- no slot or place in a queue is taken, no QEMU process is left over, no port of a migration listens;
- the same guest can be migrated again.

One exception: a guest whose QEMU was killed may be lost. Then nothing may be left of it, and the migration must fail with
GUEST_CRASHED and no other reason.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agent.runtime.errors import Reason
from drover.agent.v1 import admission_pb2, handshake_pb2
from drover.agent.v1 import migration_pb2 as pb
from tests.bench import chaos_talk as talk
from tests.kit.cluster import ClusterGuest, Daemon
from tests.kit.cluster.platforms import PORT, LabCluster
from tests.kit.lab.errors import LabError

POLL_SECONDS = 0.1
AGAIN_SECONDS = 20.0
"""Deadline of the further migration."""
CLEAN_UP_SECONDS = 10.0
"""Deadline for leftovers once all records and drivers say that it has ended; nothing would remove them later."""
LINES = 5
"""Number of further lines that prove that the guest runs."""

LOST = "guest lost with its QEMU"


@dataclass(frozen=True)
class Asked:
    """A requested migration. The same id may be requested from two drivers."""

    migration_id: str
    driver: Daemon
    """The daemon that got the request: the coordinator, or the source's agent."""
    destination: str


@dataclass(frozen=True)
class Case:
    """The migrations to judge, and what happened to them."""

    asked: Asked
    guest: ClusterGuest
    source: str
    """The host on which the guest was started."""
    rivals: tuple[Asked, ...] = ()
    """Other requests to move the same guest at the same time."""
    killed_qemu: frozenset[str] = frozenset()
    """Hosts whose QEMU of this guest was killed; the guest may then be lost."""
    arrives_paused: bool = False
    """The guest was to be paused at its destination: then it runs on no host, and the migration must report that."""
    in_transfer: bool = True
    """The QEMU was killed while memory flowed or later: then the migration must report it."""
    cancelled: bool = False
    """The migration was cancelled."""
    goes_back: bool = False
    """An operator's statement let an older state of the guest go on, so its log cannot be perfect."""

    @property
    def all_asked(self) -> tuple[Asked, ...]:
        return (self.asked, *self.rivals)


@dataclass
class Judgement:
    """The result of judging a case."""

    outcome: str = "open"
    """"done", "rolled back", `LOST`, or "open" if it did not end in time."""
    seconds: float = 0.0
    """From the restart to the end."""
    problems: list[str] = field(default_factory=list)
    records: tuple[str, str] = ("", "")
    """States of the source's and the destination's record, as last seen."""
    reported: str = ""
    """State of the migration as its driver reports it, with the reason of its failure."""
    told: float = 0.0
    """When all records, and the migration, were first seen to have ended (`time.monotonic`). 0: not yet."""
    remarks: list[str] = field(default_factory=list)
    """Defects that harm no guest."""

    @property
    def good(self) -> bool:
        return not self.problems


def judge(made: LabCluster, case: Case, restarted: float, deadline: float) -> Judgement:
    """Wait for the end, at most `deadline` seconds from `restarted` (by `time.monotonic`), and judge it."""
    judgement = Judgement()
    waiting = ["nothing was checked"]
    end = restarted + deadline
    while waiting and time.monotonic() < end:
        waiting = list(_unfinished(made, case, judgement))
        if judgement.told:
            end = min(end, judgement.told + CLEAN_UP_SECONDS)
        if waiting:
            time.sleep(POLL_SECONDS)
    judgement.seconds = time.monotonic() - restarted
    judgement.problems = [f"still after {judgement.seconds:.0f} s: {problem}" for problem in waiting]
    if judgement.good and judgement.outcome != LOST:
        judgement.problems += _migrates_again(made, case)
    judgement.remarks = [remark for remark, holds in REMARKS.items() if holds(case, judgement)]
    _judge_log(case, judgement)
    return judgement


REMARKS: Mapping[str, Callable[[Case, Judgement], bool]] = {
    "reported as cancelled, though nobody cancelled it": lambda case, j: j.reported.startswith("cancelled") and not case.cancelled,
    "reported as failed, without a reason": lambda case, j: j.reported == "failed",
    "the guest's QEMU was killed before the memory flowed, and that is not reported": lambda case, j: (
        j.outcome == LOST and j.records[1] != "running" and Reason.GUEST_CRASHED not in j.reported
    ),
}
"""Defects that harm no guest."""


def _judge_log(case: Case, judgement: Judgement) -> None:
    if not case.goes_back:
        judgement.problems += [f"guest log: {problem}" for problem in case.guest.judge().problems()]


# ---- has it ended?


def _unfinished(made: LabCluster, case: Case, judgement: Judgement) -> Iterator[str]:
    """Yield everything that is wrong so far, as sentences; asks the hosts only once the records have ended."""
    try:
        records = {asked.migration_id: records_of(made, asked.migration_id) for asked in case.all_asked}
        own = records[case.asked.migration_id]
        judgement.records = talk.record_state(own.get(case.source)), talk.record_state(own.get(case.asked.destination))
        not_ended = [sentence for each in records.values() for sentence in open_records(each)]
        yield from not_ended
        if not_ended:
            return
        moves = {migration_id: move for migration_id, each in records.items() if (move := moved(each)) is not None}
        way = way_of(case.source, list(moves.values()))
        lost = way[-1] in case.killed_qemu and not made.running_on(case.guest.name)
        judgement.outcome = LOST if lost else "done" if moves else "rolled back"
        yield from _reported(case, judgement, own.get(case.source), moves, way)
        yield from slots_left(made)
        yield from wrong_on_hosts(made, case.guest.name, None if lost else way[-1])
    except (talk.SilentError, LabError) as error:
        yield str(error)


Records = Mapping[str, handshake_pb2.Record]
"""Records of one migration by host, without hosts that have none."""


def records_of(made: LabCluster, migration_id: str) -> Records:
    """Return the agents' records of the migration. Raises `SilentError`."""
    found = {name: talk.record(agent, migration_id) for name, agent in made.agents.items()}
    return {name: record for name, record in found.items() if record is not None}


def open_records(records: Records) -> Iterator[str]:
    """Yield a sentence if the records have not ended or do not agree."""
    states = {name: talk.record_state(record) for name, record in records.items()}
    removed, running = ([name for name, state in states.items() if state == wanted] for wanted in ("removed", "running"))
    agree = len(removed) == len(running) <= 1 and all(records[name].peer_host == running[0] for name in removed)
    if agree and all(state in talk.RECORD_FINAL for state in states.values()):
        return
    words = [f"{name} {states[name]}" + (f" ({record.waiting_for})" * bool(record.waiting_for)) for name, record in records.items()]
    yield f"the records are {', '.join(words)}"


def moved(records: Records) -> tuple[str, str] | None:
    """Return the guest's move (from, to) by records that have ended; None if it stayed."""
    arrived = [name for name, record in records.items() if talk.record_state(record) == "running"]
    left = [name for name, record in records.items() if talk.record_state(record) == "removed"]
    return (left[0], arrived[0]) if left and arrived else None


def way_of(start: str, moves: Sequence[tuple[str, str]]) -> list[str]:
    """Return the hosts on which the guest was, in order, using each move once. A move that does not fit is left out; the guest is
    then found on another host than the last one, which the judge reports.
    """
    way, left = [start], list(moves)
    while step := next((move for move in left if move[0] == way[-1]), None):
        left.remove(step)
        way.append(step[1])
    return way


def _reported(
    case: Case,
    judgement: Judgement,
    source: handshake_pb2.Record | None,
    moves: Mapping[str, tuple[str, str]],
    way: Sequence[str],
) -> Iterator[str]:
    """Yield each driver's report that does not fit the records. A driver need not know the migration: it may have refused it, or was
    killed before it stored it.
    """
    for asked in reversed(case.all_asked):
        found = talk.migration(asked.driver, asked.migration_id)
        judgement.reported = "unknown to the driver" if found is None else words_of(found)
        if found is None:
            continue
        if found.state not in talk.FINAL:
            yield f"the migration is {judgement.reported} for {asked.driver.name}: {found.failure.message or found.waiting_for}"
            return
        there = moves.get(asked.migration_id, ("", ""))[1]
        done = there == asked.destination
        places = {there, way[-1]} if done else set(way)
        if done and case.arrives_paused:
            places.add("")
        if judgement.outcome != LOST and (found.runs_on not in places or (found.state == pb.MIGRATION_STATE_SUCCEEDED) != done):
            yield (
                f"for {asked.driver.name} the migration to {asked.destination} is {judgement.reported} and the guest runs on "
                f"{found.runs_on or 'no host'}, but it went {' → '.join(way)}"
            )
    judgement.told = judgement.told or time.monotonic()
    if judgement.outcome == LOST and case.in_transfer and judgement.records[1] != "running":
        reasons = {found.failure.reason if found else "", source.failure.reason if source else ""} - {""}
        if reasons != {Reason.GUEST_CRASHED.value}:
            yield f"the guest's QEMU was killed, but the migration's reason is {', '.join(sorted(reasons)) or 'empty'}"


def slots_left(made: LabCluster) -> Iterator[str]:
    """Yield each slot that is taken, and each place in a queue, as a sentence."""
    for name, agent in made.agents.items():
        for slot in talk.slots(agent):
            yield f"{name} has {'a place in a queue' if slot.waiting else 'a slot taken'} by {slot.migration_id}, {_way(slot)}"


def _way(slot: admission_pb2.SlotHolder) -> str:
    return admission_pb2.SlotDirection.Name(slot.direction).removeprefix("SLOT_DIRECTION_").lower()


def words_of(found: pb.Migration) -> str:
    return talk.state_of(found) + (f" ({found.failure.reason})" if found.HasField("failure") else "")


def wrong_on_hosts(made: LabCluster, name: str, where: str | None) -> Iterator[str]:
    """Yield what is wrong on the hosts, by libvirt and the kernel; the guest should run on `where`, or (None) was lost."""
    copies = made.copies(name)
    if where is not None and copies != {where: "running"}:
        yield f"the copies of the guest are {copies}, it should run on {where} only"
    if where is None and (len(copies) > 1 or set(copies.values()) - {"shut", "crashed"}):
        yield f"the guest was lost with its QEMU, and its copies are {copies}"
    qemu = [f"{host.name}: {qemu.pid}" for host in made.lab.hosts for qemu in host.qemu() if qemu.guest == name]
    if len(qemu) != (where is not None):
        yield f"QEMU processes of the guest: {', '.join(qemu) or 'none'}"
    for host in made.lab.hosts:
        ports = [port for _, port in host.listening() if port != PORT]
        if ports:
            yield f"{host.name} listens on {ports}"


# ---- a further migration


def _migrates_again(made: LabCluster, case: Case) -> Iterator[str]:
    """Move the guest to another host; yield each problem as a sentence."""
    try:
        case.guest.wait_lines(LINES)
        yield from _move(made, case)
        case.guest.wait_lines(LINES)
    except (talk.SilentError, LabError) as error:
        yield f"afterwards: {error}"


def _move(made: LabCluster, case: Case) -> Iterator[str]:
    here = made.running_on(case.guest.name)[0]
    others = [name for name in made.hosts if name != here]
    there = next((name for name in others if name not in (case.source, case.asked.destination)), others[0])
    driver = made.coordinator if case.asked.driver is made.coordinator else made.agents[here]
    migration_id = talk.new_id()
    spec = pb.MigrationSpec(domain=case.guest.name, destination_host=there)
    if refused := talk.start_until_accepted(driver, migration_id, spec, lambda: False):
        yield f"a further migration was not accepted: {refused}"
        return
    end = time.monotonic() + AGAIN_SECONDS
    while time.monotonic() < end:
        found = talk.migration(driver, migration_id)
        if found is not None and found.state in talk.FINAL:
            break
        time.sleep(POLL_SECONDS)
    if found is None or found.state != pb.MIGRATION_STATE_SUCCEEDED:
        why = "unknown" if found is None else f"{words_of(found)}: {found.failure.message}"
        yield f"a further migration to {there} did not succeed within {AGAIN_SECONDS:g} s: {why}"
    elif made.copies(case.guest.name) != {there: "running"}:
        yield f"after a further migration the copies are {made.copies(case.guest.name)}"
