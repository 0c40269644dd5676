"""The tables of hosts, guests and migrations."""

from coordinator.cli.domain import _domain_state, _versions
from coordinator.cli.migration import _row
from coordinator.client import Domain, Migration
from drover.agent.v1 import host_pb2, migration_pb2
from drover.coordinator.v1 import host_pb2 as cluster_pb2
from tests.unit.running_drover import Drover


def test_6_9_a_guest_that_does_not_answer_says_so() -> None:
    said = host_pb2.Domain(name="web1", state=host_pb2.DOMAIN_STATE_RUNNING, job="unknown")
    assert _domain_state(Domain.from_proto(cluster_pb2.PlacedDomain(domain=said))) == "running"
    said.silence.FromSeconds(12)
    assert _domain_state(Domain.from_proto(cluster_pb2.PlacedDomain(domain=said))) == "running (no answer for 12 s)"


def test_6_33_a_guest_whose_qemu_was_replaced_says_both_versions() -> None:
    said = host_pb2.Domain(name="web1", running_version="7.2.22", installed_version="7.2.22")
    assert _versions(Domain.from_proto(cluster_pb2.PlacedDomain(domain=said))) == "7.2.22"
    said.installed_version = "10.0.2"
    assert _versions(Domain.from_proto(cluster_pb2.PlacedDomain(domain=said))) == "7.2.22 (10.0.2 installed)"


def test_6_24_a_host_is_removed_on_the_command_line(drover: Drover) -> None:
    assert drover("host", "remove", "b").stdout == "b was removed\n"
    assert drover.json("host", "remove", "b") == {"removed": "b"}
    assert "stop its agent first" in drover("host", "remove", "a", code=4).stderr


def test_6_16_a_clock_that_differs_is_told(drover: Drover) -> None:
    """The warning is on stderr, as programs read the table."""
    listed = drover("host", "list")
    assert "\nwarning: the clock of b is 1 h 00 min ahead of the coordinator's: check the time service of both\n" in listed.stderr
    assert "1 h 00 min ahead of the coordinator's" in drover("host", "show", "b").stdout
    assert "clock" not in drover("host", "show", "a").stdout
    assert drover.json("host", "show", "b")["clock_skew"] == "3600s"


def test_6_16_how_long_ago_is_what_the_server_says(drover: Drover) -> None:
    """The server's times are of 2023: they are not compared with a clock of the client."""
    drover("migrate", "vm1", "--to", "b")
    assert "1 min 30 s ago" in drover("migration", "list").stdout
    migration_id = drover.json("migration", "list")["migrations"][0]["migration_id"]
    assert "1 min 30 s ago" in drover("migration", "show", migration_id).stdout
    assert "1 min 30 s ago" in drover("host", "show", "a").stdout
    assert "about" not in drover("host", "show", "a").stdout
    assert "about 1 min 30 s ago" in drover("host", "show", "b").stdout  # known by its wall clock only


def test_6_19_an_answer_that_cannot_be_taken_is_not_told_as_silence(drover: Drover) -> None:
    why = "the answer of unix:/b.sock is refused: host.name has 999 bytes"
    listed = drover("host", "list").stderr
    assert listed.startswith(f"b is unreachable: {why}\n")
    assert "a is" not in listed
    assert why in drover("host", "show", "b").stdout
    assert "because" not in drover("host", "show", "a").stdout
    missing = drover("domain", "list").stderr
    assert missing == "the guests of these hosts are missing: b (no valid answer; `drover domain list --host NAME` says why)\n"


def test_7_the_list_says_what_a_migration_waits_for() -> None:
    waits = migration_pb2.Migration(
        state=migration_pb2.MIGRATION_STATE_PENDING, phase="reserve", wait_reason=migration_pb2.WAIT_REASON_SLOT
    )
    assert _row(Migration.from_proto(waits))[-1] == "reserve (waiting: slot)"
    waits.wait_reason = migration_pb2.WAIT_REASON_UNSPECIFIED
    assert _row(Migration.from_proto(waits))[-1] == "reserve"
