"""The worlds that are explored: which faults, how many of each, and which drivers.

Every world is explored completely. All faults at once would be too many states; flaws show with two or three faults together, so
each world has faults that belong together.
"""

from agent.handshake.machines.destination import DESTINATION
from agent.handshake.machines.source import SOURCE
from tests.model.agents import ONLY_COPY
from tests.model.invariants import ALL, GOES_BACK, TWO_RUN
from tests.model.parts import budget
from tests.model.world import BESIDE, World

BUT_ONLY_COPY = ALL - {ONLY_COPY}
"""For worlds in which a source's QEMU may die: the copy may be given up with it (`findings`)."""

SMALL: tuple[World, ...] = (
    World("no_fault", "one driver, and nothing goes wrong"),
    World("cancel", "cancelled at any moment", in_flight=2, budget=budget(cancel=1)),
    World(
        "crashes", "either agent dies at any moment", takeover=False, in_flight=2, budget=budget(crash_source=1, crash_destination=1)
    ),
    World(
        "written_beside",
        "the records of Begin and Prepare are written beside their effects, and either agent dies",
        takeover=False,
        in_flight=2,
        beside=BESIDE,
        budget=budget(crash_source=1, crash_destination=1),
    ),
    World("failures", "the stream breaks, calls of the hypervisor fail or give no answer", takeover=False, budget=budget(fail=2)),
    World(
        "unnoticed",
        "the destination does not learn that the stream broke, and the user cancels",
        takeover=False,
        in_flight=2,
        break_noticed=False,
        budget=budget(fail=1, cancel=1),
    ),
    World("late_cancel", "cancelled while the source drives beside a silent driver", in_flight=1, budget=budget(cancel=1, expire=1)),
    World("messages", "calls and answers are lost, repeated and late", takeover=False, in_flight=2, budget=budget(lose=1, repeat=1)),
    World(
        "attempts", "a second attempt, and late calls of the first", takeover=False, in_flight=2, attempts=2, budget=budget(cancel=1)
    ),
    World(
        "post_copy",
        "switched to post-copy",
        takeover=False,
        postcopy=True,
        in_flight=2,
        budget=budget(cancel=1, crash_destination=1),
    ),
    World(
        "no_driver",
        "the driver dies for good, perhaps right after Begin",
        in_flight=1,
        driver_returns=False,
        budget=budget(crash_driver=1),
    ),
    World(
        "paused_guest",
        "the guest was paused by its user before, and looks PERFORMED after a Perform that never connected",
        takeover=False,
        in_flight=2,
        user_paused=True,
        budget=budget(fail=1, cancel=1),
    ),
    World(
        "qemu_dies",
        "either QEMU dies before the commit, and after it",
        takeover=False,
        in_flight=1,
        budget=budget(qemu=1, crash_source=1, by_hand=1),
        checks=BUT_ONLY_COPY,
    ),
    World(
        "by_hand",
        "somebody makes a call by hand, and a message is lost",
        takeover=False,
        in_flight=2,
        budget=budget(by_hand=1, lose=1),
    ),
    World(
        "turns",
        "a call that was checked waits for its turn, and the state changes meanwhile; somebody makes a call by hand",
        takeover=False,
        in_flight=2,
        turns=True,
        budget=budget(by_hand=1),
    ),
    World(
        "moves_on",
        "an operator states that a destination is dead that is only cut off, and its guest is to move on to a third host",
        in_flight=1,
        wrong_statement=True,
        budget=budget(statement=1, crash_destination=1, move=1),
        checks=ALL - {TWO_RUN, GOES_BACK},
    ),
    World(
        "trimmed",
        "the driver dies for good; the source keeps the guest, and its journal trims the record",
        in_flight=1,
        driver_returns=False,
        break_noticed=False,
        budget=budget(crash_driver=1, fail=1, forget=1),
    ),
    World(
        "declared_dead",
        "the destination's host dies, an operator says so, and it comes back",
        takeover=False,
        in_flight=2,
        budget=budget(host=1, statement=1),
    ),
    World(
        "third_host",
        "the same migration id is started again towards a third host, and one of both migrations is cancelled",
        takeover=False,
        in_flight=2,
        foreign_driver=True,
        budget=budget(cancel=1),
    ),
    World(
        "wrong_statement",
        "an operator states that a host is dead that is alive",
        in_flight=2,
        wrong_statement=True,
        budget=budget(statement=1, cancel=1),
    ),
    World(
        "cancelled_driver_dies",
        "a driver that has acknowledged a cancel dies and comes back",
        takeover=False,
        in_flight=2,
        budget=budget(cancel=1, crash_driver=1),
    ),
    World(
        "back_too_early",
        "the destination is back, and the attempt goes on, before the operator's word gets to the source",
        takeover=False,
        in_flight=2,
        budget=budget(host=1, statement=1, crash_driver=1),
    ),
    World(
        "looked_at_before_disowned",
        "the same, and a driver that comes back reads the destination's record before the destination has asked the source",
        takeover=False,
        in_flight=1,
        budget=budget(host=1, statement=1, crash_driver=1),
    ),
)
"""They take a minute together on an idle core."""

