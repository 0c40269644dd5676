"""Points at which a test can kill or stop this process: at every journal write, effect and reply of the protocol.

They cost one check of an empty dictionary when off. Switched on only through the environment, which no service unit sets::

    DROVER_FAILPOINTS="source.perform_done.journal.after=kill"   (several: separated by commas)

Actions: ``kill`` (SIGKILL: no clean-up), ``stop`` (SIGSTOP, until somebody sends SIGCONT). Each fires once per process.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from typing import Final

from agent.handshake.machines.decide import Call
from agent.handshake.machines.destination import DESTINATION, DestinationEffect
from agent.handshake.machines.source import SOURCE, SourceEffect

VARIABLE: Final = "DROVER_FAILPOINTS"

_ACTIONS: Final[Mapping[str, signal.Signals]] = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def all_points() -> Iterator[str]:
    """Yield the name of every failpoint. ``driver`` is the process that drives: the coordinator, or the source's agent.

    ``journal.before`` and ``journal.after``: around the write of an event; ``effect.before``: before an effect on the hypervisor;
    ``news``: between the end of an effect and the event that reports it; ``reply``: before the answer to a call.
    """
    for role, machine, effects in (("source", SOURCE, SourceEffect), ("destination", DESTINATION, DestinationEffect)):
        events = dict.fromkeys(event for _, event in machine.table)
        for event in events:
            yield from (f"{role}.{event}.journal.before", f"{role}.{event}.journal.after")
            if event != "restarted":  # that event comes from reading the journal
                yield f"{role}.{event}.{'reply' if event in machine.calls else 'news'}"
        for effect in effects:
            yield f"{role}.{effect}.effect.before"
    for call in Call:
        yield from (f"driver.{call}.before", f"driver.{call}.after")


def _parse(text: str) -> dict[str, signal.Signals]:
    points: dict[str, signal.Signals] = {}
    known = frozenset(all_points()) if text else frozenset()
    for item in filter(None, text.split(",")):
        name, _, action = item.partition("=")
        if name not in known or action not in _ACTIONS:
            raise ValueError(
                f"{VARIABLE}: {item} is not a failpoint of docs/failpoints.md with one of the actions {', '.join(_ACTIONS)}"
            )
        points[name] = _ACTIONS[action]
    return points


_armed: Final = _parse(os.environ.get(VARIABLE, ""))


def failpoint(*name: str) -> None:
    """Kill or stop this process here if a test asked for it. `name`: the parts of the failpoint's name."""
    if not _armed:
        return
    number = _armed.pop(".".join(name), None)
    if number is not None:
        os.kill(os.getpid(), number)
