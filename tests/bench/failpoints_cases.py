"""The process of each failpoint, and the scenario in which it is reached, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from agent.handshake.machines.failpoints import all_points

MIB: Final = 1 << 20
SLOW: Final = 16 * MIB
"""Bytes per second: Perform lasts some 1.5 s for the guest of the failpoints."""
SLOWER: Final = 6 * MIB
"""Bytes per second: Perform lasts longer than a source waits for a silent driver."""

MANAGED, P2P, TAKE_OVER = "managed", "p2p", "take-over"

PROCESSES: Final[Mapping[tuple[str, str], str]] = {
    ("source", MANAGED): "source agent",
    ("source", P2P): "source agent",
    ("destination", MANAGED): "destination agent",
    ("destination", P2P): "destination agent",
    ("driver", MANAGED): "coordinator",
    ("driver", P2P): "source agent",
    ("driver", TAKE_OVER): "source agent",
}
"""The process in which a failpoint fires, by the first word of its name and the mode."""


@dataclass(frozen=True)
class First:
    """What happens to a process before the case's failpoint is reached."""

    point: str
    """Its own failpoint; the first word names the process."""
    action: str = "kill"
    down: float = 0.0
    """Seconds for which it stays dead or stopped, or until the case's failpoint was reached."""
    before_hand: float = 0.0
    """Seconds from then until the action by hand."""


@dataclass(frozen=True)
class Scenario:
    """One course of a migration."""

    name: str
    bandwidth: int = SLOW
    cancel: bool = False
    """It is cancelled while the memory flows and the destination is armed."""
    first: First | None = None
    by_hand: str = ""
    """Action after `first`, or during Perform, by an operator or by chance: see `failpoints.BY_HAND`."""
    lie: bool = False
    """A caller claims falsely, while the memory flows, that the source has kept the guest."""
    goes_back: bool = False
    """An operator's statement lets the guest go on from before its switch-over, so its log is not judged."""
    paused: bool = False
    """The guest is to arrive paused, so that Finish reports the commit and not the guest's start."""
    uri: str = ""
    """URI for the destination; "taken" means a port on which another program listens."""


PLAIN: Final = Scenario("plain")
CANCEL: Final = Scenario("cancelled during Perform", cancel=True, bandwidth=SLOWER)
"""So slow that even a busy machine cancels in time."""
NEVER_ARMED: Final = Scenario(
    "all is sent, and the destination agent dies before it arms",
    bandwidth=0,
    first=First("destination.finish.journal.before", "stop", before_hand=1.0),
    by_hand="kill the destination's agent",
)
CANCELLED_WHEN_SENT: Final = Scenario(
    "cancelled when all is sent, and the destination agent dies before it arms",
    bandwidth=0,
    first=First("destination.finish.journal.before", "stop", before_hand=1.0),
    by_hand="cancel, and kill the destination's agent",
)
STARTS_MEANWHILE: Final = Scenario(
    "abandoned by a false claim while the copy starts",
    first=First("destination.abandon.effect.before", "stop", down=4),
    lie=True,
)
DESTINATION_RESTARTS: Final = Scenario("destination agent dead when prepared", first=First("destination.prepare_done.journal.after"))
UNFINISHED: Final = Scenario("destination agent dead when the guest ran", first=First("destination.saw_running.journal.before"))
DECLARED_DEAD: Final = Scenario(
    "destination dies after its commit, is declared dead, and comes back",
    first=First("destination.saw_running.journal.after"),
    by_hand="declare the destination dead",
    goes_back=True,
)
ARRIVES_PAUSED: Final = Scenario("the guest arrives paused", paused=True)
KEPT_BY_SILENCE: Final = Scenario("driver dead before Perform", first=First("driver.perform.before", down=3.4))
"""Longer than a source waits for its driver, shorter than a destination keeps its slot."""
STREAM_BREAKS: Final = Scenario("destination libvirtd restarts during Perform", by_hand="restart the destination's libvirtd")
TAKEN_OVER: Final = Scenario("coordinator dead before Finish", SLOWER, first=First("driver.finish.before", down=8))

