"""What libvirt stores of a guest beside the running copy: its definition for the next boot, and whether it starts with the host.

libvirt itself transfers the stored definition in the cookie of Perform, which comes too late for a Finish that is armed early:
without a cookie, Finish stores the definition of the running copy. So the destination gives Finish a cookie of Drover's own
making, with the identity elements from the source's Begin cookie and the stored definition that was sent with the guest. libvirt
then stores that as in a migration of its own, before it starts the guest.

libvirt does not migrate the autostart flag. At the end of a migration it removes a definition without checking that its file is
gone (it only logs a failure, and the domain is back after a restart of libvirtd).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import libvirt

from agent.hypervisor.base import HypervisorError, Stored
from agent.hypervisor.libvirt import switchover

_NAME = re.compile(r"<name>.*?</name>", re.DOTALL)
_IDENTITY = re.compile(r"<(name|uuid|hostname|hostuuid)>[^<]*</\1>")
"""The elements of a migration cookie that identify the guest and the other host to libvirt; they come first."""


def read(domain: Any) -> Stored | None:
    """Return what is stored of libvirt's domain; None for a transient one. Blocks."""
    if not domain.isPersistent():
        return None
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
    return Stored(domain.XMLDesc(flags), bool(domain.autostart()))


def set_autostart(domain: Any, autostart: bool) -> None:
    """Set the autostart flag where it differs, and read it back. Does nothing to a transient domain. Blocks as long as a migration
    job holds the guest."""
    if not domain.isPersistent() or bool(domain.autostart()) is autostart:
        return
    domain.setAutostart(int(autostart))
    if bool(domain.autostart()) is not autostart:
        raise HypervisorError(f"libvirt accepted the change of the autostart flag of {domain.name()}, but did not keep it")


def finish_cookie(begin_cookie: bytes, stored: Stored | None, name: str) -> bytes:
    """Return a cookie for Finish with the stored definition, under the name that the guest gets here. Empty without a definition."""
    if stored is None or not stored.definition:
        return b""
    identity = "".join(match[0] for match in list(_IDENTITY.finditer(begin_cookie.decode(errors="replace")))[:4])
    definition = _NAME.sub(lambda _: f"<name>{escape(name)}</name>", stored.definition, count=1) if name else stored.definition
    return f"<qemu-migration>{identity}<feature name='persistent'/>{definition}</qemu-migration>".encode() + b"\0"


def leftovers(run: Path, uuid: str, name: str) -> Iterator[Path]:
    """Yield the files that define this guest and that libvirtd will read at its next start. `name` empty: under any name."""
    folder = _configuration(run)
    for path in [folder / f"{name}.xml"] if name else sorted(folder.glob("*.xml")):
        try:
            text = path.read_text()
        except (OSError, ValueError):
            continue
        if f"<uuid>{uuid}</uuid>" in text:
            yield path


def remove_leftovers(run: Path, uuid: str, name: str) -> None:
    """Remove the definition files of a guest that libvirt reports as gone. Raises `HypervisorError` if one cannot be removed."""
    for path in leftovers(run, uuid, name):
        try:
            path.unlink()
        except OSError as error:
            raise HypervisorError(
                f"the definition {path} cannot be removed ({error.strerror}); libvirtd would load it at its next start: "
                "remove the file"
            ) from None


def _configuration(run: Path) -> Path:
    """Return the folder of the definitions in the mount namespace of the libvirtd with this run folder."""
    pid = switchover.libvirtd_pid(run)
    return Path(f"/proc/{pid}/root" if pid else "/", "etc/libvirt/qemu")
