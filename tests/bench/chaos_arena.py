"""The cluster in which faults are injected: reused after a good round, replaced after a bad one."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from agent.hypervisor.libvirt import hook
from tests.bench.chaos_targets import clear_clocks
from tests.bench.processes import journal_of
from tests.kit.cluster import ClusterGuest, GuestSpec, cluster
from tests.kit.cluster.platforms import LabCluster
from tests.kit.lab.errors import LabError

QUICK: Final[Mapping[str, Any]] = {"agent": {"incoming_limit": 2, "lease_seconds": 5, "takeover_after_seconds": 3}}
"""Short time-outs for silent peers, but longer than a Prepare on a busy machine."""

BROKEN: Final = frozenset({"effect failed", "the take-over failed", "the driver stopped on an impossible state"})
"""Log events of the daemons that must never happen, like all of level critical."""


class Arena:
    """A cluster that is made at its first use, and again after `discard`."""

    def __init__(self, lab_id: str, settings: Mapping[str, Any] = QUICK, *, hosts: int = 2, disk_mib: int = 0) -> None:
        """`disk_mib`: size of the nodes' own disks, which can be filled; 0: they use the machine's disk."""
        self._make = partial(cluster, "libvirt", lab_id=lab_id, settings=settings, hosts=hosts, lab={"disk_mib": disk_mib})
        self._stack = contextlib.ExitStack()
        self._made: LabCluster | None = None
        self._marks: dict[str, int] = {}
        self._numbers = itertools.count(1)

    def new_name(self, prefix: str) -> str:
        """Return a new name for a guest: a used one would continue the former guest's log."""
        return f"{prefix}{next(self._numbers)}"

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()

    @property
    def made(self) -> LabCluster:
        """The cluster, without faults."""
        if self._made is None:
            made = self._stack.enter_context(self._make())
            assert isinstance(made, LabCluster), "asked for real hosts"
            for host in made.lab.hosts:
                hook.install(host.path / "etc/libvirt")  # as docs/operations.md tells every operator to
            self._made = made
        return self._made

    def discard(self) -> None:
        """Take the cluster down, whatever its state."""
        self._made = None
        self._stack.close()
        clear_clocks()

    @contextlib.contextmanager
    def guest(self, spec: GuestSpec, host: str) -> Iterator[ClusterGuest]:
        """Yield a new guest; destroy it afterwards on every host."""
        with self.guests([(spec, host)]) as (guest,):
            yield guest

    @contextlib.contextmanager
    def guests(self, wanted: Sequence[tuple[GuestSpec, str]]) -> Iterator[list[ClusterGuest]]:
        """Yield new guests, each on its host; destroy them afterwards on every host."""
        made = self.made
        self._marks = {daemon.name: _size(daemon.log) for daemon in made.daemons()}
        made.specs.update({spec.name: spec for spec, _ in wanted})
        try:
            yield [made.start_guest(spec.name, host) for spec, host in wanted]
        finally:
            with contextlib.suppress(LabError):
                for each in made.lab.hosts:
                    each.destroy_all()

    def complaints(self) -> list[str]:
        """Return the log lines since the guest's start that must never happen (see `BROKEN`)."""
        return [
            f"{daemon.name} logged: {line.get('event')} {str(line.get('exception', ''))[-300:]}".strip()
            for daemon in self.made.daemons()
            for line in daemon.lines(self._marks.get(daemon.name, 0))
            if line.get("level") == "critical" or line.get("event") in BROKEN
        ]

    def keep_evidence(self, folder: Path, guests: Sequence[ClusterGuest], report: str) -> None:
        """Copy the evidence of a failure to `folder`: logs since the guests' start, journals, the guests' own logs, `report`."""
        made = self.made
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "report.txt").write_text(report + "\n")
        for daemon in made.daemons():
            with daemon.log.open("rb") as log:
                log.seek(self._marks.get(daemon.name, 0))
                (folder / daemon.log.name).write_bytes(log.read())
        for name in (*made.hosts, "co"):
            for path in whole_journal(journal_of(made, name)):
                _copy(path, folder / f"{name}-{path.name}")
        for host in made.lab.hosts:
            _copy(host.path / "var/log/libvirt/libvirtd.log", folder / f"{host.name}-libvirtd.log")
        for guest in guests:
            for path in (guest.serial_log, guest.serial_log.with_suffix(".stamps")):
                _copy(path, folder / path.name)
            for host in made.lab.hosts:
                _copy(host.path / f"var/log/libvirt/qemu/{guest.name}.log", folder / f"{host.name}-qemu-{guest.name}.log")


def whole_journal(path: Path) -> list[Path]:
    """Return the database and its other files: its write-ahead log, the mark with its number of transactions, …"""
    return sorted(path.parent.glob(f"{path.name}*"))


def _copy(path: Path, to: Path) -> None:
    if path.exists():
        shutil.copyfile(path, to)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
