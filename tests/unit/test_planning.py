"""agent.migration.planning: everything that the hosts' descriptions show to be impossible is refused."""

from typing import Any

import pytest
from grpc import StatusCode

from agent.handshake.drive.ends import Ends, Side
from agent.handshake.drive.plan import Plan
from agent.migration.planning import make_plan, resume_plan
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2, options_pb2
from drover.agent.v1 import migration_pb2 as pb

_SUPPORT = {
    "live": options_pb2.OPTION_SUPPORT_ALWAYS_ON,
    "post_copy": options_pb2.OPTION_SUPPORT_SUPPORTED,
    "rdma": options_pb2.OPTION_SUPPORT_UNSUPPORTED,
}
SPEC = pb.MigrationSpec(domain="web1", destination_host="h2")


def host(number: int, **changes: Any) -> host_pb2.Host:
    fields: dict[str, Any] = {
        "name": f"h{number}",
        "host_uuid": f"uuid-{number}",
        "min_protocol_version": 1,
        "max_protocol_version": 1,
        "migration_features": features(),
        "networks": [
            host_pb2.Network(name="mgmt", address=f"10.91.0.{number}", roles=["management"]),
            host_pb2.Network(name="mig", address=f"10.92.0.{number}", roles=["migration"]),
        ],
    }
    return host_pb2.Host(**{**fields, **changes})


def features(**changes: Any) -> options_pb2.MigrationFeatures:
    fields: dict[str, Any] = {
        "options": _SUPPORT,
        "uri_transports": ["tcp"],
        "first_port": 49152,
        "last_port": 49215,
        "bandwidth": True,
        "split_phases": True,
    }
    return options_pb2.MigrationFeatures(**{**fields, **changes})


def guest(state: host_pb2.DomainState.ValueType = host_pb2.DOMAIN_STATE_RUNNING) -> host_pb2.GetDomainResponse:
    return host_pb2.GetDomainResponse(
        domain=host_pb2.Domain(name="web1", uuid="u1", state=state),
        requirements=host_pb2.GuestRequirements(name="web1", uuid="u1", vcpus=2),
    )


def side(of: host_pb2.Host) -> Side:
    called: Any = None  # a plan calls nobody
    return Side(of, called, f"10.91.0.{of.name.removeprefix('h')}:7400")


def planned(
    spec: pb.MigrationSpec = SPEC,
    source: host_pb2.Host | None = None,
    destination: host_pb2.Host | None = None,
    domain: host_pb2.GetDomainResponse | None = None,
) -> tuple[Plan, list[str]]:
    return make_plan(spec, Ends(side(source or host(1)), side(destination or host(2)), domain or guest()))


def test_a_plan_of_a_plain_spec() -> None:
    plan, warnings = planned()
    assert warnings == []
    assert (plan.domain_name, plan.domain_uuid, plan.destination_name) == ("web1", "u1", "web1")
    assert (plan.source_host, plan.destination_host, plan.network) == ("h1", "h2", "mig")
    assert (plan.source_agent, plan.destination_agent) == ("10.91.0.1:7400", "10.91.0.2:7400")
    assert plan.requirements is not None
    assert plan.requirements.vcpus == 2
    assert (plan.network_choice.source_address, plan.network_choice.destination_address) == ("10.92.0.1", "10.92.0.2")
    assert plan.uri == "tcp://10.92.0.2"


def test_what_the_user_said_is_in_the_plan() -> None:
    spec = pb.MigrationSpec(
        domain="web1",
        destination_host="h2",
        destination_name="web2",
        network="mgmt",
        bandwidth_bytes_per_second=5,
        options=options_pb2.Options(post_copy=True, live=True),
    )
    plan, warnings = planned(spec)
    assert (plan.destination_name, plan.settings.bandwidth_bytes_per_second, plan.network) == ("web2", 5, "mgmt")
    assert plan.options == spec.options
    assert [warning for warning in warnings if "mgmt" in warning and "no migration role" in warning]


def test_a_uri_names_the_network() -> None:
    plan, warnings = planned(pb.MigrationSpec(domain="web1", uri="tcp://10.91.0.2:49152"))
    assert (plan.network, plan.uri) == ("mgmt", "tcp://10.91.0.2:49152")
    assert len(warnings) == 1


def spec(**fields: Any) -> pb.MigrationSpec:
    return pb.MigrationSpec(domain="web1", destination_host="h2", **fields)


def option(**options: bool) -> pb.MigrationSpec:
    message = options_pb2.Options()
    for name, value in options.items():
        setattr(message, name, value)
    return spec(options=message)


@pytest.mark.parametrize("end", ["source", "destination"])
@pytest.mark.parametrize(
    ("wanted", "changes", "reason"),
    [
        (option(rdma=True), {}, Reason.OPTION_UNSUPPORTED),
        (option(live=False), {}, Reason.OPTION_UNSUPPORTED),
        (option(compressed=True), {}, Reason.OPTION_UNSUPPORTED),
        (spec(bandwidth_bytes_per_second=1), {"migration_features": features(bandwidth=False)}, Reason.BANDWIDTH_UNSUPPORTED),
        (SPEC, {"migration_features": features(split_phases=False)}, Reason.SPLIT_PHASES_MISSING),
        (SPEC, {"min_protocol_version": 2, "max_protocol_version": 3}, Reason.PROTOCOL_MISMATCH),
        (SPEC, {"min_protocol_version": 0, "max_protocol_version": 0}, Reason.PROTOCOL_MISMATCH),
        (SPEC, {"networks": []}, Reason.NETWORK_NOT_FOUND),
        (spec(network="storage"), {}, Reason.NETWORK_NOT_FOUND),
    ],
)
def test_either_end_can_refuse(end: str, wanted: pb.MigrationSpec, changes: dict[str, Any], reason: Reason) -> None:
    hosts = {"source": host(1), "destination": host(2), end: host(1 if end == "source" else 2, **changes)}
    with pytest.raises(DroverError) as error:
        planned(wanted, hosts["source"], hosts["destination"])
    assert error.value.reason is reason
    if changes and reason is not Reason.NETWORK_NOT_FOUND:
        assert hosts[end].name in error.value.message


