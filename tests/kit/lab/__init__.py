"""A lab of test hosts on one Linux machine, for tests, benches and demonstrations. Start with README.md."""

from tests.kit.lab.domain import Guest
from tests.kit.lab.errors import LabError, LabTimeoutError
from tests.kit.lab.hosts import Counters, Host, Leaks, Node, Qemu
from tests.kit.lab.lab import Lab, known_labs, missing_requirement, take_down
from tests.kit.lab.links import Direction
from tests.kit.lab.processes import wait_until

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
