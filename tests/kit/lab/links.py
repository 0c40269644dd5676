"""The networks between the hosts, and how to slow, cut and reset them. Everything here is done inside namespaces.

Each network is one bridge in the lab's switch namespace; each node has one veth per network, whose inner end has the
network's name (`mgmt`, `mig1`, …) and whose outer end is the bridge's port `<node>-<network>`.

- A rate limit is `tc tbf` on the sending end: the inner end for what the node sends, the port for what it receives. (There
  is no netem in many small kernels, so no delay and no random loss.)
- A cut is made at the switch, like a pulled cable: packets are dropped, and the node's kernel notices nothing.
- A reset is made in the node: connections are aborted, and every TCP packet that comes in or opens a new one gets an RST.
- A link that is down has lost its carrier at the switch: the node's kernel knows, and keeps its addresses.
- Big packets are dropped where the cable ends, without an ICMP message; nothing is sent over it in segments that are put together
  (GSO) meanwhile, as they would count as one big packet.
- A port range is closed in the node, as by its own firewall.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network

from tests.kit.lab.processes import run

MANAGEMENT = "mgmt"
COORDINATOR_INDEX = 254


class Direction(StrEnum):
    """A direction as the node sees it."""

    IN = "in"
    OUT = "out"
    BOTH = "both"

    @property
    def single(self) -> "tuple[Direction, ...]":
        """The one or two single directions."""
        return (Direction.IN, Direction.OUT) if self is Direction.BOTH else (self,)


@dataclass(frozen=True)
class Network:
    """One bridge: index 0 is the management network 10.91.0.0/24 and fd00:91::/64, 1 the first migration network 10.92.0.0/24 and
    fd00:92::/64, …
    """

    index: int

    @property
    def name(self) -> str:
        """Also the name of each node's interface on it."""
        return f"mig{self.index}" if self.index else MANAGEMENT

    @property
    def subnet(self) -> IPv4Network:
        """A /24."""
        return IPv4Network(f"10.{91 + self.index}.0.0/24")

    @property
    def subnet6(self) -> IPv6Network:
        """A /64."""
        return IPv6Network(f"fd00:{91 + self.index}::/64")

    def address(self, node_index: int) -> str:
        """Return the address of node 1 (h1), 2, …"""
        return str(self.subnet[node_index])

    def address6(self, node_index: int) -> str:
        """Return the IPv6 address of a node."""
        return str(self.subnet6[node_index])


def networks(migration_networks: int) -> tuple[Network, ...]:
    """Return the management network and `migration_networks` migration networks."""
    return tuple(Network(index) for index in range(1 + migration_networks))


def ip_batch(namespace: str, commands: list[str]) -> None:
    """Run several `ip` commands inside a namespace in one process."""
    run(["ip", "-n", namespace, "-batch", "-"], stdin="\n".join(commands) + "\n")


def make_switch(namespace: str, nets: tuple[Network, ...]) -> None:
    """Make one bridge per network, without spanning tree, so that ports forward at once."""
    commands = []
    for net in nets:
        kind = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        commands += [f"link add name {net.name} {kind}", f"link set {net.name} up"]
    ip_batch(namespace, commands)


def plug(switch: str, namespace: str, node: str, index: int, nets: tuple[Network, ...]) -> None:
    """Give a node an interface with an IPv4 and an IPv6 address on each of these networks."""
    outer, inner = [], ["link set lo up"]
    for net in nets:
        port = f"{node}-{net.name}"
        outer += [
            f"link add name {port} type veth peer name {net.name} netns {namespace}",
            f"link set {port} master {net.name} up",
        ]
        inner += [f"addr add {net.address(index)}/24 dev {net.name}", f"link set {net.name} up"]
        inner.append(f"addr add {net.address6(index)}/64 dev {net.name} nodad")
    ip_batch(switch, outer)
    ip_batch(namespace, inner)


