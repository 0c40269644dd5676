"""`scripts/demo`: real migrations of a real guest; shows the output of each command and the judgement of the guest's own log."""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.kit.cluster.cluster import Cluster, ClusterGuest, GuestSpec
from tests.kit.cluster.platforms import LabCluster, cluster, why_not_libvirt

GUEST = GuestSpec("demo", memory_mib=128, dirty=500)


@dataclass(frozen=True)
class Hop:
    """One migration of the demonstration."""

    title: str
    server: str
    """Address of the server that is asked: the coordinator, or the source's agent."""
    destination: str


def main() -> int:
    simulate = sys.argv[1:] == ["--sim"]
    if sys.argv[1:] and not simulate:
        print("usage: scripts/demo [--sim]   (--sim: simulate, even if real test hosts can be made)", file=sys.stderr)
        return 2
    reason = "--sim was given" if simulate else why_not_libvirt()
    kind = "sim" if reason else "libvirt"
    say(
        f"No real test hosts here: {reason}. This runs on the SIMULATED hypervisor."
        if reason
        else "Two test hosts with a libvirtd each and real QEMU (emulated CPUs), in network namespaces of this machine."
    )
    began = time.monotonic()
    with cluster(kind, [GUEST], lab_id="demo") as made:
        guest = made.start_guest(GUEST.name)
        say(f"{len(made.hosts)} agents and a coordinator serve, and the guest runs, after {time.monotonic() - began:.1f} s.")
        run(made.drover("host", "list"))
        run(made.drover("domain", "list"))
        for hop in hops(made):
            migrate(made, guest, hop)
        guest.wait_lines(50)
        return verdict(made, guest)


def hops(made: Cluster) -> list[Hop]:
    agent = {name: daemon.address for name, daemon in made.agents.items()}
    return [
        Hop("There, through the coordinator", made.server, "h2"),
        Hop("And back", made.server, "h1"),
        Hop("Peer to peer: the source's agent is asked, no coordinator takes part", agent["h1"], "h2"),
    ]


def migrate(made: Cluster, guest: ClusterGuest, hop: Hop) -> None:
    """Run one migration with the command `drover`, then print the guest's blackout and the bytes on each network."""
    say(hop.title + ":")
    before, since = traffic(made), time.monotonic()
    run(made.drover("migrate", guest.name, "--to", hop.destination, server=hop.server))
    until = time.monotonic()
    guest.wait_lines(5)
    felt = guest.judge().blackout_between(since, until)
    if felt is not None:
        print(f"  the guest's serial line was silent for at most {felt:.0f} ms (it writes every 10 ms)")
    for network, sent in traffic(made).items():
        print(f"  bytes on {network}: {sent - before[network]:,}")


def traffic(made: Cluster) -> dict[str, int]:
    """Return the bytes that the hosts have sent so far, by network; empty on the simulated hypervisor, which has no networks."""
    if not isinstance(made, LabCluster):
        return {}
    networks = made.lab.hosts[0].addresses
    return {network: sum(host.counters(network).sent for host in made.lab.hosts) for network in networks}


def verdict(made: Cluster, guest: ClusterGuest) -> int:
    """Judge the guest's own serial log and print the result. Return the exit code."""
    judged = guest.judge()
    say("What the guest's own serial log proves:")
    print(f"  {judged.count} numbered lines; repeated, falling or missing numbers, bad pages, restarts: ", end="")
    print("none" if judged.perfect else "; ".join(judged.problems()))
    print(f"  it runs on {' and '.join(made.running_on(guest.name))} only")
    ok = judged.perfect and made.running_on(guest.name) == ["h2"]
    say("Exactly one copy ran at every moment, and its memory is whole." if ok else "SOMETHING IS WRONG, see above.")
    return 0 if ok else 1


def run(command: list[str]) -> None:
    """Print a command as an operator would type it, and run it."""
    print(f"$ drover {shlex.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, timeout=120)


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
