"""The configurations of libvirt that a lab can have, as data."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.kit.lab.errors import LabError

VARIABLE: Final = "DROVER_LAB_SETTING"
"""Environment variable with the default setting of labs."""


USERFAULTFD: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")


@dataclass(frozen=True)
class Setting:
    """The contents of a host's configuration files. Keys that a text does not mention have libvirt's (Debian's) default."""

    name: str
    about: str
    qemu_user: str
    """User as which QEMU runs; it must exist on the machine."""
    qemu_conf: str
    libvirtd_conf: str

    @property
    def has_post_copy(self) -> bool:
        """Whether the kernel allows this setting's QEMU the use of userfaultfd that post-copy needs."""
        return self.qemu_user == "root" or USERFAULTFD.read_text().strip() == "1"


_LAB_QEMU_CONF: Final = """\
security_driver = "none"
stdio_handler = "file"
migrate_tls_x509_cert_dir = "/etc/libvirt/pki"
"""
"""Keys that every lab needs: AppArmor ignores network namespaces, so the machine's profiles would apply to the lab's paths; QEMU
itself writes the serial log (virtlogd would start a new file after 2 MiB, and the judge reads one); certificates are the lab's."""

_LAB_LIBVIRTD_CONF: Final = """\
unix_sock_group = "root"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
"""Keys that every lab needs, beside its `host_uuid`: no group ``libvirt``, and a log of its own."""

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
    """Return the setting of that name; by default, the one in the environment, else the first whose user exists on this machine."""
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
