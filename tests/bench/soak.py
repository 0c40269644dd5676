"""`scripts/bench soak`: moves one guest back and forth many times, and checks what is left over or has grown."""

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import click

from coordinator.client import Client, DroverClientError
from tests.bench.output import say, show_table
from tests.bench.processes import Reading, read_all
from tests.bench.stats import Series
from tests.kit.cluster import Cluster, ClusterGuest, GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster

GUEST = GuestSpec("soak", memory_mib=64, dirty=500)
WARM_UP = 8
"""Migrations before the first reading, in which pools fill, modules load and allocators reach their size."""
PEER_SHARE = 4
"""Every n-th migration goes peer to peer, the others through the coordinator."""

SLACK = 4
"""Allowed growth of threads and file descriptors: an agent keeps up to 4 idle connections to libvirtd."""
RSS_SLACK_KIB = 16 * 1024
"""Allowed growth of memory: ended migrations are kept (1000 at most, some KiB each), and allocators do not return everything."""
WAL_BOUND_KIB = 5 * 1024
JOURNAL_KIB_PER_MIGRATION = 8
"""Allowed growth of a journal, which keeps a row of each migration and attempt, up to 1000 of each kind."""
QUIET_SECONDS = 45.0
"""Longest wait until growth recedes: idle threads end after 30 s."""


@dataclass
class Soak:
    """The result of a soak."""

    kind: str
    migrations: int
    done: int = 0
    seconds: Series = field(default_factory=lambda: Series(()))
    """Duration of each migration."""
    failures: list[str] = field(default_factory=list)
    """A sentence for each failed migration."""
    before: Mapping[str, Reading] = field(default_factory=dict)
    half: Mapping[str, Reading] = field(default_factory=dict)
    after: Mapping[str, Reading] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Slots, ports, processes, definitions that should not be there."""
    log_problems: list[str] = field(default_factory=list)
    load: tuple[float, float] = (0.0, 0.0)

    @property
    def ok(self) -> bool:
        return not (self.failures or self.left or self.log_problems or self.grown())

    def grown(self) -> list[str]:
        """Return a sentence for everything that grew beyond its bound."""
        return [sentence for name, after in self.after.items() for sentence in self._grown(name, self.before[name], after)]

    def _grown(self, name: str, before: Reading, after: Reading) -> list[str]:
        bounds = {
            "threads": (after.threads, before.threads + SLACK),
            "file descriptors": (after.fds, before.fds + SLACK),
            "listening ports": (after.ports, before.ports),
            "KiB of resident memory": (after.rss_kib, before.rss_kib + RSS_SLACK_KIB),
            "KiB of write-ahead log": (after.wal_kib, WAL_BOUND_KIB),
            "KiB of journal": (after.journal_kib, before.journal_kib + JOURNAL_KIB_PER_MIGRATION * (self.migrations + 10)),
        }
        return [f"{name}: {now} {what}, at most {bound} expected" for what, (now, bound) in bounds.items() if now > bound]


async def measure(kind: str, migrations: int, lab_id: str) -> Soak:
    """Bring a cluster up and move its guest `migrations` times."""
    soak = Soak(kind, migrations)
    with cluster(kind, [GUEST], lab_id=lab_id) as made:
        guest = made.start_guest(GUEST.name)
        load = os.getloadavg()[0]
        async with AsyncExitStack() as stack:
            managing = await stack.enter_async_context(Client(made.server))
            peers = {name: await stack.enter_async_context(Client(agent.address)) for name, agent in made.agents.items()}
            await _move(Soak(kind, WARM_UP), managing, peers, guest, WARM_UP)
            soak.before = read_all(made)
            ports = _ports(made)
            first = await _move(soak, managing, peers, guest, migrations // 2)
            soak.half = read_all(made)
            second = await _move(soak, managing, peers, guest, migrations - migrations // 2)
            soak.seconds = Series.of([*first, *second])
            soak.load = load, os.getloadavg()[0]
            await _quiet(soak, made)
            soak.left = [*await _taken_slots(managing), *_left(made, ports)]
        guest.wait_lines(50)
        soak.log_problems = guest.judge().problems()
    return soak


async def _move(soak: Soak, managing: Client, peers: Mapping[str, Client], guest: ClusterGuest, times: int) -> list[float]:
    took = []
    for number in range(times):
        source = await _where(managing, guest)
        target = {"h1": "h2", "h2": "h1"}[source]
        client, who = (peers[source], "peer to peer") if number % PEER_SHARE == PEER_SHARE - 1 else (managing, "managed")
        began = time.monotonic()
        try:
            await client.migrate(guest.name, target, timeout=60)
        except DroverClientError as error:
            soak.failures.append(f"migration {number + 1} from {source} to {target}, {who}: {error}")
            say(soak.failures[-1])
        else:
            took.append(time.monotonic() - began)
            soak.done += 1
        guest.wait_lines(5)
        if (number + 1) % 25 == 0:
            say(f"{number + 1} of {times} migrations")
    return took


async def _where(client: Client, guest: ClusterGuest) -> str:
    domains = await client.list_domains()
    return next(domain.host for domain in domains if domain.name == guest.name and domain.state.value == "running")


async def _quiet(soak: Soak, made: Cluster) -> None:
    """Take readings until nothing is above its bound, for at most `QUIET_SECONDS`."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        soak.after = read_all(made)
        if not soak.grown() or time.monotonic() > end:
            return
        await asyncio.sleep(1.0)


