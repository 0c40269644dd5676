"""Check whether the QEMU of this host may use post-copy.

Post-copy needs userfaultfd(2) for faults inside the kernel (KVM's). The kernel grants that to a process with
CAP_SYS_PTRACE, which only a QEMU that runs as root has, or to everybody with `vm.unprivileged_userfaultfd` = 1; its default is 0.
QEMU reports the lack of it only when it is started as a destination: "Postcopy is not supported".
"""

import pwd
from pathlib import Path

SYSCTL = "vm.unprivileged_userfaultfd"
_SYSCTL_FILE = Path("/proc/sys/vm/unprivileged_userfaultfd")


def read_sysctl(file: Path = _SYSCTL_FILE) -> str:
    """Return the current value of `SYSCTL`; empty where the kernel does not have it."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def refusal(sysctl: str, qemu_uid: int | None) -> str:
    """Return why QEMU as that user may not use post-copy; empty where it may. `qemu_uid` is None where libvirt does not tell it."""
    if not sysctl:
        return f"its kernel has no {SYSCTL}, so it has no userfaultfd, which post-copy needs"
    if sysctl == "1" or qemu_uid == 0:
        return ""
    return f"{SYSCTL} is {sysctl} and QEMU runs as {_user(qemu_uid)}; `sysctl -w {SYSCTL}=1` on that host allows it"


def _user(uid: int | None) -> str:
    if uid is None:
        return "an ordinary user"
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"
