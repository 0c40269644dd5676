"""The libvirt driver: QEMU guests through libvirt's local socket, phase by phase.

phases      the five phases of a migration, bound with ctypes
threads     daemon threads for blocking calls
errors      libvirt's error codes as this project's errors
connection  `Session`: one connection, its calls, its deadlines
domain      states, job, requirements: what libvirt's answers mean
options     `Options` as libvirt flags, limits as MiB/s
postcopy    whether this host's QEMU may use post-copy
service     which libvirt daemon the URI leads to: name, folders, hook
leaving     Begin, and whether libvirt would take it; unrun: guests that QEMU cannot hand over
switchover, guard    no second copy after a death of the source's libvirtd; also a hook of libvirt
outgoing, incoming   one migration on its source, on its destination
events      libvirt's event loop, and its events for asyncio
driver      `LibvirtHypervisor`
"""

from agent.hypervisor.libvirt.driver import LibvirtHypervisor

__all__ = ["LibvirtHypervisor"]
