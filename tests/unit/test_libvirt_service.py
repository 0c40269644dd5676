"""agent.hypervisor.libvirt.service: the libvirt daemon behind a URI, its folders and its hook."""

from pathlib import Path

import pytest

pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.libvirt.service import Service, service_of
from agent.hypervisor.libvirt.switchover import ETC, HOOK


@pytest.mark.parametrize(
    ("uri", "name", "run"),
    [
        ("qemu:///system", "libvirtd", "RUN"),
        ("qemu:///system?mode=legacy", "libvirtd", "RUN"),
        ("qemu:///system?mode=direct", "virtqemud", "RUN"),
        ("qemu:///system?socket=/x/run/libvirt/libvirt-sock", "libvirtd", "/x/run/libvirt"),
        ("qemu:///system?socket=/x/run/libvirt/virtqemud-sock", "virtqemud", "/x/run/libvirt"),
        ("qemu+unix:///system?mode=direct&socket=/x/some-sock", "virtqemud", "/x"),
        ("qemu:///session", "libvirtd", None),
        ("qemu+ssh://host/system", "libvirtd", None),
        ("test:///default", "libvirtd", None),
    ],
)
def test_6_36_the_daemon_follows_the_uri(tmp_path: Path, uri: str, name: str, run: str | None) -> None:
    folder = {None: None, "RUN": tmp_path}.get(run, Path(run or ""))
    assert service_of(uri, tmp_path) == Service(name, folder, ETC / HOOK if folder else None)


@pytest.mark.parametrize(
    ("sockets", "name"),
    [((), "libvirtd"), (("libvirt-sock",), "libvirtd"), (("libvirt-sock", "virtqemud-sock"), "virtqemud")],
)
def test_6_36_without_parameters_in_the_uri_the_sockets_decide(tmp_path: Path, sockets: tuple[str, ...], name: str) -> None:
    for socket in sockets:
        (tmp_path / socket).touch()
    assert service_of("qemu:///system", tmp_path).name == name
