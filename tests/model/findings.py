"""Known flaws that the model finds in the product, and assumptions of the worlds, each with a small world that shows it.

`test_findings` expects each of these worlds to break the rule given here, and fails once the product is corrected. Then the
world belongs into `worlds`, and the bound of `tests.model.world.World` that excluded it can be removed.
"""

from dataclasses import dataclass

from tests.model.agents import ONLY_COPY
from tests.model.invariants import ALL, GOES_BACK, LOST, STUCK, TWO_RUN
from tests.model.parts import budget
from tests.model.world import World
from tests.model.worlds import BUT_ONLY_COPY


@dataclass(frozen=True)
class Finding:
    world: World
    """Its `about` describes what goes wrong."""
    finds: str


FINDINGS: tuple[Finding, ...] = (
    Finding(
        World(
            "source_died_after_all_was_sent",
            "the source's QEMU dies after its whole state has arrived and before the copy starts: the copy may be given up too",
            budget=budget(crash_source=1, qemu=1),
            takeover=False,
            stalls=False,
            in_flight=2,
        ),
        ONLY_COPY,
    ),
    Finding(
        World(
            "copy_ran_unseen",
            "the guest started, and its QEMU died before a restarted agent looked: SAW_ABSENT, GONE, and an old state of it resumes",
            budget=budget(qemu=1, crash_destination=1),
            takeover=False,
            in_flight=2,
            copy_dies_early=True,
            checks=BUT_ONLY_COPY,
        ),
        GOES_BACK,
    ),
    Finding(
        World(
            "moved_on_unasked",
            "a destination that runs the guest is declared dead, and lets it move on to a third host while its source cannot be "
            "asked: it runs there and at the source for ever",
            in_flight=1,
            wrong_statement=True,
            budget=budget(statement=1, crash_destination=1, move=1),
            asks_before_leaving=False,
            checks=ALL - {TWO_RUN, GOES_BACK},
        ),
        STUCK,
    ),
    Finding(
        World(
            "careless_abandon",
            "an `Incoming.abandon` that destroys a copy that has started since the check",
            takeover=False,
            in_flight=2,
            careless_abandon=True,
        ),
        LOST,
    ),
    Finding(
        World(
            "torn_end",
            "a QEMU that lets the source run on although the destination has received everything",
            budget=budget(fail=1),
            takeover=False,
            in_flight=2,
            torn_end=True,
        ),
        TWO_RUN,
    ),
)
"""What no table can prevent: forbidden behaviour of hypervisors, and QEMUs that die at the instant of the switch-over."""
