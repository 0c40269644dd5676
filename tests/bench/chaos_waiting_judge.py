"""The judge of a storm of faults over migrations that wait: waits until all have ended, then returns what is wrong.

Required at the end:

- every migration that was accepted has ended, and whoever knows it, the coordinator or an agent, says the truth: SUCCEEDED if the
  guest has moved to the host that it names and runs there, and else that it runs at its source, where it was not touched; no failure
  that no fault explains, and none for want of a slot before its time;
- one copy of each guest, which runs, with a perfect log, and which can be migrated again;
- the records of the agents are final and agree; no slot, place in a queue, QEMU or port is left;
- never were more transfers of a host under way than its highest limit.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from agent.runtime.errors import Reason
from drover.agent.v1 import migration_pb2 as pb
from tests.bench import chaos_talk as talk
from tests.bench.chaos_judge import CLEAN_UP_SECONDS, LINES, moved, open_records, records_of, slots_left, words_of, wrong_on_hosts
from tests.bench.chaos_waiting_plan import LONG_WAIT, Move, WaitingPlan
from tests.bench.stats import most_at_once
from tests.kit.cluster import ClusterGuest, Daemon
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.errors import LabError

POLL_SECONDS: Final = 0.3
AGAIN_SECONDS: Final = 60.0
"""Deadline of the further migrations of all guests, which wait for each other."""

INEXPLICABLE: Final = frozenset(
    {
        Reason.INVALID_FIELD,
        Reason.REQUEST_ID_REUSED,
        Reason.WRONG_PHASE,
        Reason.STALE_ATTEMPT,
        Reason.STALE_LEASE,
        Reason.MIGRATION_EXISTS,
        Reason.DOMAIN_NOT_FOUND,
        Reason.DOMAIN_EXISTS,
        Reason.UNDECIDED,
        Reason.GUEST_CRASHED,
        Reason.OUTCOME_UNKNOWN,
        Reason.INTERNAL,
    }
)
"""Reasons of a failure that no fault of a storm explains."""


@dataclass
class Asked:
    """A migration that was asked for."""

    move: Move
    guest: ClusterGuest
    migration_id: str
    refused: str = ""
    """Why it was not accepted. Empty: it was."""
    cancelled: bool = False
    """Somebody tried to cancel it."""


@dataclass
class Verdict:
    """The result of judging a round."""

    problems: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    """Of each guest's migration, as its driver reports it."""
    seconds: float = 0.0
    """From the repair to the end."""
    remarks: list[str] = field(default_factory=list)
    """See `remarks`."""


Reports = Mapping[str, pb.Migration]
"""A migration as each daemon that knows it reports it, by the daemon's name."""
Stay = tuple[str, str] | None
"""From where to where a migration has moved its guest; None: it stayed."""


def judge(made: LabCluster, plan: WaitingPlan, all_asked: Sequence[Asked], repaired: float, deadline: float) -> Verdict:
    """Wait for all ends, at most `deadline` seconds from `repaired` (by `time.monotonic`), and judge them."""
    verdict = Verdict()
    _until_nothing(lambda: itertools.chain.from_iterable(_open(made, asked) for asked in all_asked), repaired + deadline)
    verdict.seconds = time.monotonic() - repaired
    wrong = _until_nothing(lambda: _wrong(made, plan, all_asked, verdict), time.monotonic() + CLEAN_UP_SECONDS)
    verdict.remarks = list(dict.fromkeys(verdict.remarks))
    verdict.problems = [f"after {time.monotonic() - repaired:.0f} s: {problem}" for problem in wrong]
    if not verdict.problems:
        verdict.problems += _migrate_again(made, all_asked)
    verdict.problems += [f"log of {asked.move.guest}: {each}" for asked in all_asked for each in asked.guest.judge().problems()]
    return verdict


def _until_nothing(look: Callable[[], Iterator[str]], end: float) -> list[str]:
    """Look until nothing is wrong. Return what is wrong at the end."""
    while True:
        try:
            wrong = list(look())
        except (talk.SilentError, LabError) as error:
            wrong = [str(error)]
        if not wrong or time.monotonic() > end:
            return wrong
        time.sleep(POLL_SECONDS)


def _open(made: LabCluster, asked: Asked) -> Iterator[str]:
    """Yield what has not ended of a migration."""
    yield from (f"{asked.move.guest}: {each}" for each in open_records(records_of(made, asked.migration_id)))
    for name, found in _reports(made, asked).items():
        if found.state not in talk.FINAL:
            yield f"{asked.move.guest} is {words_of(found)} for {name}: {found.failure.message or found.waiting_for}"


def _reports(made: LabCluster, asked: Asked) -> Reports:
    found = {daemon.name: talk.migration(daemon, asked.migration_id) for daemon in made.daemons()}
    return {name: migration for name, migration in found.items() if migration is not None}


def _wrong(made: LabCluster, plan: WaitingPlan, all_asked: Sequence[Asked], verdict: Verdict) -> Iterator[str]:
    """Yield everything that is wrong, once all should have ended."""
    moves: list[pb.Migration] = []
    for asked in all_asked:
        yield from _open(made, asked)
        reports, stay = _reports(made, asked), moved(records_of(made, asked.migration_id))
        told = reports.get(driver_of(asked.move))
        verdict.ends[asked.move.guest] = end_of(asked, told)
        verdict.remarks += [f"{asked.move.guest}: {each}" for each in remarks(asked, reports)]
        yield from (f"{asked.move.guest}: {each}" for each in false_ends(asked, reports, stay))
        yield from wrong_on_hosts(made, asked.guest.name, stay[1] if stay else asked.move.source)
        moves += [told] if told is not None and stay else []
    yield from slots_left(made)
    yield from over_limits(plan, moves)