FULL: tuple[World, ...] = (
    World(
        "two_coordinators",
        "two drivers that know nothing of each other; the destination dies",
        coordinators=2,
        takeover=False,
        in_flight=2,
        budget=budget(crash_destination=1),
    ),
    World(
        "crash_again",
        "agents die twice, and the user cancels",
        takeover=False,
        budget=budget(crash_source=2, crash_destination=2, cancel=1),
    ),
    World(
        "all_agents_crash",
        "either agent dies, and the source takes over from a driver that is slow",
        in_flight=2,
        budget=budget(crash_source=1, crash_destination=1, expire=1),
    ),
    World(
        "everybody_crashes",
        "agents and driver die, and the user cancels",
        takeover=False,
        in_flight=2,
        budget=budget(crash_source=1, crash_destination=1, crash_driver=1, cancel=1),
    ),
    World(
        "driver_returns",
        "the driver dies and comes back to find that the source took over",
        in_flight=2,
        budget=budget(crash_driver=1, fail=1),
    ),
    World(
        "no_driver_returns",
        "the driver dies for good, the agents die too",
        in_flight=2,
        driver_returns=False,
        budget=budget(crash_driver=1, fail=1, crash_source=1, crash_destination=1),
    ),
    World(
        "cancel_and_silence",
        "cancelled, and the source takes over from a driver that is slow",
        in_flight=2,
        budget=budget(cancel=1, expire=1),
    ),
    World(
        "lost_messages",
        "calls and answers are lost, repeated and late, with a cancel and a failure",
        takeover=False,
        in_flight=2,
        budget=budget(lose=1, repeat=1, cancel=1, fail=1),
    ),
    World(
        "two_attempts",
        "a second attempt, late calls of the first, and a crash",
        takeover=False,
        in_flight=2,
        attempts=2,
        budget=budget(repeat=1, fail=1, crash_destination=1),
    ),
    World(
        "attempts_in_a_row",
        "a second attempt while calls of the first still lag, also on their way to the hypervisor",
        takeover=False,
        attempts=2,
        budget=budget(cancel=1, fail=1),
    ),
    World(
        "post_copy_crashes",
        "switched to post-copy; agents die",
        takeover=False,
        postcopy=True,
        budget=budget(cancel=1, crash_source=1, crash_destination=1),
    ),
    World(
        "qemu_and_agents_die",
        "either QEMU dies before the commit, and after it",
        takeover=False,
        in_flight=2,
        budget=budget(qemu=1, crash_source=1, crash_destination=1, cancel=1),
        checks=BUT_ONLY_COPY,
    ),
    World(
        "host_declared_dead",
        "either host dies, an operator says so, and it comes back",
        in_flight=2,
        budget=budget(host=1, statement=1, crash_source=1, fail=1, cancel=1),
        checks=BUT_ONLY_COPY,
    ),
    World(
        "calls_by_hand",
        "somebody makes a call by hand; agents die, and the user cancels",
        takeover=False,
        in_flight=2,
        budget=budget(by_hand=1, crash_source=1, crash_destination=1, cancel=1),
    ),
    World(
        "third_host_and_crashes",
        "the same migration id towards a third host; the source dies, a message is lost, and the user cancels",
        takeover=False,
        in_flight=2,
        foreign_driver=True,
        budget=budget(cancel=1, crash_source=1, lose=1),
    ),
    World(
        "claims_by_hand",
        "somebody claims decisions by hand, twice; a message, or the way between the hosts, is lost",
        takeover=False,
        in_flight=2,
        budget=budget(by_hand=2, lose=1, fail=1),
    ),
    World(
        "turns_and_crashes",
        "a call that was checked waits for its turn; somebody makes a call by hand, a driver cancels, the source dies",
        takeover=False,
        in_flight=2,
        turns=True,
        budget=budget(by_hand=1, cancel=1, crash_source=1),
    ),
    World(
        "wrong_statements",
        "an operator states that hosts are dead that are alive, and a call fails",
        in_flight=2,
        wrong_statement=True,
        budget=budget(statement=1, cancel=1, fail=1),
    ),
    World(
        "post_copy_host_declared_dead",
        "switched to post-copy; the destination's host dies, an operator says so, and it comes back",
        takeover=False,
        postcopy=True,
        in_flight=2,
        budget=budget(host=1, statement=1, crash_destination=1, lose=1),
    ),
)
"""About sixteen million states: five minutes on an idle core, a quarter of an hour on a shared one."""

ROWS = frozenset((state and str(state), str(event)) for state, event in [*SOURCE.table, *DESTINATION.table])
"""The rows of both tables."""

COVER = frozenset({"paused_guest", "qemu_dies", "declared_dead"})
"""Small worlds that together use every row."""
