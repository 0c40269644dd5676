"""libvirtd's connection to the migration port while the destination does not answer it.

libvirtd connects without a deadline of its own: where a firewall drops the packets, `connect()` lasts until the kernel
gives up (some 130 s), and no job can be aborted meanwhile. The socket is then in the state SYN-SENT. The kernel lists such
sockets, and can end one (SOCK_DESTROY, needs CAP_NET_ADMIN): `connect()` then fails at once, and Perform with it. The port
belongs to the copy of one attempt, so no other connection is affected.
"""

import errno
import ipaddress
import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from agent.hypervisor.base import HypervisorError

SYN_SENT: Final = "02"
"""State of such a socket in /proc/net/tcp."""
_TABLES: Final = {4: Path("/proc/self/net/tcp"), 6: Path("/proc/self/net/tcp6")}

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DESTROY: Final = 21
_NLM_F_REQUEST_ACK: Final = 0x5
_NLMSG_ERROR: Final = 2
_NO_COOKIE: Final = 0xFFFFFFFF
_ANSWER_SECONDS: Final = 1.0

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Unanswered:
    """A connection that was requested and is not answered yet."""

    local: tuple[_Address, int]
    remote: tuple[_Address, int]
    retransmits: int
    """How often the SYN was sent again."""


def unanswered(uri: str) -> list[Unanswered]:
    """Return the unanswered connections from this host to a migration URI. Blocks briefly; raises OSError."""
    parts = urlsplit(uri)
    try:
        wanted = (ipaddress.ip_address(parts.hostname or ""), parts.port or 0)
    except ValueError:
        return []
    found = []
    for line in _TABLES[wanted[0].version].read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == SYN_SENT and (remote := _endpoint(fields[2])) == wanted:
            found.append(Unanswered(_endpoint(fields[1]), remote, int(fields[6], 16)))
    return found


def retransmits(uri: str) -> int | None:
    """Return how often the request to connect to a migration URI was sent again; None without one. Blocks; raises OSError."""
    return max((connection.retransmits for connection in unanswered(uri)), default=None)


def end_unanswered(uri: str) -> None:
    """Make every unanswered `connect()` to a migration URI fail now. Blocks briefly. Raises `HypervisorError`."""
    try:
        for connection in unanswered(uri):
            end(connection)
    except OSError as error:
        raise HypervisorError(error.strerror or str(error)) from None


def _endpoint(text: str) -> tuple[_Address, int]:
    """Parse an endpoint of /proc/net/tcp: 32-bit words of the address in the machine's byte order, then the port."""
    address, _, port = text.partition(":")
    words = [bytes.fromhex(address[at : at + 8]) for at in range(0, len(address), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return ipaddress.ip_address(packed), int(port, 16)


def end(connection: Unanswered) -> bool:
    """Make `connect()` fail now; return False where it had ended by itself. Raises OSError: not permitted, or not in this kernel."""
    (local, local_port), (remote, remote_port) = connection.local, connection.remote
    family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
    ids = struct.pack("!HH16s16s", local_port, remote_port, local.packed, remote.packed)
    body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 1 << int(SYN_SENT, 16)) + ids
    body += struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DESTROY, _NLM_F_REQUEST_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_ANSWER_SECONDS)
        netlink.send(header + body)
        answer = netlink.recv(4096)
    (kind,) = struct.unpack_from("=H", answer, 4)
    code = -int(struct.unpack_from("=i", answer, 16)[0]) if kind == _NLMSG_ERROR else errno.EPROTO
    if code in (0, errno.ENOENT):
        return code == 0
    raise OSError(code, os.strerror(code))
