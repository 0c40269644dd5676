"""agent.hypervisor.libvirt.domain: which domain a reference means. Uses libvirt's own test driver, which needs no daemon."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import DomainAmbiguous  # noqa: E402 - after the skip
from agent.hypervisor.libvirt import domain as domains  # noqa: E402
from agent.hypervisor.libvirt.connection import Link  # noqa: E402

A, B = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e000a", "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e000b"
HEX, BRACED = B.replace("-", ""), f"{{{B}}}"


@pytest.fixture
def connection() -> Iterator[Any]:
    opened = libvirt.open("test:///default")
    yield opened
    for domain in opened.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE):  # kept as long as the process runs
        domain.undefine()
    opened.close()


def define(connection: Any, name: str, uuid: str) -> None:
    connection.defineXML(
        f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>65536</memory><os><type>hvm</type></os></domain>"
    )


@pytest.mark.parametrize("name", ["web1", HEX, BRACED, f"urn:uuid:{B}", B.upper()])
def test_6_03_an_exact_name_is_found(connection: Any, name: str) -> None:
    define(connection, name, A)
    assert domains.find(connection, name).UUIDString() == A
    assert domains.find(connection, A).name() == name
    assert domains.find(connection, A.upper()).name() == name


def test_6_03_the_name_of_one_and_the_uuid_of_another(connection: Any) -> None:
    define(connection, B, A)
    define(connection, "meant", B)
    with pytest.raises(DomainAmbiguous, match=f"meant.*{A}"):
        domains.find(connection, B)
    assert domains.by_uuid(connection, B).name() == "meant"
    assert domains.by_name(connection, B).UUIDString() == A


@pytest.mark.parametrize("reference", ["nobody", A, HEX, BRACED, "../../victim"])
def test_6_03_a_missing_guest_is_not_found(connection: Any, reference: str) -> None:
    define(connection, "web1", B)
    with pytest.raises(libvirt.libvirtError) as error:
        domains.find(connection, reference)
    assert error.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("reference", ["web1", A, B, "nobody"])
def test_a_look_up_keeps_no_connection_open(connection: Any, no_garbage_collector: None, reference: str) -> None:
    """An open connection keeps the migration job that was begun on it, which would hold the guest until a garbage collection."""
    define(connection, "web1", A)
    other = libvirt.open("test:///default")
    Link(other).run(lambda opened: domains.find(opened, reference).name())
    assert other.close() == 0


def test_a_connection_closes_even_if_a_cycle_holds_its_domains(connection: Any, no_garbage_collector: None) -> None:
    define(connection, "web1", A)
    link = Link(libvirt.open("test:///default"))
    freed: list[str] = []

    class Kept:
        def __init__(self, domain: Any) -> None:
            self.itself, self.domain = self, domain

        def __del__(self) -> None:
            freed.append("the domain")

    def leak(opened: Any) -> None:
        Kept(domains.by_name(opened, "web1"))

    link.run(leak)
    link.release()
    assert freed == ["the domain"]