async def _taken_slots(client: Client) -> list[str]:
    hosts = await client.list_hosts()
    return [f"{host.name}: {host.incoming_in_use} slots are taken" for host in hosts if host.incoming_in_use]


def _ports(made: Cluster) -> Mapping[str, object]:
    return {host.name: host.listening() for host in made.lab.hosts} if isinstance(made, LabCluster) else {}


def _left(made: Cluster, ports: Mapping[str, object]) -> list[str]:
    """Return what is left over: copies of the guest; on real hosts also QEMU processes, and ports that were not there before."""
    copies = made.copies(GUEST.name)
    left = [f"copies of the guest: {copies}"] if list(copies.values()) != ["running"] else []
    if isinstance(made, LabCluster):
        processes = [f"{host.name}: QEMU {qemu.pid}" for host in made.lab.hosts for qemu in host.qemu()]
        left += [f"{len(processes)} QEMU processes: {', '.join(processes)}"] if len(processes) != 1 else []
        left += [
            f"{h.name} listens on {h.listening()}, not {ports[h.name]}" for h in made.lab.hosts if h.listening() != ports[h.name]
        ]
    return left


# ---- report


def tell(soak: Soak) -> None:
    """Print tables and verdicts to standard output."""
    times = soak.seconds
    where = "real hosts" if soak.kind == "libvirt" else "the SIMULATED hypervisor"
    click.echo(
        f"{soak.migrations} migrations on {where}, every {PEER_SHARE}th peer to peer, after {WARM_UP} to warm up. "
        f"Load of the machine {soak.load[0]:.1f} before, {soak.load[1]:.1f} after."
    )
    if times:
        click.echo(f"Each took {times.p50 * 1e3:.0f} ms (p50), {times.p95 * 1e3:.0f} ms (p95), at least {times.least * 1e3:.0f} ms.")
    head = ("process", "threads", "fds", "ports", "RSS KiB", "RSS per migration", "CPU per migration", "journal KiB", "WAL KiB")
    show_table("Before → half → after", head, [_row(soak, name) for name in soak.after])
    click.echo("")
    for line in verdicts(soak):
        click.echo(line)


def _row(soak: Soak, name: str) -> list[str]:
    readings = [reading[name] for reading in (soak.before, soak.half, soak.after)]

    def over_time(what: str) -> str:
        return " → ".join(str(getattr(reading, what)) for reading in readings)

    per_migration = (readings[-1].rss_kib - readings[0].rss_kib) / max(1, soak.done)
    columns = [over_time(what) for what in ("threads", "fds", "ports", "rss_kib")]
    cpu = (readings[1].cpu_seconds - readings[0].cpu_seconds) / max(1, soak.migrations // 2)
    return [name, *columns, f"{per_migration:+.1f} KiB", f"{cpu * 1e3:.1f} ms", over_time("journal_kib"), over_time("wal_kib")]


def verdicts(soak: Soak) -> list[str]:
    """Return a line for each requirement: met or not."""
    return [
        _verdict(f"{soak.done} of {soak.migrations} migrations done", soak.failures),
        _verdict("the guest's log is perfect", soak.log_problems),
        _verdict("no slot, listening port, QEMU process or definition is left", soak.left),
        _verdict("no thread, file descriptor, memory or journal grew beyond its bound", soak.grown()),
    ]


def _verdict(what: str, problems: list[str]) -> str:
    return f"NOT MET  {what}: {'; '.join(problems)}" if problems else f"met      {what}"


def to_json(soak: Soak) -> dict[str, Any]:
    readings = {
        name: {"before": vars(soak.before[name]), "half": vars(soak.half[name]), "after": vars(soak.after[name])}
        for name in soak.after
    }
    return {
        "kind": soak.kind,
        "migrations": soak.migrations,
        "done": soak.done,
        "seconds": soak.seconds.to_json(),
        "load": soak.load,
        "processes": readings,
        "failures": soak.failures,
        "left": soak.left,
        "log_problems": soak.log_problems,
        "grown": soak.grown(),
        "verdicts": verdicts(soak),
    }
