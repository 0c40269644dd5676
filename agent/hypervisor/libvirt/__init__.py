"""The libvirt driver: QEMU guests through libvirt's local socket, phase by phase.

phases      the five phases of a migration, bound with ctypes
threads     daemon threads for blocking calls
errors      libvirt's error codes translated to this project's errors, with advice
connection  `Session`: one connection with its calls and their deadlines; `Pool`: shared connections for short calls
connecting  libvirtd's own unanswered connection to the destination
domain      states, job and progress translated from libvirt's values
options     `Options` as libvirt flags, limits as MiB/s
postcopy    whether this host's QEMU may use post-copy
service     the libvirt daemon behind a URI: its name, folders, hook
host        what this host can run, and what a guest needs
leaving     Begin, and a check whether libvirt would accept it; unrun: guests that QEMU cannot hand over
switchover, guard    no second copy after the source's libvirtd died; switchover is also installed as a hook of libvirt
outgoing, incoming   one migration on its source, on its destination; removal: deletes the copy that is left at the source
stored      definition for the next boot, and autostart
process, qemu_log, versions   what /proc and libvirt's log tell about a QEMU process
events, watch        libvirt's event loop, its events for asyncio, and the connection that they arrive on
driver      `LibvirtHypervisor`; begin here
"""

from agent.hypervisor.libvirt.driver import LibvirtHypervisor

__all__ = ["LibvirtHypervisor"]
