"""The domain XML of the test guest: one virtual CPU, one serial port, nothing else, so that it starts quickly."""

import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5
from xml.sax.saxutils import escape, quoteattr

from tests.kit.lab.build import guest_kernel
from tests.kit.lab.processes import wait_until

EMULATOR = "/usr/bin/qemu-system-x86_64"
PREFERRED_MACHINE = "pc-q35-7.2"
"""Both QEMU 7.2 and 10.0 know it, and it can move between them (facts/libvirt.md, 1)."""

UUID_ROOT = UUID("6d1f5b9e-6a1c-5b1e-9f6e-d7043e700000")
RESERVED_MIB = 4
"""Memory below this address holds the guest's own code and tables; the rest is the memory that it tests."""


FIRMWARE = (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))
"""Its code, and the variables with which a guest begins."""
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def _disk(image: Path) -> str:
    source = f"<driver name='qemu' type='raw'/><source file={quoteattr(str(image))}/>"
    return f"<disk type='file' device='disk'>{source}<target dev='vda' bus='virtio'/></disk>"


@cache
def machine_type(emulator: str = EMULATOR) -> str:
    """The machine type to use with this QEMU: the preferred one, else its newest q35."""
    done = subprocess.run([emulator, "-machine", "help"], capture_output=True, text=True, timeout=20, check=True)
    known = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("pc-q35-")]
    return PREFERRED_MACHINE if PREFERRED_MACHINE in known else known[0]


@dataclass(frozen=True)
class Guest:
    """A test guest. `guest.xml()` is what libvirt's create or define takes; `guest/guest.c` explains the options."""

    name: str
    serial_log: Path
    """Source and destination append to this file, so it must be the same file on both hosts."""
    memory_mib: int = 64
    """At least 8."""
    ticks: int = 100
    """Ticks, and with `log_every=1` lines, per second: 19 to 1000. The judge's resolution of a gap is one tick."""
    dirty: int = 0
    """Pages (4 KiB) changed per second. Each counts for a whole page in a migration."""
    wss_mib: int | None = None
    """The dirtied pages go round within this much memory (the writable working set); None: all of it."""
    mem_mib: int | None = None
    """Memory filled and checked; the rest stays zero. None: all but the first 4 MiB."""
    sweep_ms: int = 2000
    """The time in which all memory is checked once. Costs some 0.4 us per page."""
    log_every: int = 1
    """A line each so many ticks."""
    uuid: UUID | None = None
    """None: derived from the name, always the same."""
    kernel: Path | None = None
    """None: the compiled test guest of this machine."""
    emulator: str = EMULATOR
    """A path that exists on one host only makes a guest that no other host can take."""
    machine: str | None = None
    """None: `machine_type(emulator)`."""
    cpu: str = "qemu64"
    cpu_features: tuple[str, ...] = ()
    """Features that the CPU must have (policy 'require'); one that the host cannot give makes the guest foreign."""
    metadata: str = ""
    """Raw XML for inside <metadata>."""
    disk: Path | None = None
    """A raw image, which must exist; the guest itself does not look at it."""
    nvram: Path | None = None
    """Where its firmware variables are; libvirt makes the file. The guest has UEFI firmware then (the package ovmf), which does not
    boot the test guest: it runs, and logs nothing."""
    tpm: bool = False
    """It has an emulated TPM (the packages swtpm and swtpm-tools)."""

    def with_(self, **changes: Any) -> "Guest":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def stable_uuid(self) -> UUID:
        """The UUID of the domain, lab-wide the same for the same name unless given."""
        return self.uuid or uuid5(UUID_ROOT, self.name)

    @property
    def pages(self) -> int:
        """The pages that the guest checks: so many more `checked` mean that all memory was seen once."""
        usable = self.memory_mib - RESERVED_MIB
        return min(self.mem_mib or usable, usable) * 256

    def lines(self) -> int:
        """How many S lines the log holds by now (0 when there is no log yet)."""
        return self.serial_log.read_bytes().count(b"\nS ") if self.serial_log.exists() else 0

    def wait_lines(self, more: int, timeout: float = 60.0) -> None:
        """Waits until the guest has written so many more S lines: it is running, and its memory is filled."""
        wanted = self.lines() + more
        wait_until(lambda: self.lines() >= wanted, timeout, f"guest {self.name} writes {more} more lines")

    def cmdline(self) -> str:
        """The guest's options, in the words that `guest/guest.c` knows."""
        options = {
            "ticks": self.ticks,
            "dirty": self.dirty,
            "sweep": self.sweep_ms,
            "log": self.log_every,
            "mem": self.mem_mib,
            "wss": self.wss_mib,
        }
        return " ".join(f"{key}={value}" for key, value in options.items() if value is not None)

    def _boot(self) -> str:
        if self.nvram:
            code, variables = FIRMWARE
            nvram = f"<nvram template='{variables}'>{escape(str(self.nvram))}</nvram>"
            return f"<loader readonly='yes' type='pflash'>{code}</loader>{nvram}"
        return f"<kernel>{escape(str(self.kernel or guest_kernel()))}</kernel><cmdline>{escape(self.cmdline())}</cmdline>"

    def xml(self) -> str:
        """The domain XML."""
        features = "".join(f"<feature policy='require' name={quoteattr(name)}/>" for name in self.cpu_features)
        return f"""\
<domain type='qemu'>
  <name>{escape(self.name)}</name>
  <uuid>{self.stable_uuid}</uuid>
  <metadata>{self.metadata}</metadata>
  <memory unit='MiB'>{self.memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine={quoteattr(self.machine or machine_type())}>hvm</type>
    {self._boot()}
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'>
    <model fallback='forbid'>{escape(self.cpu)}</model>{features}
  </cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{escape(self.emulator)}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'>
      <source path={quoteattr(str(self.serial_log))} append='on'/>
      <target port='0'/>
    </serial>
    <memballoon model='none'/>
    <video><model type='none'/></video>
    {_disk(self.disk) if self.disk else ""}
    {TPM if self.tpm else ""}
  </devices>
</domain>
"""
