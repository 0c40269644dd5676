"""Free ports on which a hypervisor could listen for a migration."""

import socket


def any_is_free(first: int, last: int) -> bool:
    """Return whether this host has a port from `first` to `last` on which nobody listens, on any address."""
    return any(_is_free(port) for port in range(first, last + 1))


def _is_free(port: int) -> bool:
    """Try to bind the port, as libvirt does to find a free one."""
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
