"""The worlds that are explored: which faults, how many of each, and which drivers.

Every one is explored whole. The bounds differ, because all faults at once would be too many states: what goes wrong does so
with two or three faults together, so each world has those that belong together.
"""

from tests.model.invariants import ALL, STUCK
from tests.model.parts import budget
from tests.model.world import World

SAFETY = ALL - {STUCK}
"""For worlds in which the product is known to get stuck (`findings`): nothing bad happens there, but not everything ends."""

SMALL: tuple[World, ...] = (
    World("no_fault", "one driver, and nothing goes wrong"),
    World("cancel", "cancelled at any moment", budget=budget(cancel=1)),
    World("crashes", "either agent dies at any moment", takeover=False, budget=budget(crash_source=1, crash_destination=1, fail=1)),
    World("failures", "the stream breaks, calls of the hypervisor fail or give no answer", takeover=False, budget=budget(fail=2)),
    World(
        "unnoticed",
        "the destination does not learn that the stream broke",
        takeover=False,
        break_noticed=False,
        budget=budget(fail=1, cancel=1),
    ),
    World("take_over", "the driver is silent, and the source drives beside it", in_flight=2, budget=budget(expire=1)),
    World("messages", "calls and answers are lost, repeated and late", takeover=False, in_flight=2, budget=budget(lose=1, repeat=1)),
    World("attempts", "a second attempt, and late calls of the first", takeover=False, in_flight=2, attempts=2, budget=budget(cancel=1)),
    World("post_copy", "switched to post-copy", takeover=False, postcopy=True, in_flight=2, budget=budget(cancel=1, crash_destination=1)),
)
"""Some seconds in all."""

FULL: tuple[World, ...] = (
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
        "crash_again",
        "agents die twice, and a call fails",
        takeover=False,
        budget=budget(crash_source=2, crash_destination=2, fail=1),
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
        checks=SAFETY,
    ),
    World(
        "two_coordinators",
        "two drivers that know nothing of each other; the destination dies",
        coordinators=2,
        takeover=False,
        in_flight=2,
        budget=budget(crash_destination=1),
    ),
    World(
        "cancel_and_silence",
        "cancelled, and the source takes over from a driver that is slow",
        in_flight=2,
        budget=budget(cancel=1, expire=1),
        checks=SAFETY,
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
        "post_copy_crashes",
        "switched to post-copy; agents die",
        takeover=False,
        postcopy=True,
        budget=budget(cancel=1, crash_source=1, crash_destination=1),
    ),
    World(
        "qemu_dies",
        "either QEMU dies before the commit, and after it",
        takeover=False,
        in_flight=2,
        careless_abandon=False,
        budget=budget(qemu=1, crash_source=1, crash_destination=1, cancel=1),
    ),
)
"""Millions of states; a minute or two."""
