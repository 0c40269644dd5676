"""A simulated hypervisor: realistic pre-copy and post-copy over a real TCP connection; pages are described, not sent.

Modules, from pure functions to I/O (`agent.transfer.model` has the arithmetic of a transfer)::

    profiles  what each kind of hypervisor can do, as data
    config    configuration of a simulated host
    definition  the document of a guest, which travels with it
    guest     one guest: its state, its clock
    serial    the lines on a guest's serial line
    stream    the frames of the memory stream
    cookie    the simulator's migration cookie
    link      the host's network link, shared by the transfers that leave it
    sender    a transfer on its source           outgoing   `SimOutgoing`, the handle
    receiver  a copy on its destination          incoming   `SimIncoming`, the handle
    host      state that those four share: guests, tasks, faults
    control   a socket at which the users of guests start and end them
    driver    `SimHypervisor`; begin here
"""

from agent.hypervisor.sim.config import Latencies, SimConfig, SimGuest
from agent.hypervisor.sim.driver import SimHypervisor

__all__ = ["Latencies", "SimConfig", "SimGuest", "SimHypervisor"]
