"""A trace as a table: each step and the state after it."""

from agent.handshake.machines.destination import DestinationState
from tests.model.explore import Result
from tests.model.parts import Agent, Budget, Driver, Hosts, Mode, Talk, Unanswered

_HEAD = (
    "",
    "what happens",
    "source",
    "guest",
    "stream",
    "destination",
    "copy",
    "Finish",
    "drivers: source/destination",
    "in flight",
)


def table(result: Result) -> str:
    """Return the shortest trace to the violation, one line per step; empty if there is none."""
    if not result.trace:
        return ""
    rows = [_HEAD, *(_row(number, label, parts) for number, (label, parts) in enumerate(result.trace))]
    blanked = [rows[0], *(_changes(before, row) for before, row in zip([_HEAD, *rows[1:]], rows[1:], strict=False))]
    widths = [max(len(row[column]) for row in blanked) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in blanked]
    return "\n".join(
        [f"{result.rule}  (world {result.world})", "", lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
    )


def _row(number: int, label: str, parts: tuple[Agent, Agent, Hosts, Talk, Budget]) -> tuple[str, ...]:
    source, destination, hosts, talk, _ = parts
    drivers = " ".join(_driver(driver) for driver in talk.drivers if driver.mode is not Mode.OFF)
    return (
        str(number),
        label,
        _agent(source),
        hosts.guest.name.lower(),
        hosts.stream.name.lower(),
        _agent(destination),
        hosts.copy.name.lower(),
        hosts.finish.name.lower(),
        drivers,
        " ".join(sorted(m.call if m.answer is Unanswered.YET else f"re:{m.call}" for m in talk.flying)),
    )


def _agent(agent: Agent) -> str:
    attempt = f"{agent.attempt}:" if agent.attempt > 1 else ""
    return f"{attempt}{agent.state or '-'}{'~' if agent.behind else ''}{'' if agent.up else ' (down)'}"


def _driver(driver: Driver) -> str:
    if driver.mode in (Mode.ENDED, Mode.DEAD):
        return driver.mode.name.lower()
    looking = "?" if driver.mode in (Mode.LOOK_SOURCE, Mode.LOOK_DESTINATION) else ""
    attempt = f"{driver.attempt}:" if driver.attempt > 1 else ""
    destination: DestinationState | None = driver.dst
    statement = f"!{driver.dead} dead" if driver.dead else ""
    return f"{attempt}{driver.src or '-'}/{destination or '-'}{looking}{'!cancel' if driver.cancel else ''}{statement}"


def _changes(before: tuple[str, ...], row: tuple[str, ...]) -> tuple[str, ...]:
    """Return a row with the cells that did not change blanked; the number and the step are always shown."""
    return (*row[:2], *(cell if cell != old else "." for cell, old in zip(row[2:], before[2:], strict=True)))
