"""The five phases of a migration, bound with ctypes to the entry points that libvirt.so exports for its own tools.

`virDomainMigrate{Begin,Prepare,Perform,Finish,Confirm}3Params` are exported under libvirt's private version node, with
the same signatures since libvirt 1.1.0: they are the client side of a wire protocol that libvirt keeps compatible. The
public `migrateToURI3` runs all five with a second daemon on the other end of a TCP socket; called one by one, both ends
are local unix sockets, and Drover itself transports what goes from one to the other (XML, cookies, a URI).

Every function that calls a phase blocks (ctypes releases the GIL meanwhile) and raises `libvirt.libvirtError`. libvirt keeps
the last error per thread, so the exception is created in the calling thread.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import libvirt

_STRING = 7
_ULLONG = 4
_FIELD_BYTES = 80  # VIR_TYPED_PARAM_FIELD_LENGTH


class _Value(ctypes.Union):
    _fields_ = (
        ("i", ctypes.c_int),
        ("ui", ctypes.c_uint),
        ("l", ctypes.c_longlong),
        ("ul", ctypes.c_ulonglong),
        ("d", ctypes.c_double),
        ("b", ctypes.c_char),
        ("s", ctypes.c_char_p),
    )


class _TypedParam(ctypes.Structure):
    _fields_ = (("field", ctypes.c_char * _FIELD_BYTES), ("type", ctypes.c_int), ("value", _Value))


Params = Mapping[str, str | int]
"""Migration parameters by libvirt's own names (`VIR_MIGRATE_PARAM_*`); integers are unsigned 64-bit."""

_Library = Any  # ctypes.CDLL: its functions appear as attributes

_pointer = ctypes.c_void_p
_length = ctypes.c_int
_flags = ctypes.c_uint
_params = (ctypes.POINTER(_TypedParam), ctypes.c_int)
_cookie_in = (ctypes.c_char_p, ctypes.c_int)
_cookie_out = (ctypes.POINTER(_pointer), ctypes.POINTER(_length))

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "Begin": (_pointer, (_pointer, *_params, *_cookie_out, _flags)),
    "Prepare": (ctypes.c_int, (_pointer, *_params, *_cookie_in, *_cookie_out, ctypes.POINTER(_pointer), _flags)),
    "Perform": (ctypes.c_int, (_pointer, ctypes.c_char_p, *_params, *_cookie_in, *_cookie_out, _flags)),
    "Finish": (_pointer, (_pointer, *_params, *_cookie_in, *_cookie_out, _flags, ctypes.c_int)),
    "Confirm": (ctypes.c_int, (_pointer, *_params, *_cookie_in, _flags, ctypes.c_int)),
}


def _bind() -> _Library | None:
    """Load libvirt.so and declare the types of the five functions. Return None where a build does not export them."""
    try:
        # The soname that libvirt-python itself is linked with, so that the loader returns the same library.
        library = ctypes.CDLL("libvirt.so.0")
        for phase, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"virDomainMigrate{phase}3Params")
            function.restype, function.argtypes = result, arguments
        library.virDomainFree.argtypes = (_pointer,)
    except (OSError, AttributeError):
        return None
    return library


_libvirt: _Library | None = _bind()
_free = ctypes.CDLL(None).free
_free.argtypes = (_pointer,)
_free.restype = None
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer.restype = _pointer


_ignore_error = ctypes.CFUNCTYPE(None, _pointer, _pointer)(lambda _data, _error: None)


def silence() -> None:
    """Keep libvirt from printing every error to stderr; errors are raised as exceptions anyway.

    libvirt-python's own function does not fit: its handler decodes the error's text, which may quote what a peer sent, and raises
    `SystemError` where that is not UTF-8.
    """
    ctypes.CDLL("libvirt.so.0").virSetErrorFunc(None, _ignore_error)


def _last_message() -> bytes | None:
    text = _library().virGetLastErrorMessage
    text.restype = ctypes.c_char_p
    found: bytes | None = text()
    return found


def available() -> bool:
    """Return whether this host's libvirt.so exports the five phases, so that they can be called one by one."""
    return _libvirt is not None


def _library() -> _Library:
    if _libvirt is None:
        raise RuntimeError("this build of libvirt does not export the migration phases (bug: call available() first)")
    return _libvirt


def _handle(wrapper: Any, kind: bytes) -> int:
    """Return the C pointer of a libvirt-python object, which the caller must keep alive during the call."""
    pointer: int = _capsule_pointer(wrapper._o, kind)
    return pointer


