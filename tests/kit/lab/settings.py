"""How a lab's hosts configure libvirt: the settings to choose from, as data."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.kit.lab.errors import LabError

VARIABLE: Final = "DROVER_LAB_SETTING"
"""Environment variable: the setting of every lab for which none is given."""


USERFAULTFD: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")


@dataclass(frozen=True)
class Setting:
    """The contents of a host's configuration files. What a text does not mention has libvirt's (Debian's) default."""

    name: str
    about: str
    qemu_user: str
    """As whom QEMU runs; the setting needs this user on the machine."""
    qemu_conf: str
    libvirtd_conf: str

    @property
    def has_post_copy(self) -> bool:
        """Whether the kernel lets this setting's QEMU use userfaultfd for the faults that post-copy needs."""
        return self.qemu_user == "root" or USERFAULTFD.read_text().strip() == "1"


_LAB_QEMU_CONF: Final = """\
security_driver = "none"
stdio_handler = "file"
migrate_tls_x509_cert_dir = "/etc/libvirt/pki"
"""
"""What every lab needs: AppArmor knows no network namespaces, so the machine's profiles would meet the lab's paths; QEMU itself
writes the serial log (virtlogd would begin a new file after 2 MiB, and the judge reads one); certificates are the lab's."""

_LAB_LIBVIRTD_CONF: Final = """\
unix_sock_group = "root"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
"""What every lab needs, beside its `host_uuid`: no group ``libvirt``, and a log of its own."""

STOCK: Final = Setting(
    name="stock",
    about="Debian's own qemu.conf and libvirtd.conf: QEMU is unprivileged and has a /dev of its own, libvirt remembers owners",
    qemu_user="libvirt-qemu",
    qemu_conf=_LAB_QEMU_CONF,
    libvirtd_conf=_LAB_LIBVIRTD_CONF,
)

ROOT: Final = Setting(
    name="root",
    about="QEMU runs as root, without a mount namespace; libvirtd has many workers",
    qemu_user="root",
    qemu_conf=_LAB_QEMU_CONF
    + """\
user = "root"
group = "root"
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
""",
    libvirtd_conf=_LAB_LIBVIRTD_CONF
    + """\
max_clients = 1000
max_queued_clients = 1000
min_workers = 5
max_workers = 64
prio_workers = 10
""",
)

SETTINGS: Final[Mapping[str, Setting]] = {setting.name: setting for setting in (STOCK, ROOT)}


def find(name: str | None = None) -> Setting:
    """The setting of that name; without one, that of the environment, else the first whose user this machine has."""
    wanted = name or os.environ.get(VARIABLE)
    if wanted is None:
        return next(setting for setting in SETTINGS.values() if _exists(setting.qemu_user))
    if wanted not in SETTINGS:
        raise LabError(f"there is no lab setting {wanted!r}; there are {', '.join(SETTINGS)}")
    return SETTINGS[wanted]


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
