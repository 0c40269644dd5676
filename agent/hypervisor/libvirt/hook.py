"""Installs `switchover` as a hook of libvirt: ``python -m agent.hypervisor.libvirt.hook [/etc/libvirt]``."""

import sys
from pathlib import Path

from agent.hypervisor.libvirt import switchover


def install(etc: Path) -> Path:
    """Install the hook in this configuration folder of libvirt, and return its path. libvirtd runs it from its next start on."""
    hook = etc / switchover.HOOK
    hook.parent.mkdir(parents=True, exist_ok=True)
    temporary = hook.with_name(f".{hook.name}")
    interpreter = Path(sys.executable).resolve()  # resolved, because an upgrade may remove the virtual environment
    temporary.write_text(f"#!{interpreter} -I\n{Path(switchover.__file__).read_text()}")
    temporary.chmod(0o755)
    temporary.replace(hook)
    return hook


def is_installed(hook: Path) -> bool:
    """Return whether the hook is installed and is of this very version of Drover."""
    try:
        return hook.read_text().endswith(Path(switchover.__file__).read_text())
    except OSError:
        return False


if __name__ == "__main__":
    print(install(Path(sys.argv[1]) if sys.argv[1:] else switchover.ETC))
