"""A simulated hypervisor: honest pre-copy and post-copy over a real TCP connection, with pages described, not sent.

Rooms, from pure to busy::

    model     arithmetic of a transfer: no clock, no I/O
    profiles  what each kind of hypervisor can do, as data
    config    what a simulated host is made of
    guest     one guest: its definition, its state, the numbers on its serial line
    stream    the frames of the memory stream
    link      the host's wire, shared by the transfers that leave it
    sender    a transfer on its source           outgoing   the handle of `base.Outgoing`
    receiver  a copy on its destination          incoming   the handle of `base.Incoming`
    host      what those four share: guests, ports, tasks, faults
    driver    `SimHypervisor`, the face
"""

from agent.hypervisor.sim.config import Latencies, SimConfig, SimGuest
from agent.hypervisor.sim.driver import SimHypervisor

__all__ = ["Latencies", "SimConfig", "SimGuest", "SimHypervisor"]
