"""A paused guest whose disks QEMU has not activated since it arrived. Blocks.

libvirt has QEMU activate the disks of a guest that arrives when it first runs there. A QEMU before 10.0 that is to hand over disks
which are not active dies of an assertion (`bdrv_inactivate_recurse`), and the guest with it; `virsh migrate` does the same.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Final

from agent.hypervisor.libvirt.service import Service
from agent.hypervisor.libvirt.versions import started_version

_MENDED: Final = (10, 0)
"""The first version of QEMU that hands over disks that are not active."""

_STARTED_SECONDS: Final = 0.02
"""CPU time that the thread of a virtual CPU may need to start, as libvirt reads it: in ticks of 10 ms."""


def refusal(domain: Any, service: Service) -> str:
    """Why this guest, which its user has paused, may not be moved now; empty where it may."""
    process = _process(domain.name(), service)
    if _has_run(domain) or not has_disk(domain.XMLDesc()) or not _arrived(process) or _holds_images(process):
        return ""
    name = domain.name()
    version = started_version(service.logs / f"{name}.log") if service.logs else ""
    if version and is_mended(version):
        return ""
    return (
        f"it has a disk, is paused, and has not run since it arrived here: QEMU {version or 'before 10.0'} would die of a move, and "
        f"the guest with it. Let it run for a moment (virsh resume {name}, virsh suspend {name}), and move it then"
    )


def _has_run(domain: Any) -> bool:
    """By the time of its virtual CPUs; one that ran very shortly is not told from one that did not."""
    times = [nanoseconds / 1e9 for _, _, nanoseconds, _ in domain.vcpus()[0]]
    return any(seconds > _STARTED_SECONDS for seconds in times)


def has_disk(xml: str) -> bool:
    """Anything that QEMU opens as an image: a disk with a medium in it, firmware variables."""
    root = ET.fromstring(xml)
    return root.find("devices/disk/source") is not None or root.find("os/nvram") is not None


def _process(name: str, service: Service) -> Path | None:
    """The folder of its QEMU in /proc; None where that cannot be told."""
    try:
        return Path("/proc") / (service.run / "qemu" / f"{name}.pid").read_text().strip() if service.run else None
    except OSError:
        return None


def _arrived(process: Path | None) -> bool:
    """Its QEMU was started to receive it, or that cannot be told."""
    try:
        return process is None or b"-incoming" in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return True


def _holds_images(process: Path | None) -> bool:
    """QEMU locks the image of an active disk where its storage has such locks (OFD locks); False where it has not."""
    try:
        return process is not None and any("OFDLCK" in fd.read_text() for fd in (process / "fdinfo").iterdir())
    except OSError:
        return False


def is_mended(version: str) -> bool:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return numbers >= _MENDED
