"""Writes state machines, options and reasons as tables into docs/protocol.md, so that text and code cannot drift apart."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.handshake.machines.decide import decide, ended
from agent.handshake.machines.destination import DESTINATION, DestinationState
from agent.handshake.machines.source import SOURCE, SourceState
from agent.hypervisor.options import OPTIONS, Option, Support, shown
from agent.hypervisor.sim.profiles import PROFILES
from agent.runtime.errors import CODES

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"


def machine_table(machine: Any) -> str:
    """Return the table of a machine; calls are in bold."""
    rows = [
        (state or "(none)", f"**{event}**" if event in machine.calls else event, row.state, ", ".join(row.effects))
        for (state, event), row in machine.table.items()
    ]
    return table(("state", "event", "new state", "effects"), rows)


def driver_table() -> str:
    """Return the table of the driver's calls for each pair of records, when it goes on and when it was cancelled."""
    rows = []
    for src in (None, *SourceState):
        for dst in (None, *DestinationState):
            if (src, dst) == (SourceState.KEPT, DestinationState.RUNNING):
                continue
            go, stop = (", ".join(sorted(decide(src, dst, cancel=cancel))) for cancel in (False, True))
            end = "(ended)" if ended(src, dst) else ""
            rows.append((src or "(none)", dst or "(none)", go or end, stop or end))
    return table(("source", "destination", "go on", "cancelled"), rows)


def reason_table() -> str:
    return table(("reason", "gRPC code"), [(reason.value, code.name) for reason, code in CODES.items()])


def option_table() -> str:
    """The table of options."""
    head = ("option", "values", "default", "libvirt", *(f"sim `{profile}`" for profile in PROFILES), "needs", "what it does")
    return table(head, (_option_row(option) for option in OPTIONS.values()))


def _option_row(option: Option) -> tuple[str, ...]:
    default = "the driver's choice" if option.default is None else shown(option.default)
    libvirt = f"`{option.libvirt}`" if option.libvirt else "no"
    sim = (option.sim.get(profile, Support.UNSUPPORTED) for profile in PROFILES)
    does = (libvirt, *(_SUPPORT[support] for support in sim))
    where = f"{default} where both ends support it" if option.only_if_both else default
    needs = f"not offered yet: {option.blocked}" if option.blocked else option.needs
    return (f"`{option.name}`", option.expected, where, *does, needs, option.text)


_SUPPORT = {
    Support.SUPPORTED: "yes",
    Support.ALWAYS_ON: "always",
    Support.UNSUPPORTED: "no",
    Support.UNDONE: "yes (undone by Finish or Confirm)",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {
    "destination": lambda: machine_table(DESTINATION),
    "source": lambda: machine_table(SOURCE),
    "driver": driver_table,
    "options": option_table,
    "reasons": reason_table,
}
"""Tables by their name in the document: ``<!-- table NAME -->`` up to ``<!-- end -->``."""


def rendered(text: str) -> str:
    """Return the document with every table replaced."""
    for name, make in TABLES.items():
        head, start, rest = text.partition(f"<!-- table {name} -->\n")
        if not start:
            raise SystemExit(f"{DOCUMENT} has no place for the table {name}")
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{start}{make()}\n{end}{tail}"
    return text


def main() -> int:
    before = DOCUMENT.read_text()
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("The tables of docs/protocol.md are not up to date: run scripts/gen-docs", file=sys.stderr)
        return int(before != after)
    DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
