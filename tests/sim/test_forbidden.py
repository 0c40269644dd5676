"""A host on which something forbids an option that its driver has, from the command line."""

import subprocess

import pytest

from tests.kit.cluster import GuestSpec, cluster

WHY = "vm.unprivileged_userfaultfd is 0 and QEMU runs as user libvirt-qemu"


@pytest.mark.timeout(120)
def test_6_30_post_copy_where_the_hosts_forbid_it() -> None:
    with cluster("sim", [GuestSpec("plain")], settings={"sim": {"forbidden": {"post_copy": WHY}}}) as made:
        made.start_guest("plain")

        def drover(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(made.drover(*arguments), capture_output=True, text=True, timeout=30, check=False)

        assert WHY in drover("host", "show", "h2").stdout
        refused = drover("migrate", "plain", "--to", "h2", "--option", "post_copy=on")
        assert refused.returncode == 4
        assert "h1" in refused.stderr
        assert WHY in refused.stderr
        assert made.copies("plain") == {"h1": "running"}
        moved = drover("migrate", "plain", "--to", "h2")
        assert moved.returncode == 0, moved.stderr
        assert made.running_on("plain") == ["h2"]
