"""This host's interfaces as its kernel reports them, and their changes.

The kernel's notices (rtnetlink) only say *that* something has changed; each time, the interfaces are read again as a whole. So
notices that the socket's buffer could not hold cost nothing, and there is no second copy of the kernel's tables that could drift.

Importing this module costs some 200 ms, as it imports all of pyroute2: the agent does so at its start."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any, Final

import structlog
from pyroute2 import IPRoute
from pyroute2.ethtool.ioctl import IoctlEthtool, NoSuchDevice, NotSupportedError
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_LINK
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_SECONDARY, IFA_F_TENTATIVE
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOWER_UP, IFF_UP

from agent.runtime.wire import MOST_RATE
from drover.agent.v1 import host_pb2

log = structlog.get_logger()

SETTLE_SECONDS: Final = 0.05
"""Pause between a notice and the reading: notices come in bursts, and a reading takes some milliseconds."""
READ_SECONDS: Final = 10.0
"""Deadline of a reading."""
MOST_INTERFACES: Final = 64
MOST_ADDRESSES: Final = 8

_GROUPS: Final = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
_READY: Final = IFF_UP | IFF_LOWER_UP
_UNUSABLE: Final = IFA_F_TENTATIVE | IFA_F_DADFAILED | IFA_F_DEPRECATED
_UNKNOWN_SPEEDS: Final = (0, 0xFFFF, 0xFFFFFFFF)
"""Speeds of a link whose driver does not know it."""
_MBIT: Final = 125_000
"""Bytes per second."""


async def watch_interfaces(link_local: Collection[str] = ()) -> AsyncIterator[tuple[host_pb2.Interface, ...]]:
    """Yield the interfaces that have a local address, now and after each change. `link_local`: see `read_interfaces`."""
    changed = asyncio.Event()
    with _notices(changed):  # before the first reading, so that no change is missed
        while True:
            changed.clear()
            async with asyncio.timeout(READ_SECONDS):
                interfaces = await asyncio.to_thread(read_interfaces, link_local)
            yield interfaces
            await changed.wait()
            await asyncio.sleep(SETTLE_SECONDS)


@contextlib.contextmanager
def _notices(changed: asyncio.Event) -> Iterator[None]:
    """Set `changed` at every notice of the kernel about a link or an address."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as notices:

        def drop() -> None:
            changed.set()
            with contextlib.suppress(OSError):  # there is no more, or the buffer was full and notices are lost (ENOBUFS)
                while True:
                    notices.recv(65536)

        notices.bind((0, _GROUPS))
        loop.add_reader(notices, drop)
        try:
            yield
        finally:
            loop.remove_reader(notices)


def read_interfaces(link_local: Collection[str] = ()) -> tuple[host_pb2.Interface, ...]:
    """Return the interfaces that have an address of the host's own, by name. Blocks for some milliseconds; must not be called
    in the thread of an event loop, as pyroute2 runs one of its own.

    Leaves out loopback, addresses that cannot be used (tentative, deprecated), and link-local ones, but for those in `link_local`,
    such as "fe80::1%eth0". An interface's addresses rise, but last come those that may float between hosts (`_may_float`)."""
    with IPRoute() as kernel, contextlib.closing(IoctlEthtool()) as ethtool:
        by_index: dict[int, list[Any]] = {}
        for message in kernel.get_addr():
            by_index.setdefault(message["index"], []).append(message)
        found = []
        for index, messages in sorted(by_index.items()):
            try:
                [link] = kernel.get_links(index)
            except (NetlinkError, ValueError):  # it has gone; a notice of that follows
                continue
            attributes = dict(link["attrs"])
            name = str(attributes["IFLA_IFNAME"])
            messages.sort(key=lambda message: (_may_float(message), _ip(message).version, _ip(message)))
            addresses = [text for text in (_address(message, name, link_local) for message in messages) if text]
            if addresses:
                line, up = _speed(name, ethtool), link["flags"] & _READY == _READY
                found.append(
                    host_pb2.Interface(
                        name=name,
                        addresses=addresses[:MOST_ADDRESSES],
                        mtu=int(attributes["IFLA_MTU"]),
                        line_bytes_per_second=line,
                        up=up,
                    )
                )
    return most_useful(found)


def most_useful(found: Collection[host_pb2.Interface]) -> tuple[host_pb2.Interface, ...]:
    """Return at most `MOST_INTERFACES`, by name: first those that are up, then those whose network devices have a speed, as bridges
    of guests and containers without any have none. A log line names what is left out."""
    ranked = sorted(found, key=lambda each: (not each.up, not each.line_bytes_per_second, each.name))
    if left_out := [each.name for each in ranked[MOST_INTERFACES:]]:
        text = "only some of this host's interfaces are reported: a network on another one cannot be used"
        log.warning(text, most=MOST_INTERFACES, left_out=len(left_out), such_as=left_out[:8])
    return tuple(sorted(ranked[:MOST_INTERFACES], key=lambda each: each.name))


def _address(message: Any, name: str, link_local: Collection[str]) -> str:
    """Return the address with its prefix; empty for one that is left out."""
    address = _ip(message)
    if address.is_loopback or _flags(message) & _UNUSABLE:
        return ""
    if address.is_link_local and address.version == 6:
        scoped = f"{address}%{name}"
        return f"{scoped}/{message['prefixlen']}" if scoped in link_local else ""
    return f"{address}/{message['prefixlen']}"


def _may_float(message: Any) -> bool:
    """Return whether an address was added beside another one of its subnet, or without a subnet: as cluster managers add one that
    they move to another host later. No guest shall be sent there if the host has another address."""
    address = _ip(message)
    return bool(_flags(message) & IFA_F_SECONDARY) or message["prefixlen"] == address.max_prefixlen


def _ip(message: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    attributes = dict(message["attrs"])
    return ipaddress.ip_address(attributes.get("IFA_LOCAL") or attributes["IFA_ADDRESS"])


def _flags(message: Any) -> int:
    return int(dict(message["attrs"]).get("IFA_FLAGS", message["flags"]))


def _speed(name: str, ethtool: IoctlEthtool) -> int:
    """Return the line's bytes per second; 0: unknown. Asks the kernel, as /sys may show the interfaces of another namespace."""
    try:
        ethtool.change_ifname(name)
        speed = int(ethtool.get_link_settings().speed)
    except (NoSuchDevice, NotSupportedError, OSError):
        return 0
    return 0 if speed in _UNKNOWN_SPEEDS else min(speed * _MBIT, MOST_RATE)
