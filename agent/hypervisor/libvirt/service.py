"""The libvirt daemon behind a connection URI: its name, folders and hook. No other module knows them.

QEMU is driven by libvirtd (as on Debian) or by virtqemud (as on Fedora, RHEL and SUSE). Both are built from the same source
and use the same run folder, lock and hook folder; they differ in their name and in the name of their socket.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from agent.hypervisor.libvirt.switchover import ETC, HOOK, RUN

MONOLITHIC: Final = "libvirtd"
MODULAR: Final = "virtqemud"

SOCKETS: Final[Mapping[str, str]] = {"virtqemud-sock": MODULAR, "libvirt-sock": MONOLITHIC}
"""Daemon by the name of the socket that it listens on."""
MODES: Final[Mapping[str, str]] = {"direct": MODULAR, "legacy": MONOLITHIC}
"""Daemon by the value of libvirt's URI parameter ``mode``."""


@dataclass(frozen=True)
class Service:
    """One libvirt daemon."""

    name: str
    """Name of the process and of its systemd unit."""
    run: Path | None
    """Its run folder; None where that is not known, as for a user's own session."""
    hook: Path | None
    """Path of Drover's hook; None for a daemon that does not use the system's run folder."""

    @property
    def logs(self) -> Path | None:
        """The folder of its log files, one for each guest, under the same root as its run folder; None where that is not known."""
        return self.run.resolve().parent.parent / "var/log/libvirt/qemu" if self.run else None


def service_of(uri: str, run: Path = RUN) -> Service:
    """Return the daemon that libvirt connects to for a URI such as ``qemu:///system``. It is chosen as libvirt's client chooses it:
    by ``socket``, by ``mode``, else virtqemud where its socket exists.
    """
    parts = urlsplit(uri)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    socket = Path(query["socket"]) if "socket" in query else None
    is_system = parts.scheme in ("qemu", "qemu+unix") and not parts.netloc and parts.path == "/system"
    name = SOCKETS.get(socket.name) if socket else None
    name = name or MODES.get(query.get("mode", "")) or _by_sockets(run if is_system and socket is None else None)
    if not is_system:
        return Service(name, None, None)
    return Service(name, socket.parent if socket else run, ETC / HOOK)


def _by_sockets(run: Path | None) -> str:
    """Return the daemon by the sockets in the run folder, in the order in which libvirt tries them."""
    present = (name for socket, name in SOCKETS.items() if run is not None and (run / socket).exists())
    return next(present, MONOLITHIC)