@dataclass(frozen=True)
class Link:
    """A node's connection to one network: its inner end (in the node) and its port (at the switch)."""

    switch: str
    namespace: str
    node: str
    network: str

    @property
    def port(self) -> str:
        """The outer end's interface name."""
        return f"{self.node}-{self.network}"

    def _sender(self, direction: Direction) -> tuple[str, str]:
        """Return (namespace, interface) of the sender in this direction, as the node sees it."""
        return (self.namespace, self.network) if direction is Direction.OUT else (self.switch, self.port)

    def limit(self, bytes_per_second: int | None, direction: Direction) -> None:
        """Limit the rate in each of the given directions; None removes the limit.

        The bucket holds 10 ms of traffic (at least 64 KiB, one big segment), the queue 50 ms.
        """
        for single in direction.single:
            namespace, interface = self._sender(single)
            qdisc = ["tc", "-n", namespace, "qdisc"]
            if bytes_per_second is None:
                # A qdisc must exist to be deleted, while replacing always works.
                run([*qdisc, "replace", "dev", interface, "root", "pfifo_fast"])
                run([*qdisc, "del", "dev", interface, "root"])
            else:
                burst = max(65536, bytes_per_second // 100)
                tbf = f"tbf rate {bytes_per_second}bps burst {burst} latency 50ms"
                run([*qdisc, "replace", "dev", interface, "root", *tbf.split()])

    def cut(self, direction: Direction) -> None:
        """Drop everything in the given directions, silently."""
        sets = [f"{single}_cut" for single in direction.single]
        self._nft(self.switch, SWITCH_RULES, [f"add element bridge lab {name} {{ {self.port} }}" for name in sets])

    def reset(self, addresses: Sequence[str]) -> None:
        """Abort all connections, at both ends, and answer every attempt at a new one with a reset."""
        self._nft(self.namespace, NODE_RULES, [f"add element inet lab broken {{ {self.network} }}"])
        self.drop_connections(addresses)

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU of both ends. The port's alone would drop nothing: veth and bridge pass segments that are put together."""
        ip_batch(self.switch, [f"link set {self.port} mtu {mtu}"])
        ip_batch(self.namespace, [f"link set {self.network} mtu {mtu}"])

    def set_up(self, up: bool) -> None:
        """Give the node a carrier, or take it away."""
        ip_batch(self.switch, [f"link set {self.port} {'up' if up else 'down'}"])

    def swallow(self, above: int | None, direction: Direction) -> None:
        """Drop packets with more bytes than `above` (without the frame's header); None drops no more. Holds for new connections."""
        ends = (self.namespace, self.network), (self.switch, self.port)
        for single in direction.single:
            sender = self._sender(single)
            namespace, receiver = next(end for end in ends if end != sender)
            ip_batch(sender[0], [f"link set {sender[1]} gso_max_segs {65535 if above is None else 1}"])
            rules = [] if above is None else [f"meta length > {above} drop"]
            name = f"big_{receiver.replace('-', '_')}"
            self._chain(namespace, "netdev", name, f"ingress device {receiver}", rules)

    def close_ports(self, first: int, last: int, verdict: str | None) -> None:
        """Give each TCP packet to these ports of the node this verdict of nft; None lets it pass."""
        rules = [] if verdict is None else [f"iifname {self.network} tcp dport {first}-{last} {verdict}"]
        self._chain(self.namespace, "inet", f"{self.network}_ports", "input", rules)

    def _chain(self, namespace: str, family: str, name: str, hook: str, rules: list[str]) -> None:
        """Make a chain with these rules, in place of an earlier one of that name."""
        chain = f"chain {family} lab {name}"
        changes = [f"add table {family} lab", f"add {chain} {{ type filter hook {hook} priority 1; }}", f"flush {chain}"]
        changes += [f"add rule {family} lab {name} {rule}" for rule in rules] or [f"delete {chain}"]
        self._nft(namespace, "", changes)

    def restore(self) -> None:
        """Undo cut and reset (not a rate limit)."""
        # An element must exist to be deleted, and adding one twice is no error.
        changes = [f"{verb} element bridge lab {d}_cut {{ {self.port} }}" for d in ("in", "out") for verb in VERBS]
        self._nft(self.switch, SWITCH_RULES, changes)
        changes = [f"{verb} element inet lab broken {{ {self.network} }}" for verb in VERBS]
        self._nft(self.namespace, NODE_RULES, changes)

    def drop_connections(self, addresses: Sequence[str]) -> None:
        """Make the kernel abort, once, every TCP connection from or to these addresses of the node, RST to the peer."""
        for address in addresses:
            text = f"[{address}]" if ":" in address else address
            run(["nsenter", f"--net=/run/netns/{self.namespace}", "ss", "-K", "-H", "-t", "src", text])

    @staticmethod
    def _nft(namespace: str, rules: str, changes: list[str]) -> None:
        run(["nsenter", f"--net=/run/netns/{namespace}", "nft", "-f", "-"], stdin=rules + "\n".join(changes) + "\n")


VERBS = ("add", "delete")

SWITCH_RULES = """\
add table bridge lab
add set bridge lab in_cut { type ifname; }
add set bridge lab out_cut { type ifname; }
add chain bridge lab forward { type filter hook forward priority 0; }
flush chain bridge lab forward
add rule bridge lab forward oifname @in_cut drop
add rule bridge lab forward iifname @out_cut drop
"""
"""Can be loaded repeatedly; the sets keep their elements."""

NODE_RULES = """\
add table inet lab
add set inet lab broken { type ifname; }
add chain inet lab input { type filter hook input priority 0; }
add chain inet lab output { type filter hook output priority 0; }
flush chain inet lab input
flush chain inet lab output
add rule inet lab input tcp flags & rst == 0 iifname @broken reject with tcp reset
add rule inet lab output tcp flags & (syn | ack) == syn oifname @broken reject with tcp reset
"""
"""Incoming: everything but a reset is answered with a reset. Outgoing: only the opening of a connection is (other packets pass, so
that the peer's answer is what gets the reset)."""