# ---- pure


def driver_of(move: Move) -> str:
    """Return the name of the daemon that was asked for a migration."""
    return "co" if move.managed else move.source


def end_of(asked: Asked, told: pb.Migration | None) -> str:
    """Return the end as text, for the report."""
    if told is None:
        return f"refused ({asked.refused})" if asked.refused else "unknown to its driver"
    return words_of(told)


def false_ends(asked: Asked, reports: Reports, stay: Stay) -> Iterator[str]:
    """Yield each report that is not true, or that no fault explains."""
    move = asked.move
    where = stay[1] if stay else move.source
    if stay and (stay[0] != move.source or (move.destination and stay[1] != move.destination)):
        yield f"it went from {stay[0]} to {stay[1]}"
    if driver_of(move) not in reports and (stay or not asked.refused):
        yield f"its driver does not know it, and it went to {where}"
    for name, found in reports.items():
        succeeded = found.state == pb.MIGRATION_STATE_SUCCEEDED
        true = succeeded == bool(stay) and found.runs_on == where and (found.destination_host == where or not succeeded)
        if not true:
            yield f"FALSE END: for {name} it is {words_of(found)} and runs on {found.runs_on or 'no host'}, but it is on {where}"
        if found.failure.reason in INEXPLICABLE:
            yield f"for {name} it is {words_of(found)}, which no fault explains: {found.failure.message}"
        waited = found.duration.ToTimedelta().total_seconds()
        if found.failure.reason == Reason.BUSY and not found.duration_is_least and waited < move.wait - 1:
            yield f"for {name} it waited {waited:.1f} of {move.wait:.1f} s"


def remarks(asked: Asked, reports: Reports) -> Iterator[str]:
    """Yield what is true of the guest, and yet not as it should be, or worth a look."""
    for name, found in reports.items():
        if found.state == pb.MIGRATION_STATE_CANCELLED and not asked.cancelled:
            yield f"reported by {name} as cancelled, though nobody cancelled it"
        if found.state == pb.MIGRATION_STATE_FAILED and asked.move.wait == LONG_WAIT:
            yield f"it could wait, and is {words_of(found)} for {name}: {found.failure.message}"


def over_limits(plan: WaitingPlan, moves: Sequence[pb.Migration]) -> Iterator[str]:
    """Yield each host that had more transfers under way at once than its highest limit, by the times of those that have moved."""
    for host in plan.limits:
        for limit, side in (("incoming_limit", "destination_host"), ("outgoing_limit", "source_host")):
            spans = [span for migration in moves if getattr(migration, side) == host for span in transfers(migration)]
            if (most := most_at_once(spans)) > plan.most(host, limit):
                yield f"{most} transfers at once, but {limit} of {host} was at most {plan.most(host, limit)}"


def transfers(migration: pb.Migration) -> Iterator[tuple[float, float]]:
    """Yield begin and end of the transfer, as its source has measured it; nothing if no life of the source has seen both."""
    for timing in migration.timings:
        if timing.phase == "perform":
            start = timing.start_time.ToNanoseconds() / 1e9
            yield start, start + timing.duration.ToNanoseconds() / 1e9


# ---- a further migration


@dataclass(frozen=True)
class _Further:
    """A further migration of a guest."""

    asked: Asked
    driver: Daemon
    destination: str
    migration_id: str = field(default_factory=talk.new_id)


def _migrate_again(made: LabCluster, all_asked: Sequence[Asked]) -> Iterator[str]:
    """Move all guests at once to another host, every other one peer to peer; yield each problem as a sentence."""
    try:
        further = [_start_again(made, asked, managed=index % 2 == 0) for index, asked in enumerate(all_asked)]
        end = time.monotonic() + AGAIN_SECONDS
        for each in further:
            yield from _until_nothing(partial(_not_there, made, each), end)
            each.asked.guest.wait_lines(LINES)
    except (talk.SilentError, LabError) as error:
        yield f"afterwards: {error}"


def _start_again(made: LabCluster, asked: Asked, *, managed: bool) -> _Further:
    here = made.running_on(asked.guest.name)[0]
    driver = made.coordinator if managed else made.agents[here]
    further = _Further(asked, driver, next(name for name in made.hosts if name != here))
    spec = pb.MigrationSpec(domain=asked.guest.name, destination_host=further.destination)
    if refused := talk.start_until_accepted(driver, further.migration_id, spec, lambda: False, AGAIN_SECONDS):
        raise talk.SilentError(f"a further migration of {asked.move.guest} was not accepted: {refused}")
    return further


def _not_there(made: LabCluster, further: _Further) -> Iterator[str]:
    found = talk.migration(further.driver, further.migration_id)
    if found is None or found.state != pb.MIGRATION_STATE_SUCCEEDED:
        why = "unknown" if found is None else f"{words_of(found)}: {found.failure.message or found.waiting_for}"
        yield f"{further.asked.move.guest}: a further migration to {further.destination} has not succeeded: {why}"
    elif (copies := made.copies(further.asked.guest.name)) != {further.destination: "running"}:
        yield f"{further.asked.move.guest}: after a further migration the copies are {copies}"