SCENARIOS: Final[tuple[tuple[str, Scenario], ...]] = (
    ("source.restarted.*", Scenario("source agent dead when begun", first=First("source.begin_done.journal.after"))),
    ("source.saw_stopped.*", Scenario("source agent dead when all is sent", first=First("source.perform_done.journal.before"))),
    ("source.driver_silent.*", Scenario("driver dead before Prepare", first=First("driver.prepare.before", down=6))),
    ("source.confirm_gone.*", DESTINATION_RESTARTS),
    ("driver.confirm_gone.*", NEVER_ARMED),
    ("source.resume*", NEVER_ARMED),
    ("destination.restarted.*", DESTINATION_RESTARTS),
    ("destination.lease_expired.*", Scenario("driver dead before Begin", first=First("driver.begin.before", down=8))),
    ("destination.look.*", UNFINISHED),
    ("destination.finish_done.*", ARRIVES_PAUSED),
    ("destination.disown*", DECLARED_DEAD),
    ("destination.abandon_refused.*", STARTS_MEANWHILE),
    ("driver.abandon.*", CANCELLED_WHEN_SENT),
    (
        "destination.saw_absent.*",
        Scenario("cancelled, destination agent dead", cancel=True, first=First("destination.finish_failed.journal.before")),
    ),
    ("destination.finish_unknown.*", STREAM_BREAKS),
    ("source.perform_failed.*", STREAM_BREAKS),
    ("source.saw_dead.*", Scenario("the guest's QEMU dies during Perform", by_hand="kill the source's QEMU")),
    (
        "source.begin_failed.*",
        Scenario("source libvirtd dead at Begin", first=First("source.begin.effect.before", "stop"), by_hand="kill source libvirtd"),
    ),
    ("destination.prepare_failed.*", Scenario("the port is taken", uri="taken")),
    ("destination.abandon.effect.*", CANCEL),
    ("*.abandon_source_kept.*", KEPT_BY_SILENCE),
    (
        "destination.abandon.*",
        Scenario("given up by hand", first=First("driver.perform.before", "stop"), by_hand="abandon at the destination"),
    ),
    *(
        (pattern, CANCEL)
        for pattern in (
            "source.abort.*",
            "source.saw_untouched.*",
            "source.look.*",
            "source.release.*",
            "destination.finish_failed.*",
            "destination.abandon_*",
            "driver.abort.*",
        )
    ),
    ("*", PLAIN),
)
"""(pattern, scenario); the first pattern that matches counts."""

TAKEN_OVER_POINTS: Final = ("driver.perform.*", "driver.finish.*", "driver.confirm_running.*")
"""The failpoints of a source agent that has taken over from a dead coordinator."""


@dataclass(frozen=True)
class FailpointCase:
    """One row of the table."""

    point: str
    mode: str
    scenario: Scenario

    @property
    def process(self) -> str:
        return PROCESSES[self.point.partition(".")[0], self.mode]

    @property
    def name(self) -> str:
        """The name for `--only`, such as "managed:driver.finish.before"."""
        return f"{self.mode}:{self.point}"


def cases(modes: tuple[str, ...], only: str = "*") -> Iterator[FailpointCase]:
    """Yield every matching row, one mode after the other."""
    for mode in modes:
        for point in all_points():
            case = _case(point, mode)
            if case is not None and (fnmatchcase(point, only) or fnmatchcase(case.name, only)):
                yield case


def _case(point: str, mode: str) -> FailpointCase | None:
    if mode != TAKE_OVER:
        return FailpointCase(point, mode, next(scenario for pattern, scenario in SCENARIOS if fnmatchcase(point, pattern)))
    taken_over = any(fnmatchcase(point, pattern) for pattern in TAKEN_OVER_POINTS)
    return FailpointCase(point, mode, TAKEN_OVER) if taken_over else None
