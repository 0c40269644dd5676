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
"""QEMU 7.2 and 10.0 both have it, and guests with it can migrate between them (facts/libvirt.md, 1)."""

UUID_ROOT = UUID("6d1f5b9e-6a1c-5b1e-9f6e-d7043e700000")
RESERVED_MIB = 4
"""Memory below this address holds the guest's own code and tables; the rest is the memory that it tests."""


FIRMWARE = (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))
"""The firmware's code, and the template of a guest's variables."""
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def _disk(image: Path) -> str:
    source = f"<driver name='qemu' type='raw'/><source file={quoteattr(str(image))}/>"
    return f"<disk type='file' device='disk'>{source}<target dev='vda' bus='virtio'/></disk>"


@cache
def machine_type(emulator: str = EMULATOR) -> str:
    """Return the machine type to use with this QEMU: the preferred one, else its newest q35."""
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
    """Size of the writable working set, within which the dirtied pages rotate. None: all memory."""
    mem_mib: int | None = None
    """Memory filled and checked; the rest stays zero. None: all but the first 4 MiB."""
    sweep_ms: int = 2000
    """Time in which all memory is checked once. Costs some 0.4 us per page."""
    log_every: int = 1
    """Ticks per line of the log."""
    uuid: UUID | None = None
    """None: derived from the name, always the same."""
    kernel: Path | None = None
    """None: `guest_kernel()`."""
    emulator: str = EMULATOR
    """A path that exists on only one host makes a guest that no other host can run."""
    machine: str | None = None
    """None: `machine_type(emulator)`."""
    cpu: str = "qemu64"
    cpu_features: tuple[str, ...] = ()
    """Features that the CPU must have (policy 'require'); the guest does not start on a host that lacks one."""
    metadata: str = ""
    """Raw XML inside <metadata>."""
    disk: Path | None = None
    """A raw image, which must exist; the guest itself does not read it."""
    nvram: Path | None = None
    """File of its firmware variables, which libvirt creates. The guest then has UEFI firmware (package ovmf), which does not boot
    the test guest: it runs, but logs nothing."""
    tpm: bool = False
    """Give it an emulated TPM (packages swtpm and swtpm-tools)."""

    def with_(self, **changes: Any) -> "Guest":
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    @property
    def stable_uuid(self) -> UUID:
        """The UUID of the domain: `uuid`, else derived from the name, the same in the whole lab."""
        return self.uuid or uuid5(UUID_ROOT, self.name)

    @property
    def pages(self) -> int:
        """Number of pages that the guest checks: when `checked` has grown by this, all memory was checked once."""
        usable = self.memory_mib - RESERVED_MIB
        return min(self.mem_mib or usable, usable) * 256

    def lines(self) -> int:
        """Return the number of S lines in the log so far (0 if there is no log yet)."""
        return self.serial_log.read_bytes().count(b"\nS ") if self.serial_log.exists() else 0

    def wait_lines(self, more: int, timeout: float = 60.0) -> None:
        """Wait until the guest has written `more` further S lines: it runs, and its memory is filled."""
        wanted = self.lines() + more
        wait_until(lambda: self.lines() >= wanted, timeout, f"guest {self.name} writes {more} more lines")

    def cmdline(self) -> str:
        """Return the guest's options in the syntax of `guest/guest.c`."""
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
        """Return the domain XML."""
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