def _typed(params: Params) -> tuple[Any, int]:
    array = (_TypedParam * max(1, len(params)))()
    for slot, (name, value) in zip(array, params.items(), strict=False):
        slot.field = name.encode()
        if isinstance(value, int):
            slot.type, slot.value.ul = _ULLONG, value
        else:
            slot.type, slot.value.s = _STRING, value.encode()  # ctypes keeps the bytes alive with the array
    return array, len(params)


class _Out:
    """A string or a cookie that libvirt allocates and this class frees."""

    def __init__(self) -> None:
        self.pointer = _pointer()
        self.length = _length()

    @property
    def arguments(self) -> tuple[Any, Any]:
        return ctypes.byref(self.pointer), ctypes.byref(self.length)

    def take(self) -> bytes:
        """Return the cookie's bytes and free its memory; empty where libvirt gave none."""
        if not self.pointer.value:
            return b""
        data = ctypes.string_at(self.pointer.value, self.length.value)
        self.drop()
        return data

    def take_string(self) -> str:
        if not self.pointer.value:
            return ""
        text = ctypes.string_at(self.pointer.value).decode()
        self.drop()
        return text

    def drop(self) -> None:
        _free(self.pointer)
        self.pointer.value = None


def _failed(phase: str) -> libvirt.libvirtError:
    """Return this thread's last error. Its text may quote what a peer sent; libvirt-python raises `SystemError` where that is not
    UTF-8, and then the error is built here."""
    try:
        return libvirt.libvirtError(f"{phase} failed")
    except (SystemError, UnicodeDecodeError):
        message = (_last_message() or b"").decode("utf-8", "backslashreplace")
        error = libvirt.libvirtError.__new__(libvirt.libvirtError, message)
        error.err = (_library().virGetLastErrorCode(), _library().virGetLastErrorDomain(), message, 2, None, None, None, -1, -1)
        return error


def _cookie(cookie: bytes) -> tuple[bytes | None, int]:
    return (cookie, len(cookie)) if cookie else (None, 0)


def begin(domain: Any, params: Params, flags: int) -> tuple[str, bytes]:
    """Call Begin on the source. Return the guest's XML for the destination, and a cookie."""
    array, count = _typed(params)
    cookie = _Out()
    text = _Out()
    text.pointer.value = _library().virDomainMigrateBegin3Params(
        _handle(domain, b"virDomainPtr"), array, count, *cookie.arguments, flags
    )
    if not text.pointer.value:
        cookie.drop()
        raise _failed("Begin")
    return text.take_string(), cookie.take()


def prepare(connection: Any, params: Params, cookie: bytes, flags: int) -> tuple[str, bytes]:
    """Call Prepare on the destination: start an empty copy. Return the URI that it listens on, and a cookie."""
    array, count = _typed(params)
    out, uri = _Out(), _Out()
    status = _library().virDomainMigratePrepare3Params(
        _handle(connection, b"virConnectPtr"),
        array,
        count,
        *_cookie(cookie),
        *out.arguments,
        ctypes.byref(uri.pointer),
        flags,
    )
    if status < 0:
        out.drop()
        uri.drop()
        raise _failed("Prepare")
    return uri.take_string(), out.take()


def perform(domain: Any, params: Params, cookie: bytes, flags: int) -> bytes:
    """Call Perform on the source: send the guest's state. Blocks until all is sent. Return a cookie."""
    array, count = _typed(params)
    out = _Out()
    status = _library().virDomainMigratePerform3Params(
        _handle(domain, b"virDomainPtr"), None, array, count, *_cookie(cookie), *out.arguments, flags
    )
    if status < 0:
        out.drop()
        raise _failed("Perform")
    return out.take()


def finish(connection: Any, params: Params, cookie: bytes, flags: int, cancelled: bool = False) -> bytes:
    """Call Finish on the destination: wait for the end of the stream, start the guest, and return a cookie; `cancelled`: destroy the
    copy."""
    array, count = _typed(params)
    out = _Out()
    domain = _library().virDomainMigrateFinish3Params(
        _handle(connection, b"virConnectPtr"), array, count, *_cookie(cookie), *out.arguments, flags, int(cancelled)
    )
    if not domain:
        out.drop()
        raise _failed("Finish")
    _library().virDomainFree(domain)
    return out.take()


def confirm(domain: Any, params: Params, cookie: bytes, flags: int, cancelled: bool) -> None:
    """Call Confirm on the source: remove the copy here; `cancelled`: keep it and let it run."""
    array, count = _typed(params)
    status = _library().virDomainMigrateConfirm3Params(
        _handle(domain, b"virDomainPtr"), array, count, *_cookie(cookie), flags, int(cancelled)
    )
    if status < 0:
        raise _failed("Confirm")
