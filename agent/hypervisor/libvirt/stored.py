"""What libvirt stores of a guest beside the copy that runs: its definition for the next boot, and whether it starts with the host.

libvirt itself carries the stored definition in the cookie of Perform, which comes too late for a Finish that is armed early: with
no cookie, Finish stores the definition of the copy that runs. So the destination hands Finish a cookie of its own making, with
what the source's libvirt said of itself at Begin and the stored definition that came with the guest. libvirt then stores it
as in a migration of its own, before it starts the guest.

libvirt moves the autostart flag nowhere, and removes a definition at the end of a migration without looking whether its file is
gone (it logs that, and the domain is back when it is started again).
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
"""The elements of a migration cookie by which libvirt knows its guest and the other host; they come first."""


def read(domain: Any) -> Stored | None:
    """What is stored of libvirt's domain; None for a transient one. Blocks."""
    if not domain.isPersistent():
        return None
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
    return Stored(domain.XMLDesc(flags), bool(domain.autostart()))


def set_autostart(domain: Any, autostart: bool) -> None:
    """Set it where it differs, and read it back. Blocks, for as long as a migration job holds the guest."""
    if not domain.isPersistent() or bool(domain.autostart()) is autostart:
        return
    domain.setAutostart(int(autostart))
    if bool(domain.autostart()) is not autostart:
        raise HypervisorError(f"libvirt took the autostart flag of {domain.name()}, and did not keep it")


def finish_cookie(begin_cookie: bytes, stored: Stored | None, name: str) -> bytes:
    """A cookie for Finish that brings the stored definition, under the name that the guest gets here. Empty where there is none."""
    if stored is None or not stored.definition:
        return b""
    identity = "".join(match[0] for match in list(_IDENTITY.finditer(begin_cookie.decode(errors="replace")))[:4])
    definition = _NAME.sub(lambda _: f"<name>{escape(name)}</name>", stored.definition, count=1) if name else stored.definition
    return f"<qemu-migration>{identity}<feature name='persistent'/>{definition}</qemu-migration>".encode() + b"\0"


def leftovers(run: Path, uuid: str, name: str) -> Iterator[Path]:
    """Files that libvirtd will read at its next start and that define this guest. `name` empty: under any name."""
    folder = _configuration(run)
    for path in [folder / f"{name}.xml"] if name else sorted(folder.glob("*.xml")):
        try:
            text = path.read_text()
        except (OSError, ValueError):
            continue
        if f"<uuid>{uuid}</uuid>" in text:
            yield path


def remove_leftovers(run: Path, uuid: str, name: str) -> None:
    """Remove the definition of a guest that libvirt says is not here any more. Raises `HypervisorError` while its file is held."""
    for path in leftovers(run, uuid, name):
        try:
            path.unlink()
        except OSError as error:
            raise HypervisorError(
                f"the definition {path} cannot be removed ({error.strerror}); libvirtd would read it again at its next start"
            ) from None


def _configuration(run: Path) -> Path:
    """The folder of the definitions, as the libvirtd behind this run folder sees it."""
    pid = switchover.libvirtd_pid(run)
    return Path(f"/proc/{pid}/root" if pid else "/", "etc/libvirt/qemu")
