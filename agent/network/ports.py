"""Free ports on which a hypervisor could listen for a migration."""

import errno
import socket


def any_is_free(first: int, last: int) -> bool:
    """Return whether this host has a port from `first` to `last` on which nobody listens, on any address."""
    return any(_is_free(port) for port in range(first, last + 1))


def _is_free(port: int) -> bool:
    """Try to bind the port on all addresses, IPv4 and IPv6, as libvirt does to find a free one."""
    return all(_can_bind(family, port) for family in (socket.AF_INET, socket.AF_INET6))


def _can_bind(family: socket.AddressFamily, port: int) -> bool:
    try:
        probe = socket.socket(family)
    except OSError:
        return True  # a kernel without IPv6: nobody listens there
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True
