"""Sockets of a network namespace, from /proc."""

import ipaddress
import sys
from pathlib import Path

TCP_LISTEN = "0A"
"""The state LISTEN in /proc/net/tcp (include/net/tcp_states.h)."""


def listening(pid: int) -> tuple[tuple[str, int], ...]:
    """Return (address, port) of the listening TCP sockets in the network namespace of a process."""
    found = []
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            local, _, state = line.split()[1:4]
            if state == TCP_LISTEN:
                address, _, port = local.rpartition(":")
                found.append((_address(address), int(port, 16)))
    return tuple(sorted(found))


def _address(kernels: str) -> str:
    """Convert an address of /proc/net/tcp: 32-bit words in the machine's byte order."""
    words = [bytes.fromhex(kernels[at : at + 8]) for at in range(0, len(kernels), 8)]
    swapped = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return str(ipaddress.ip_address(swapped))
