"""The rank of hosts for a migration that names none."""

from collections.abc import Mapping
from typing import Any

import pytest

from agent.handshake.drive.ends import Candidate, Side
from agent.hypervisor.features import PROTOCOL_VERSION
from agent.migration.placement import MOST_RANKED, rank
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb

GIB = 1 << 30
FEATURES = options_pb2.MigrationFeatures(
    options={"live": options_pb2.OPTION_SUPPORT_SUPPORTED}, split_phases=True, bandwidth=True, bandwidth_unit=1 << 20
)
GUEST = host_pb2.GetDomainResponse(
    domain=host_pb2.Domain(name="web1", uuid="u1", state=host_pb2.DOMAIN_STATE_RUNNING, memory_bytes=4 * GIB)
)
SPEC = pb.MigrationSpec(domain="web1")


def host(name: str, network: str = "mig0", **fields: Any) -> Side:
    values: dict[str, Any] = {
        "name": name,
        "host_uuid": f"uuid-{name}",
        "driver": "sim",
        "min_protocol_version": PROTOCOL_VERSION,
        "max_protocol_version": PROTOCOL_VERSION,
        "migration_features": FEATURES,
        "networks": [host_pb2.Network(name=network, address="127.92.0.1", roles=["migration"])],
        "incoming_limit": 2,
    }
    return Side(host_pb2.Host(**{**values, **fields}), None, f"{name}:7400")  # type: ignore[arg-type]


SOURCE = host("h1")


def named(*sides: Side | str) -> dict[str, Side | None]:
    """Return the hosts by name; a mere name is a host that does not answer."""
    return {side if isinstance(side, str) else side.host.name: None if isinstance(side, str) else side for side in sides}


def ranked(*sides: Side | str, spec: pb.MigrationSpec = SPEC, planned: Mapping[str, int] | None = None) -> list[tuple[str, bool]]:
    found: list[Candidate] = rank(spec, SOURCE, GUEST, named(*sides), planned=planned)
    return [(candidate.name, candidate.free) for candidate in found]


def refused(*sides: Side | str, spec: pb.MigrationSpec = SPEC, guest: host_pb2.GetDomainResponse = GUEST) -> DroverError:
    with pytest.raises(DroverError) as caught:
        rank(spec, SOURCE, guest, named(*sides))
    return caught.value


def test_8_2_hosts_with_more_free_units_come_first_then_shorter_queues_then_names() -> None:
    full: dict[str, Any] = {"incoming_in_use": 2}
    sides = [host("h5", **full, incoming_queue=3), host("h4", **full), host("h3", incoming_in_use=1), host("h2"), host("h6")]
    assert ranked(*sides) == [("h2", True), ("h6", True), ("h3", True), ("h4", False), ("h5", False)]


def test_8_2_a_host_with_a_queue_is_not_free() -> None:
    assert ranked(host("h2", incoming_queue=1)) == [("h2", False)]


def test_8_2_many_that_start_at_once_spread() -> None:
    """What has chosen a host but is not in its report yet counts; a host's own report says whether it is free."""
    assert ranked(host("h2"), host("h3"), planned={"h2": 1}) == [("h3", True), ("h2", True)]
    sides, planned, chosen = [host("h2"), host("h3"), host("h4", incoming_limit=4)], dict[str, int](), list[str]()
    for _ in range(40):
        chosen.append(ranked(*sides, planned=planned)[0][0])
        planned[chosen[-1]] = planned.get(chosen[-1], 0) + 1
    assert {name: chosen[:8].count(name) for name in planned} == {"h4": 4, "h2": 2, "h3": 2}, "no more than each can take"
    assert max(planned.values()) - min(planned.values()) <= 3


def test_8_1_a_big_guest_takes_more_units_and_can_come_alone() -> None:
    assert ranked(host("h2", incoming_in_use=1, unit_memory_bytes=2 * GIB)) == [("h2", False)]
    assert ranked(host("h2", unit_memory_bytes=GIB)) == [("h2", True)]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"draining": True}, "its agent is stopping"),
        ({"settings": {"cordoned": True}, "cordon_change": {"changed_by": "root@admin1"}}, "it is cordoned by root@admin1"),
        ({"incoming_limit": 0}, "its incoming limit is 0"),
        ({"network": "other"}, "NETWORK_NOT_FOUND: "),
        ({"min_protocol_version": 9, "max_protocol_version": 9}, "PROTOCOL_MISMATCH: "),
        ({"migration_features": options_pb2.MigrationFeatures()}, "SPLIT_PHASES_MISSING: "),
    ],
)
def test_8_2_a_host_that_may_not_be_chosen_is_left_out_and_the_error_says_why(fields: dict[str, Any], why: str) -> None:
    out = host("h2", **fields)
    assert ranked(out, host("h3")) == [("h3", True)]
    error = refused(out)
    assert error.reason is Reason.NO_HOST
    assert f"(h2: {why}" in error.message
    assert "Nothing was done to it" in error.message
    assert error.metadata["hosts"].startswith(f"h2: {why}")


def test_8_2_a_silent_host_and_the_source_are_no_candidates() -> None:
    assert ranked("h2", host("h3"), host("h1"), host("twin", host_uuid="uuid-h1")) == [("h3", True)]
    assert "(h2: it does not answer)" in refused("h2", SOURCE).message
    assert "(there is no host but h1)" in refused(host("h1", incoming_limit=0)).message


def test_8_2_an_option_that_a_host_lacks_rules_it_out() -> None:
    spec = pb.MigrationSpec(domain="web1", options=options_pb2.Options(live=True))
    unable = host("h2", migration_features=options_pb2.MigrationFeatures(split_phases=True))
    assert ranked(unable, host("h3"), spec=spec) == [("h3", True)]
    assert "h2: OPTION_UNSUPPORTED: the destination h2 cannot do option live=on" in refused(unable, spec=spec).message


def test_8_2_what_keeps_the_guest_at_its_source_is_told_itself() -> None:
    """Not as a fault of every host."""
    off = host_pb2.GetDomainResponse(domain=host_pb2.Domain(name="web1", state=host_pb2.DOMAIN_STATE_SHUTOFF))
    assert refused(host("h2"), guest=off).reason is Reason.DOMAIN_NOT_RUNNING
    held = host_pb2.GetDomainResponse(domain=GUEST.domain, obstacle=host_pb2.Obstacle(reason="DOMAIN_BUSY", message="held"))
    assert refused(host("h2"), guest=held).reason is Reason.DOMAIN_BUSY


def test_8_2_a_large_cluster_does_not_make_a_long_error() -> None:
    error = refused(*(host(f"h{number}", incoming_limit=0) for number in range(2, 502)))
    assert len(error.message.encode()) <= 4000
    assert "and 468 more" in error.message
    assert len(error.metadata["hosts"]) <= 1024


def test_8_2_a_large_cluster_is_ranked_by_its_reports_and_only_its_best_hosts_are_judged() -> None:
    sides = [host(f"h{number:03}", incoming_in_use=number % 3) for number in range(2, 502)]
    found = ranked(*sides)
    assert found == [(f"h{number:03}", True) for number in range(3, 3 + 3 * MOST_RANKED, 3)]
    unfit = [host(f"a{number:03}", network="other") for number in range(100)]
    assert ranked(*unfit, *sides) == found, "those that are unfit take no place"
