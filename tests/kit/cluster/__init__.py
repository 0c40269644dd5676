"""A whole Drover on one machine: agents and a coordinator as processes, on real test hosts or on simulated ones.

    with cluster("libvirt", guests=[GuestSpec("g1")]) as c:
        guest = c.start_guest("g1")
        subprocess.run(c.drover("migrate", "g1", "--to", "h2"))

Tests, benches and the demonstration all use it, so a scenario runs unchanged on either driver.
"""

from tests.kit.cluster.cluster import Cluster, ClusterGuest, GuestSpec
from tests.kit.cluster.daemon import Daemon
from tests.kit.cluster.platforms import cluster, why_not_libvirt

__all__ = ["Cluster", "ClusterGuest", "Daemon", "GuestSpec", "cluster", "why_not_libvirt"]
