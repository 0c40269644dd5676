"""A lab of test hosts on one Linux machine, for tests, benches and demonstrations. Start with README.md."""

from labkit.domain import Guest
from labkit.errors import LabError, LabTimeoutError
from labkit.hosts import Counters, Host, Leaks, Node, Qemu
from labkit.lab import Lab, known_labs, missing_requirement, take_down
from labkit.links import Direction
from labkit.processes import wait_until

__all__ = [
    "Counters",
    "Direction",
    "Guest",
    "Host",
    "Lab",
    "LabError",
    "LabTimeoutError",
    "Leaks",
    "Node",
    "Qemu",
    "known_labs",
    "missing_requirement",
    "take_down",
    "wait_until",
]
