"""The resources of processes, from /proc."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.kit.cluster import Cluster
from tests.kit.cluster.platforms import LabCluster

TCP_LISTEN = "0A"
"""The state LISTEN in /proc/net/tcp (include/net/tcp_states.h)."""


@dataclass(frozen=True)
class Reading:
    """The resources of one process at one moment."""

    threads: int
    fds: int
    """Open file descriptors."""
    ports: int
    """Listening TCP sockets."""
    rss_kib: int
    """Resident memory, KiB."""
    cpu_seconds: float
    """User and system time since its start."""
    journal_kib: int = 0
    """Size of its SQLite file, KiB."""
    wal_kib: int = 0
    """Size of its write-ahead log, KiB: merged into the file at about 4 MiB, and then overwritten from its start."""


def read_process(pid: int, journal: Path | None = None) -> Reading:
    """Return the resources of a process, and the sizes of its `journal`. Raises `OSError` if there is no such process (any more)."""
    status = Path(f"/proc/{pid}/status").read_text()
    sockets = _sockets(pid)
    return Reading(
        threads=_figure(status, "Threads"),
        fds=len(os.listdir(f"/proc/{pid}/fd")),
        ports=len(sockets & _listening(pid)),
        rss_kib=_figure(status, "VmRSS"),
        cpu_seconds=_cpu_seconds(pid),
        journal_kib=_size_kib(journal),
        wal_kib=_size_kib(journal.with_name(journal.name + "-wal")) if journal else 0,
    )


def _figure(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"no {name}: it is a zombie")
    return int(found[1])


def _cpu_seconds(pid: int) -> float:
    # The name (field 2) may contain blanks and parentheses; field 3 follows the last parenthesis.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _sockets(pid: int) -> set[str]:
    """Return the inodes of its open sockets."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _listening(pid: int) -> set[str]:
    """Return the inodes of the listening TCP sockets of its network namespace."""
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == TCP_LISTEN}


def _size_kib(path: Path | None) -> int:
    return path.stat().st_size // 1024 if path is not None and path.exists() else 0


def read_all(made: Cluster) -> dict[str, Reading]:
    """Return the reading of every daemon of a cluster by kind and host, including libvirtd of real hosts."""
    found = {f"agent {name}": read_process(daemon.running().pid, journal_of(made, name)) for name, daemon in made.agents.items()}
    found["coordinator"] = read_process(made.coordinator.running().pid, journal_of(made, "co"))
    if isinstance(made, LabCluster):
        for host in made.lab.hosts:
            if host.libvirtd_pid is not None:
                found[f"libvirtd {host.name}"] = read_process(host.libvirtd_pid)
    return found


def journal_of(made: Cluster, name: str) -> Path:
    """Return the SQLite file of an agent, or of the coordinator ("co")."""
    return made.state_dir(name) / ("store.sqlite" if name == "co" else "journal.sqlite")
