"""Issue 6, line 29: libvirt's errors may quote any bytes that a peer sent."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from agent.hypervisor.base import InvalidDocument  # noqa: E402 - after the skip
from agent.hypervisor.libvirt import phases  # noqa: E402
from agent.hypervisor.libvirt.errors import translate  # noqa: E402


@pytest.fixture(name="connection")
def _connection() -> Iterator[Any]:
    """A connection to libvirt's own test driver, in this process."""
    phases.silence()
    connection = libvirt.open("test:///default")
    yield connection
    connection.close()


def fail(connection: Any, function: str, text: bytes) -> None:
    """Set this thread's libvirt error, as a failed phase does."""
    called = getattr(ctypes.CDLL("libvirt.so.0"), function)
    called.argtypes, called.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p
    assert called(phases._handle(connection, b"virConnectPtr"), text) is None


def test_6_29_an_error_that_quotes_invalid_utf_8(connection: Any) -> None:
    fail(connection, "virNetworkLookupByName", b"\xff\xfe")
    error = phases._failed("Prepare")
    assert error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK
    assert error.get_error_domain() == libvirt.VIR_FROM_TEST
    assert "\\xff\\xfe" in str(translate(error))


def test_6_29_a_document_that_is_not_xml(connection: Any) -> None:
    fail(connection, "virDomainDefineXML", b"<a>\xff\xfe</a>")
    assert isinstance(translate(phases._failed("Prepare")), InvalidDocument)