FORBIDDEN = features(
    options={**_SUPPORT, "post_copy": options_pb2.OPTION_SUPPORT_UNSUPPORTED},
    reasons={"post_copy": "vm.unprivileged_userfaultfd is 0 and QEMU runs as user libvirt-qemu"},
)


@pytest.mark.parametrize(("source", "destination"), [(True, False), (False, True), (False, False)])
def test_6_30_post_copy_is_armed_by_itself_only_where_both_hosts_can(source: bool, destination: bool) -> None:
    ends = [host(n) if can else host(n, migration_features=FORBIDDEN) for n, can in ((1, source), (2, destination))]
    plan, _ = planned(source=ends[0], destination=ends[1])
    assert plan.options == options_pb2.Options(post_copy=False)
    assert not planned()[0].options.HasField("post_copy")
    planned(option(post_copy=False), ends[0], ends[1])
    with pytest.raises(DroverError, match=r"vm\.unprivileged_userfaultfd is 0") as error:
        planned(option(post_copy=True), ends[0], ends[1])
    assert error.value.reason is Reason.OPTION_UNSUPPORTED
    assert ("h2" if source else "h1") in error.value.message


@pytest.mark.parametrize("reason", ["DOMAIN_BUSY", "OF_TOMORROW"])
def test_6_15_what_keeps_the_guest_from_leaving_is_told_before_a_slot_is_taken(reason: str) -> None:
    held = guest()
    held.obstacle.CopyFrom(host_pb2.Obstacle(reason=reason, message="it has a snapshot", metadata={"migration_id": "m1"}))
    with pytest.raises(DroverError, match="it has a snapshot") as error:
        planned(domain=held)
    assert (error.value.reason, error.value.code) == (reason, StatusCode.FAILED_PRECONDITION)
    assert error.value.metadata["migration_id"] == "m1"


def test_6_30_a_driver_that_goes_on_has_the_options_of_the_plan() -> None:
    plan, _ = planned(destination=host(2, migration_features=FORBIDDEN))
    migration = pb.Migration(spec=SPEC, source_host="h1", destination_host="h2", network="mig", options=plan.options)
    assert resume_plan(migration, side(host(1)), side(host(2))).options == options_pb2.Options(post_copy=False)


@pytest.mark.parametrize("uri", ["tcp://10.92.0.1:49152", "tcp://10.92.0.2:1", "rdma://10.92.0.2:49152"])
def test_a_uri_that_the_destination_would_refuse(uri: str) -> None:
    with pytest.raises(DroverError) as error:
        planned(spec(uri=uri))
    assert error.value.reason is Reason.URI_NOT_ALLOWED


def test_two_names_of_one_host() -> None:
    with pytest.raises(DroverError) as error:
        planned(destination=host(2, host_uuid="uuid-1"))
    assert error.value.reason is Reason.SAME_HOST


@pytest.mark.parametrize("state", [host_pb2.DOMAIN_STATE_SHUTOFF, host_pb2.DOMAIN_STATE_CRASHED])
def test_only_a_guest_with_a_process_can_move(state: host_pb2.DomainState.ValueType) -> None:
    with pytest.raises(DroverError) as error:
        planned(domain=guest(state))
    assert error.value.reason is Reason.DOMAIN_NOT_RUNNING
    planned(domain=guest(host_pb2.DOMAIN_STATE_PAUSED))


def test_a_plan_to_go_on_with_asks_for_no_new_slot() -> None:
    first, _ = planned(spec(bandwidth_bytes_per_second=7, destination_name="web2"))
    migration = pb.Migration(
        spec=spec(bandwidth_bytes_per_second=7, destination_name="web2"),
        source_host="h1",
        destination_host="h2",
        domain_name="web1",
        domain_uuid="u1",
        network="mig",
        network_choice=first.network_choice,
        settings=first.settings,
    )
    again = resume_plan(migration, side(host(1)), side(host(2)))
    assert again.requirements is None
    names = set(Plan.__dataclass_fields__) - {"requirements"}
    assert {name: getattr(again, name) for name in names} == {name: getattr(first, name) for name in names}


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "wildcard"),
        ("ff02::1", "multicast"),
        ("fe80::1", "link-local without a scope"),
        ("banana", "no addresses of one family"),
        ("10.92.0.1", "is an address of the source h1, too"),
    ],
)
def test_6_05_a_destination_is_reached_at_an_address_that_it_alone_has(address: str, says: str) -> None:
    networks = [host_pb2.Network(name="mig", address=address, roles=["migration"])]
    at_source = [host_pb2.Network(name="mig", address="fd00::1" if ":" in address else "10.92.0.1", roles=["migration"])]
    with pytest.raises(DroverError, match=says) as error:
        planned(SPEC, host(1, networks=at_source), host(2, networks=networks))
    assert error.value.reason is Reason.NETWORK_NOT_FOUND
    if address != "banana":
        planned(SPEC, host(1, driver="sim", networks=at_source), host(2, driver="sim", networks=networks))


def test_6_17_two_hosts_with_one_uuid_are_told_what_to_do() -> None:
    with pytest.raises(DroverError, match=r"h1 and .* h2 are the same host, as libvirt takes them: .*libvirtd\.conf") as error:
        planned(destination=host(2, host_uuid=host(1).host_uuid))
    assert error.value.reason is Reason.SAME_HOST
