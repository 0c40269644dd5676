"""The plan of a storm of faults over migrations that wait: depends only on seed and number, so that a round can be repeated."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

from tests.bench.chaos_plan import HOSTS, MIB, Fault

GUESTS: Final = ("a", "b", "c", "d", "e", "f")
STORM_SECONDS: Final = 8.0
"""Until then faults strike; each transfer lasts about 2 s, so that some still wait."""
LONG_WAIT: Final = 300.0
"""Seconds: longer than any round."""
TAKE_OVER: Final = (2.5, 8.0)
"""Seconds of a fault that is repaired about when a driver is taken over (after 3 s), or leases end (after 5 s), or soon after."""

LIMITS: Final = {"incoming_limit": (1, 2), "outgoing_limit": (1, 2), "prepared_limit": (0, 1)}
"""Lowest and highest value of each limit at the begin."""

_TARGETS: Final[Mapping[str, int]] = {
    "coordinator": 6,
    "coordinator management link": 2,
    "{host} agent": 6,
    "{host} management link": 3,
    "{host} migration link": 1,
}
"""Name of each target, and how often it is drawn."""


@dataclass(frozen=True)
class Move:
    """One migration that is asked for."""

    guest: str
    source: str
    destination: str
    """Empty: any host."""
    managed: bool
    """The coordinator is asked; else the source's agent."""
    importance: int
    """As pb.Importance."""
    wait: float
    """Its slot_wait in seconds; 0: it does not wait."""
    bandwidth: int
    """Bytes per second."""
    at: float
    """When it is asked for, in seconds after the begin of the storm, as all times of a plan."""
    cancel: float | None
    """When it is cancelled."""
    cancelled_at_source: bool
    """The source's agent is asked to cancel it, whoever drives it."""

    def __str__(self) -> str:
        parts = [
            f"{self.guest} {self.source}→{self.destination or 'any'} at {self.at:.2f} s",
            "managed" if self.managed else "p2p",
            ("low", "medium", "high")[self.importance - 1],
            f"waits {self.wait:.1f} s" if self.wait else "does not wait",
        ]
        if self.cancel is not None:
            parts.append(f"cancelled after {self.cancel:.2f} s" + " at the source" * self.cancelled_at_source)
        return ", ".join(parts)


@dataclass(frozen=True)
class Change:
    """A change of a host's settings, which is taken back after all faults."""

    at: float
    host: str
    setting: str
    value: int
    """A limit, or 1 to cordon the host."""

    def __str__(self) -> str:
        return f"{self.setting} of {self.host} = {self.value} at {self.at:.2f} s"


@dataclass(frozen=True)
class WaitingPlan:
    """The plan of one round."""

    number: int
    limits: Mapping[str, Mapping[str, int]]
    """The limits of each host at the begin."""
    moves: tuple[Move, ...]
    changes: tuple[Change, ...]
    faults: tuple[Fault, ...]
    """Each with its own time after the begin; the targets are called "h1 agent", "coordinator", …"""

    def most(self, host: str, limit: str) -> int:
        """Return the highest value that a limit of a host has in this round."""
        changed = [change.value for change in self.changes if (change.host, change.setting) == (host, limit)]
        return max([self.limits[host][limit], *changed])

    def __str__(self) -> str:
        limits = ", ".join(f"{host} {'/'.join(str(of[name]) for name in LIMITS)}" for host, of in self.limits.items())
        lines = [f"round {self.number}: limits (incoming/outgoing/prepared) {limits}", *self.moves, *self.changes, *self.faults]
        return "\n  ".join(map(str, lines))


def waiting_plan(seed: int, number: int) -> WaitingPlan:
    """Return the plan of the round `number`."""
    random = Random(f"drover/waiting/{seed}/{number}")
    return WaitingPlan(
        number=number,
        limits={host: {name: random.randint(*LIMITS[name]) for name in LIMITS} for host in HOSTS},
        moves=tuple(_move(random, guest) for guest in GUESTS),
        changes=tuple(_change(random) for _ in range(random.choice((0, 0, 0, 1, 2)))),
        faults=tuple(sorted((_fault(random) for _ in range(random.randint(1, 5))), key=lambda fault: fault.at)),
    )


def _move(random: Random, guest: str) -> Move:
    source, destination = random.sample(HOSTS, 2)
    at = random.uniform(0, 1.0)
    return Move(
        guest=guest,
        source=source,
        destination=destination if random.random() < 0.65 else "",
        managed=random.random() < 0.65,
        importance=random.randint(1, 3),
        wait=random.choices((LONG_WAIT, random.uniform(2, 15), 0.0), (12, 4, 1))[0],
        bandwidth=random.choice((8, 12, 24)) * MIB,
        at=at,
        cancel=at + random.uniform(0, STORM_SECONDS) if random.random() < 0.25 else None,
        cancelled_at_source=random.random() < 0.25,
    )


def _change(random: Random) -> Change:
    setting = random.choice((*LIMITS, "cordoned"))
    value = {"incoming_limit": random.randint(0, 3), "outgoing_limit": random.randint(1, 3), "prepared_limit": random.randint(0, 2)}
    return Change(random.uniform(0.5, STORM_SECONDS), random.choice(HOSTS), setting, value.get(setting, 1))


def _fault(random: Random) -> Fault:
    target = random.choices(tuple(_TARGETS), tuple(_TARGETS.values()))[0].format(host=random.choice(HOSTS))
    action = random.choice(("cut", "cut in", "cut out", "reset") if target.endswith("link") else ("kill", "kill", "stop", "end"))
    down = random.uniform(*TAKE_OVER) if random.random() < 0.7 else random.uniform(0, TAKE_OVER[0])
    return Fault(action, target, at=random.uniform(0.8, STORM_SECONDS), down=down)
