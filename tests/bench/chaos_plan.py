"""The plan of a round of chaos: depends only on seed and number, so that a round can be repeated."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from random import Random
from typing import Final

from tests.bench.chaos_targets import FAULTS

MIB: Final = 1 << 20

LIMIT: Final = 16 * MIB
"""Bytes per second: Perform lasts some 1.5 s for the guest of the rounds."""

MAX_DOWN: Final = 3.0
"""Longest time in seconds until a fault is repaired."""

LEAST_STEP: Final = 1.5
"""Shortest time in seconds for which a clock stays stepped: a daemon sees a step after a second."""

LATEST: Final = 2.2
"""Latest time of a cancel or a rival, in seconds after the request."""

HOSTS: Final = ("h1", "h2", "h3")

POINTS: Final[Mapping[str, Sequence[str]]] = {
    "source": (
        "source.begin.journal.after",
        "source.begin_done.journal.before",
        "source.perform.journal.before",
        "source.perform.effect.before",
        "source.perform.reply",
        "source.perform_done.news",
        "source.perform_done.journal.after",
        "source.confirm_running.journal.before",
        "source.remove.effect.before",
        "source.remove_done.news",
    ),
    "destination": (
        "destination.reserve.journal.after",
        "destination.prepare.effect.before",
        "destination.prepare_done.news",
        "destination.prepare_done.journal.after",
        "destination.finish.journal.before",
        "destination.finish.journal.after",
        "destination.saw_running.news",
        "destination.saw_running.journal.after",
    ),
    "driver": (
        "driver.begin.before",
        "driver.prepare.after",
        "driver.perform.before",
        "driver.finish.before",
        "driver.finish.after",
        "driver.confirm_running.before",
    ),
}
"""Failpoints that every undisturbed migration reaches; some of the rounds inject their fault there."""


@dataclass(frozen=True)
class Fault:
    """One fault, which is repaired again."""

    action: str
    target: str
    at: float
    """Seconds after the request for the migration; for the second fault: after the first."""
    down: float
    """Seconds until it is repaired."""
    point: str = ""
    """Inject it at this failpoint instead, at which the process is held (SIGSTOP) meanwhile."""

    @property
    def name(self) -> str:
        """The name in tables and for `--only`, such as "kill source agent"."""
        return f"{self.action} {self.target}"

    def __str__(self) -> str:
        when = f"at {self.point}" if self.point else f"after {self.at:.2f} s"
        return f"{self.name} {when}, repaired {self.down:.2f} s later"


@dataclass(frozen=True)
class Rival:
    """Another request to migrate the same guest meanwhile."""

    same_id: bool
    """It has the migration's own id and goes to the other driver: the source's agent if managed, the coordinator if peer to peer."""
    third: bool
    """Its destination is a host that has no part in the migration."""
    at: float
    """Seconds after the request for the migration."""

    def __str__(self) -> str:
        who = "another driver with the same id" if self.same_id else "a second migration"
        return f"{who} to {'a third host' if self.third else 'the same host'} after {self.at:.2f} s"


@dataclass(frozen=True)
class Plan:
    """The plan of one round."""

    number: int
    mode: str
    """"managed" or "p2p"."""
    source: str
    destination: str
    dirty: int
    """Pages per second."""
    bandwidth: int
    """Bytes per second; 0: no limit."""
    cancel: float | None
    """Seconds after the request. None: not cancelled."""
    faults: tuple[Fault, ...]
    rival: Rival | None = None

    def __str__(self) -> str:
        limit = f"{self.bandwidth // MIB} MiB/s" if self.bandwidth else "no limit"
        cancelled = "" if self.cancel is None else f", cancelled after {self.cancel:.2f} s"
        cancelled += "" if self.rival is None else f", {self.rival}"
        return (
            f"round {self.number}: {self.mode} from {self.source} to {self.destination}, "
            f"{self.dirty} pages/s dirtied, {limit}{cancelled}; "
            f"{'; then '.join(map(str, self.faults))}"
        )


def plan(seed: int, number: int, only: str = "*") -> Plan:
    """Return the plan of the round `number`. `only` is a pattern for the names of faults."""
    random = Random(f"drover/{seed}/{number}")
    mode = random.choices(("managed", "p2p"), (3, 2))[0]
    bandwidth = random.choice((0, LIMIT, LIMIT))
    cancel = random.uniform(0, LATEST) if random.random() < 0.3 else None
    source, destination = random.sample(HOSTS, 2)
    return Plan(
        number=number,
        mode=mode,
        source=source,
        destination=destination,
        dirty=random.choice((0, 500)),
        bandwidth=bandwidth,
        cancel=cancel,
        faults=tuple(_faults(random, mode, bandwidth, only)),
        rival=random.choice(RIVALS)(random.uniform(0, LATEST)) if random.random() < 0.25 else None,
    )


RIVALS: Final = (
    partial(Rival, True, False),
    partial(Rival, True, True),
    partial(Rival, False, False),
    partial(Rival, False, True),
)


PHASES: Final[Mapping[str, str]] = {
    "reserve": "destination.reserve.journal.after",
    "begin": "source.begin_done.journal.before",
    "prepare": "destination.prepare_done.news",
    "perform": "",
    "finish": "destination.saw_running.news",
    "confirm": "source.remove.effect.before",
}
"""A failpoint in each phase; Perform lasts long enough to be hit by time."""

HYPERVISORS: Final = ("source libvirtd", "destination libvirtd", "source qemu", "destination qemu")


def each_phase() -> Iterator[Plan]:
    """Yield a fixed series of plans: kill libvirtd and QEMU on either side in each phase, managed and peer to peer."""
    cases = itertools.product(("managed", "p2p"), HYPERVISORS, PHASES.values())
    for number, (mode, target, point) in enumerate(cases, start=1):
        fault = Fault("kill", target, at=0.8, down=0.5, point=point)
        source, destination = (HOSTS[(number + step) % len(HOSTS)] for step in (0, 1))
        yield Plan(number, mode, source, destination, dirty=100, bandwidth=LIMIT, cancel=None, faults=(fault,))


def _faults(random: Random, mode: str, bandwidth: int, only: str) -> list[Fault]:
    known = [
        (action, target)
        for action, target in FAULTS
        if fnmatchcase(f"{action} {target}", only) and not (mode == "p2p" and target.startswith("coordinator"))
    ]
    if not known:
        raise ValueError(f"no fault is called {only} in a migration {mode}")
    count = 2 if random.random() < 0.25 else 1
    return [_fault(random, *_kind(random, known), bandwidth, first=index == 0) for index in range(count)]


def _kind(random: Random, known: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Choose a target, all with the same probability, then one of its actions."""
    target = random.choice(sorted({target for _, target in known}))
    return random.choice([each for each in known if each[1] == target])


def _fault(random: Random, action: str, target: str, bandwidth: int, *, first: bool) -> Fault:
    longest = (2.2 if bandwidth else 0.7) if first else 1.0
    point = random.choice(POINTS[random.choice(tuple(POINTS))]) if first and random.random() < 0.4 else ""
    down = MAX_DOWN * random.random() ** 2  # prefers short ones, as more rounds fit into a minute
    if target.endswith("clock"):
        down += LEAST_STEP
    return Fault(action, target, at=random.uniform(0, longest), down=down, point=point)
