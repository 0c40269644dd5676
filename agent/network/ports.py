"""Free ports on which a hypervisor could listen for a migration."""

import errno
import socket


def any_is_free(first: int, last: int) -> bool:
    """Return whether this host has a port from `first` to `last` on which nobody listens, on any address."""
    return any(_is_free(port) for port in range(first, last + 1))


def _is_free(port: int) -> bool:
    """Try to bind the port on all addresses, IPv4 and IPv6, as libvirt does to find a free one."""
    try:
        probe = socket.socket(socket.AF_INET6)
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # of both
    except OSError:
        probe = socket.socket(socket.AF_INET)  # a kernel without IPv6
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True
