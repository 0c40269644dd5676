"""Detection of a paused guest whose disks QEMU has not activated since the guest arrived. Blocks.

QEMU activates the disks of an arrived guest when it first runs. A QEMU before 10.0 that hands over disks which are not active
dies of an assertion (`bdrv_inactivate_recurse`), and the guest with it; `virsh migrate` has the same effect.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Final

from agent.hypervisor.libvirt.service import Service
from agent.hypervisor.libvirt.versions import started_version

_FIXED: Final = (10, 0)
"""The first version of QEMU that can hand over disks that are not active."""

_STARTED_SECONDS: Final = 0.02
"""Most CPU time that the thread of a virtual CPU uses to start; libvirt reads it in ticks of 10 ms."""


def refusal(domain: Any, service: Service) -> str:
    """Return why this guest, which its user has paused, must not be migrated now; empty where it may be."""
    process = _process(domain.name(), service)
    if _has_run(domain) or not has_disk(domain.XMLDesc()) or not _arrived(process) or _holds_images(process):
        return ""
    name = domain.name()
    version = started_version(service.logs / f"{name}.log") if service.logs else ""
    if version and is_fixed(version):
        return ""
    return (
        f"the guest has a disk, is paused, and has not run since it arrived here: QEMU {version or 'before 10.0'} would crash when "
        f"it is migrated. Let it run for a moment (`virsh resume {name}; virsh suspend {name}`), then migrate it"
    )


def _has_run(domain: Any) -> bool:
    """Return whether the guest has run, by the time of its virtual CPUs. A very short run counts as none."""
    times = [nanoseconds / 1e9 for _, _, nanoseconds, _ in domain.vcpus()[0]]
    return any(seconds > _STARTED_SECONDS for seconds in times)


def has_disk(xml: str) -> bool:
    """Return whether QEMU opens an image for this domain XML: a disk with a medium in it, firmware variables."""
    root = ET.fromstring(xml)
    return root.find("devices/disk/source") is not None or root.find("os/nvram") is not None


def _process(name: str, service: Service) -> Path | None:
    """Return the folder of its QEMU in /proc; None where that is not known."""
    try:
        return Path("/proc") / (service.run / "qemu" / f"{name}.pid").read_text().strip() if service.run else None
    except OSError:
        return None


def _arrived(process: Path | None) -> bool:
    """Return whether its QEMU was started as a destination; True where that is not known."""
    try:
        return process is None or b"-incoming" in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return True


def _holds_images(process: Path | None) -> bool:
    """Return whether QEMU holds a lock on an image, which it does while the disk is active. False also where the storage does not
    support such locks (OFD locks)."""
    try:
        return process is not None and any("OFDLCK" in fd.read_text() for fd in (process / "fdinfo").iterdir())
    except OSError:
        return False


def is_fixed(version: str) -> bool:
    """Return whether this version of QEMU can hand over disks that are not active."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return numbers >= _FIXED
