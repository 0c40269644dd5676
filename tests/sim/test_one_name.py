"""Two guests that are to arrive at one host under one name, at once (requirements R3, H7)."""

import json
import subprocess

from agent.runtime.errors import Reason
from tests.kit.cluster import GuestSpec, cluster


def test_6_15_one_of_two_is_refused_before_anything_is_done_to_it() -> None:
    guests = ["a", "b"]
    slow = {"sim": {"latencies": {"begin": 3.0}}}  # both have asked for a slot before either has a copy at the destination
    with cluster("sim", [GuestSpec(name) for name in guests], settings=slow) as made:
        for name in guests:
            made.start_guest(name)
        commands = [made.drover("migrate", name, "--to", "h2", "--name", "same", "-o", "json") for name in guests]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
        said = {process.returncode: errors for process, (_, errors) in ((one, one.communicate(timeout=60)) for one in running)}
        assert sorted(said) == [0, 4], said
        error = json.loads(said[4])["error"]
        assert error["reason"] == Reason.DOMAIN_EXISTS
        assert "Nothing was done to the guest" in error["message"]
        assert made.running_on("same") == ["h2"]
        assert sorted(name for name in guests if made.running_on(name) == ["h1"]) in (["a"], ["b"])
