"""`scripts/bench footprint`: how soon agent and coordinator serve, and what they use while idle."""

import os
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from tests.bench.output import say, show_table
from tests.bench.processes import journal_of, read_process
from tests.bench.stats import Series
from tests.kit.cluster import Cluster, Daemon, GuestSpec, cluster

GUEST = GuestSpec("idle", memory_mib=64)
START_BAR_SECONDS = 1.0
RSS_BAR_MIB = 90.0


@dataclass(frozen=True)
class Footprint:
    """The figures of one daemon on one hypervisor."""

    kind: str
    daemon: str
    start_ms: Series
    """From the start of its process until it serves, by its own log."""
    rss_mib: Series
    """Resident memory at the end of the idle seconds after a start; shared libraries count in full."""
    cpu_percent: Series
    """Per cent of one core over the idle seconds, with the cluster's heartbeat of one second."""
    threads: int
    fds: int


@dataclass(frozen=True)
class Footprints:
    """The figures of all daemons, and their conditions."""

    starts: int
    idle_seconds: float
    load: tuple[float, float]
    found: tuple[Footprint, ...]


def measure(kinds: tuple[str, ...], starts: int, idle_seconds: float, lab_id: str) -> Footprints:
    """Start the first host's agent and the coordinator `starts` times, each alone, in a cluster that is otherwise up."""
    load = os.getloadavg()[0]
    found = []
    for kind in kinds:
        with cluster(kind, [GUEST], lab_id=lab_id) as made:
            made.start_guest(GUEST.name)
            for what, daemon in (("agent", made.agents["h1"]), ("coordinator", made.coordinator)):
                found.append(_measure(made, kind, what, daemon, starts, idle_seconds))
    return Footprints(starts, idle_seconds, (load, os.getloadavg()[0]), tuple(found))


def _measure(made: Cluster, kind: str, what: str, daemon: Daemon, starts: int, idle_seconds: float) -> Footprint:
    start_ms, rss, cpu = [], [], []
    for number in range(starts):
        daemon.stop()
        start_ms.append(_start(daemon) * 1e3)
        made.wait_known()
        pid = daemon.running().pid
        before = read_process(pid)
        time.sleep(idle_seconds)  # the measured period
        after = read_process(pid, journal_of(made, daemon.name))
        rss.append(after.rss_kib / 1024)
        cpu.append((after.cpu_seconds - before.cpu_seconds) / idle_seconds * 100)
        say(f"{kind} {what}, start {number + 1}: serves after {start_ms[-1]:.0f} ms, {rss[-1]:.1f} MiB")
    return Footprint(kind, what, Series.of(start_ms), Series.of(rss), Series.of(cpu), after.threads, after.fds)


def _start(daemon: Daemon) -> float:
    """Start the daemon; return the seconds until it served, by the time stamp of its log line."""
    mark = daemon.log.stat().st_size
    began = time.time()
    daemon.start()
    line = next(line for line in daemon.lines(mark) if line.get("event") == "serving")
    return datetime.fromisoformat(line["timestamp"]).timestamp() - began


# ---- report


def tell(footprints: Footprints) -> None:
    """Print a table and the verdicts to standard output."""
    click.echo(
        f"{footprints.starts} starts each, then {footprints.idle_seconds:g} s idle. "
        f"Load of the machine {footprints.load[0]:.1f} before, {footprints.load[1]:.1f} after."
    )
    head = ("daemon", "start p50 ms", "p95", "min", "RSS p50 MiB", "max", "CPU p50 %", "max", "threads", "fds")
    show_table("Until it serves, and idle", head, [_row(f) for f in footprints.found])
    click.echo("")
    for line in verdicts(footprints):
        click.echo(line)


def _row(f: Footprint) -> list[str]:
    start, rss, cpu = f.start_ms, f.rss_mib, f.cpu_percent
    figures = [f"{start.p50:.0f}", f"{start.p95:.0f}", f"{start.least:.0f}", f"{rss.p50:.1f}", f"{rss.most:.1f}"]
    return [f"{f.kind} {f.daemon}", *figures, f"{cpu.p50:.1f}", f"{cpu.most:.1f}", str(f.threads), str(f.fds)]


def verdicts(footprints: Footprints) -> list[str]:
    """Return a line for each limit; only the agent has any."""
    lines = []
    for f in footprints.found:
        if f.daemon != "agent":
            continue
        for what, measured, bar, unit in (
            ("start p50", f.start_ms.p50 / 1e3, START_BAR_SECONDS, "s"),
            ("idle RSS p50", f.rss_mib.p50, RSS_BAR_MIB, "MiB"),
        ):
            met = "met    " if measured < bar else "NOT MET"
            lines.append(f"{met}  {f.kind} agent: {what} {measured:.2f} {unit}, to be < {bar:g} {unit}")
    return lines


def to_json(footprints: Footprints) -> dict[str, Any]:
    found = [
        {
            "kind": f.kind,
            "daemon": f.daemon,
            "start_ms": f.start_ms.to_json(),
            "rss_mib": f.rss_mib.to_json(),
            "cpu_percent": f.cpu_percent.to_json(),
            "threads": f.threads,
            "fds": f.fds,
        }
        for f in footprints.found
    ]
    return {
        "starts": footprints.starts,
        "idle_seconds": footprints.idle_seconds,
        "load": footprints.load,
        "daemons": found,
        "verdicts": verdicts(footprints),
    }
