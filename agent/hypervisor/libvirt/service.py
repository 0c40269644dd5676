"""The libvirt daemon behind a connection URI: its name, its folders, its hook. The one place that knows them.

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
"""The daemon that listens on a socket of that name."""
MODES: Final[Mapping[str, str]] = {"direct": MODULAR, "legacy": MONOLITHIC}
"""The daemon for libvirt's URI parameter ``mode``."""


@dataclass(frozen=True)
class Service:
    """One libvirt daemon."""

    name: str
    """Also that of its systemd unit."""
    run: Path | None
    """Its run folder; None where it cannot be told, as for a user's own session."""
    hook: Path | None
    """Where Drover's hook belongs; None for a daemon that has no run folder of the system's."""

    @property
    def logs(self) -> Path | None:
        """Where it keeps a log for each QEMU, under the same root as its run folder; None where that cannot be told."""
        return self.run.resolve().parent.parent / "var/log/libvirt/qemu" if self.run else None


def behind(uri: str, run: Path = RUN) -> Service:
    """The daemon that libvirt connects to for a URI such as ``qemu:///system``, chosen as libvirt's client does: by ``socket``,
    by ``mode``, else virtqemud where its socket exists.
    """
    parts = urlsplit(uri)
    words = {key: values[0] for key, values in parse_qs(parts.query).items()}
    socket = Path(words["socket"]) if "socket" in words else None
    is_system = parts.scheme in ("qemu", "qemu+unix") and not parts.netloc and parts.path == "/system"
    name = SOCKETS.get(socket.name) if socket else None
    name = name or MODES.get(words.get("mode", "")) or _found(run if is_system and socket is None else None)
    if not is_system:
        return Service(name, None, None)
    return Service(name, socket.parent if socket else run, ETC / HOOK)


def _found(run: Path | None) -> str:
    """By the sockets in the run folder, in libvirt's own order."""
    present = (name for socket, name in SOCKETS.items() if run is not None and (run / socket).exists())
    return next(present, MONOLITHIC)
