"""The commands that change settings of hosts and guests, and that show slots and queues."""

import getpass
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.running_drover import Drover, serving

ME = f"{getpass.getuser()}@{socket.gethostname()}"


@pytest.fixture(name="both", scope="module", params=["coordinator", "agent"])
def _both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drover]:
    """A coordinator, and an agent alone: the commands are the same."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    with serving(directory):
        yield Drover(f"unix:{directory}/{request.param}.sock")


def test_8_1_limits_are_set_and_reset_on_the_command_line(both: Drover) -> None:
    said = both("host", "set", "a", "--incoming-limit", "4", "--outgoing-limit", "0", "--comment", "an evening storm").stdout
    assert re.search(r"^incoming +2 of 4 slots in use, 1 waiting$", said, re.M)
    assert re.search(r"^outgoing +0 of 0 slots in use, 0 waiting \(closed: no guest can leave\)$", said, re.M)
    assert f"by {ME} at 2023-11-14 22:13:20 UTC: an evening storm" in said
    assert both("host", "show", "a").stdout.count("an evening storm") == 1
    host = both.json("host", "set", "a", "--outgoing-limit", "default", "--prepared-limit", "3")["host"]
    assert (host["settings"]["incoming_limit"], host["prepared_limit"], host["outgoing_limit"]) == (4, 3, 3)
    assert "outgoing_limit" not in host["settings"]
    above = both("host", "set", "a", "--incoming-limit", "1").stdout
    assert "2 of 1 slots in use, 1 waiting (above the limit: they go on, and no further one starts before)" in above
    both("host", "set", "a", "--incoming-limit", "default", "--prepared-limit", "default")


def test_8_1_a_host_is_cordoned_on_the_command_line(both: Drover) -> None:
    both("host", "set", "a", "--incoming-limit", "default", "--comment", "a storm")
    said = both("host", "cordon", "a", "--comment", "new RAM on Friday").stdout
    assert re.search(rf"^limits set +by {ME} at 2023-11-14 22:13:20 UTC: a storm$", said, re.M)
    assert re.search(rf"^cordoned +by {ME} at 2023-11-14 22:13:20 UTC: new RAM on Friday$", said, re.M)
    shown = both("host", "show", "a").stdout
    assert re.search(r"^state +cordoned$", shown, re.M)
    assert f"by {ME} at 2023-11-14 22:13:20 UTC: new RAM on Friday (only a migration that names it may choose it)" in shown
    assert re.search(r"^a +cordoned +2/2 +0/3 +1 +QEMU", both("host", "list").stdout, re.M)
    assert both.json("host", "show", "a")["host"]["settings"]["cordoned"]
    assert re.search(rf"^uncordoned +by {ME} at ", both("host", "uncordon", "a").stdout, re.M)
    assert re.search(r"^a +up +2/2", both("host", "list").stdout, re.M)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["set", "x", "--incoming-limit", "4"], 4, '"x"'),
        (["cordon", "x"], 4, '"x"'),
        (["slots", "x"], 4, '"x"'),
        (["set", "a", "--incoming-limit", "-1"], 2, '"-1" is not a limit; expected a number from 0 (0 closes the host'),
        (["set", "a", "--incoming-limit", "2.5"], 2, '"2.5" is not a limit'),
        (["set", "a", "--incoming-limit", "4", "--incoming-limit", "default"], 2, "was given more than once"),
        (["set", "a"], 2, "nothing to change: give --incoming-limit"),
        (["set", "a", "--comment", "nothing else"], 2, "nothing to change"),
        (["set", "a", "--incoming-limit", "4", "--comment", "x" * 1025], 4, "comment: has 1025 bytes; at most 1024 are allowed"),
    ],
)
def test_8_1_a_bad_change_of_a_host_is_refused_and_changes_nothing(both: Drover, args: list[str], code: int, says: str) -> None:
    before = both.json("host", "show", "a")["host"]
    assert says in both("host", *args, code=code).stderr
    assert both.json("host", "show", "a")["host"] == before


def test_8_2_who_holds_and_who_waits_is_shown_in_order(both: Drover) -> None:
    header, holder, waiter = both("host", "slots", "a").stdout.splitlines()
    assert header.split()[:4] == ["DIRECTION", "PLACE", "MIGRATION", "KIND"]
    assert re.fullmatch(r"incoming +holds +11111111 +transferring +b +medium +2 +1 min 30 s *", holder)
    assert re.fullmatch(r"incoming +1 +22222222 +prepared +c +high +1 +3 s +10 s to 30 s", waiter)
    assert [slot["position"] for slot in both.json("host", "slots", "a")["slots"]] == [0, 1]


def test_8_2_a_host_without_slots_says_so(drover: Drover) -> None:
    assert drover("host", "slots", "b").stderr == "no migration holds or waits for a slot of b\n"


def test_8_1_interfaces_are_shown(both: Drover) -> None:
    assert re.search(r"^mig0 +10.92.0.1/24 +9000 +119 MiB/s +up$", both("host", "show", "a").stdout, re.M)


def test_8_4_settings_of_a_guest_are_written_and_removed(both: Drover) -> None:
    said = both("domain", "set", "vm1", "--tenant", "blue", "--min-bandwidth", "100MiB/s", "--max-bandwidth", "200MiB/s").stdout
    assert re.search(r"^tenant +blue$", said, re.M)
    assert re.search(r"^bandwidth +at least 100 MiB/s, at most 200 MiB/s$", said, re.M)
    settings = both.json("domain", "set", "vm1", "--tenant", "none", "--min-bandwidth", "none")["domain"]["settings"]
    assert (settings["tenant"], settings["min_bandwidth_bytes_per_second"]) == ("", "0")
    assert settings["max_bandwidth_bytes_per_second"] == str(200 << 20), "what is not named stays"


def test_8_4_settings_of_a_guest_are_shown(drover: Drover) -> None:
    assert re.search(r"^vm1 +a +running +64 MiB +1 +none +none +none +", drover("domain", "list").stdout, re.M)
    assert re.search(r"^tenant +none$", drover("domain", "show", "vm1").stdout, re.M)
    assert 'no host that answered has a guest "vm9"' in drover("domain", "show", "vm9", code=4).stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["vm9", "--tenant", "blue"], 4, "no such guest"),
        (["vm1"], 2, "nothing to change: give --tenant"),
        (["vm1", "--tenant", ""], 2, "the name is empty"),
        (["vm1", "--tenant", "blue", "--tenant", "none"], 2, "was given more than once"),
        (["vm1", "--min-bandwidth", "0"], 2, "out of range"),
        (["vm1", "--max-bandwidth", "fast"], 2, "is not a rate"),
    ],
)
def test_8_4_a_bad_change_of_a_guest_is_refused(both: Drover, args: list[str], code: int, says: str) -> None:
    assert says in both("domain", "set", *args, code=code).stderr
