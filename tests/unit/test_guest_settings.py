"""A guest's own settings: in its definition, through UpdateDomain, in lists, and on its way (agent.hypervisor.guest_settings)."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from structlog.testing import capture_logs

from agent.hypervisor.base import DomainBusy, Job
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.wire import settings_from_proto, settings_to_proto
from agent.runtime.errors import Reason
from agent.service.host_service import HostServicer, update_domain
from drover.agent.v1 import host_pb2 as pb
from drover.agent.v1 import migration_pb2
from tests.unit.asking import ID, fails
from tests.unit.fake_directory import Driving, _host
from tests.unit.fake_hypervisor import UUID
from tests.unit.test_sim_migration import Hosts, Move, hosts, slow, web  # noqa: F401 - `hosts` is a fixture

MIB = 1 << 20
GOLD = GuestSettings("gold", 2 * MIB, 9 * MIB)


# --- the value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GuestSettings(), GOLD, GuestSettings(tenant='Wörk & <Co> "x"'), GuestSettings("", 0, 5)])
def test_8_4_settings_survive_text_and_wire(settings: GuestSettings) -> None:
    assert GuestSettings.of(settings.attributes()) == (settings, "")
    assert settings_from_proto(settings_to_proto(settings)) == settings


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({"min_bandwidth": "x", "max_bandwidth": "9"}, GuestSettings("a", 0, 9)),
        ({"min_bandwidth": "-1"}, GuestSettings("a")),
        ({"min_bandwidth": "2", "max_bandwidth": "1e6"}, GuestSettings("a", 2)),
        ({"max_bandwidth": "٣"}, GuestSettings("a")),
        ({"max_bandwidth": "9" * 19}, GuestSettings("a")),
        ({"min_bandwidth": str(10**12 + 1)}, GuestSettings("a")),
        ({"min_bandwidth": "5", "max_bandwidth": "4"}, GuestSettings("a", 0, 4)),
    ],
)
def test_8_4_what_cannot_be_used_is_told_and_the_rest_counts(attributes: dict[str, str], wanted: GuestSettings) -> None:
    settings, wrong = GuestSettings.of({"tenant": "a"} | attributes)
    assert settings == wanted
    assert "bandwidth" in wrong


@pytest.mark.parametrize("tenant", ["a\nb", " a", "a ", "x" * 254])
def test_8_4_a_tenant_that_cannot_be_read_is_not_none(tenant: str) -> None:
    settings, wrong = GuestSettings.of({"tenant": tenant, "max_bandwidth": "9"})
    assert (settings.tenant, settings.max_bandwidth, settings.unread) == ("", 9, wrong)
    assert "the tenant has" in wrong
    assert settings.attributes() == {"max_bandwidth": "9"}


def test_8_4_further_attributes_are_of_a_newer_version() -> None:
    assert GuestSettings.of({"tenant": "a", "colour": "red"}) == (GuestSettings("a"), "")


# --- libvirt's metadata -----------------------------------------------------------------------------------------------


class _Domain:
    """The part of libvirt's domain that is read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked = 0
        self.meanwhile: Callable[[], None] = lambda: None

    def metadata(self, _kind: int, _uri: str, _flags: int) -> str:
        self.asked += 1
        self.meanwhile()
        return self.text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<settings", GuestSettings(unread="the metadata is not XML")),
        ("<settings tenant='a' min_bandwidth='much'/>", GuestSettings("a")),
        ("<other/>", None),
        ("<settings/>", None),
    ],
)
def test_8_4_what_is_malformed_in_metadata_is_logged_and_the_rest_counts(text: str, wanted: GuestSettings | None) -> None:
    metadata: Any = pytest.importorskip("agent.hypervisor.libvirt.metadata")
    with capture_logs() as logs:
        assert metadata.read(_Domain(text)) == wanted
    assert bool(logs) is (wanted is not None)


def test_8_4_a_list_reads_each_guest_once_until_it_changes() -> None:
    metadata: Any = pytest.importorskip("agent.hypervisor.libvirt.metadata")
    cache, domain = metadata.Cache(), _Domain("<settings tenant='a'/>")
    assert [cache.of(domain, "u") for _ in range(3)] == [GuestSettings("a")] * 3
    assert domain.asked == 1
    domain.text = "<settings tenant='b'/>"
    cache.forget("u")
    assert cache.of(domain, "u") == GuestSettings("b")
    cache.forget("")
    cache.of(domain, "u")
    assert domain.asked == 3


def test_8_4_what_changes_during_the_read_is_read_again() -> None:
    metadata: Any = pytest.importorskip("agent.hypervisor.libvirt.metadata")
    cache, domain = metadata.Cache(), _Domain("<settings tenant='a'/>")
    domain.meanwhile = lambda: cache.forget("u")
    cache.of(domain, "u")
    domain.meanwhile = lambda: None
    domain.text = "<settings tenant='b'/>"
    assert cache.of(domain, "u") == GuestSettings("b")


# --- UpdateDomain -----------------------------------------------------------------------------------------------------


def request(**fields: Any) -> pb.UpdateDomainRequest:
    return pb.UpdateDomainRequest(domain="web1", settings=pb.DomainSettings(**fields), update_mask=FieldMask(paths=list(fields)))


async def test_8_4_settings_are_written_and_read_back(driving: Driving) -> None:
    host = _host(driving.pair.source)
    await update_domain(host, request(tenant="gold", max_bandwidth_bytes_per_second=9))
    changed = await update_domain(host, request(min_bandwidth_bytes_per_second=2))
    assert changed.settings == GuestSettings("gold", 2, 9)
    listed = (await HostServicer(host).ListDomains(pb.ListDomainsRequest(), None)).domains  # type: ignore[arg-type]
    assert settings_from_proto(listed[0].settings) == GuestSettings("gold", 2, 9)
    cleared = await update_domain(host, request(tenant="", min_bandwidth_bytes_per_second=0, max_bandwidth_bytes_per_second=0))
    assert cleared.settings is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"min_bandwidth_bytes_per_second": 5, "max_bandwidth_bytes_per_second": 4}, Reason.INVALID_FIELD),
        ({"tenant": "a\tb"}, Reason.INVALID_FIELD),
        ({}, Reason.INVALID_FIELD),
    ],
)
async def test_8_4_bad_settings_change_nothing(driving: Driving, fields: dict[str, Any], reason: Reason) -> None:
    await fails(update_domain(_host(driving.pair.source), request(**fields)), reason)
    assert "set_settings" not in driving.pair.source.calls


async def test_8_4_a_limit_that_cannot_be_enforced_is_refused_with_the_least_one(driving: Driving) -> None:
    host = _host(driving.pair.source)
    host.engine.host.features.bandwidth_unit = MIB
    refused = await fails(update_domain(host, request(max_bandwidth_bytes_per_second=MIB - 1)), Reason.BANDWIDTH_UNSUPPORTED)
    assert refused.metadata["least"] == str(MIB)
    assert "set_settings" not in driving.pair.source.calls


async def test_8_4_two_changes_at_once_both_hold(driving: Driving) -> None:
    servicer = HostServicer(_host(driving.pair.source))
    await asyncio.gather(
        servicer.UpdateDomain(request(tenant="a"), None),  # type: ignore[arg-type]
        servicer.UpdateDomain(request(max_bandwidth_bytes_per_second=9), None),  # type: ignore[arg-type]
    )
    assert driving.pair.source.hypervisor.domains[UUID].settings == GuestSettings("a", 0, 9)


async def test_8_7_a_migration_starts_with_the_guests_settings(driving: Driving) -> None:
    driving.pair.source.hypervisor.change(UUID, settings=GuestSettings("gold", 2, 9))
    started = await driving.migrations.start(ID, migration_pb2.MigrationSpec(domain="web1", destination_host="h2"))
    settings = started.settings
    assert (settings.min_bandwidth_bytes_per_second, settings.bandwidth_bytes_per_second, started.tenant) == (2, 9, "gold")
    await driving.ended(ID)
    assert driving.pair.source.hypervisor.arguments["perform"][-2:] == (9, 0.0)


async def test_8_4_a_guest_whose_tenant_cannot_be_read_stays_until_it_is_set_anew(driving: Driving) -> None:
    """It may belong to a tenant with networks of its own, so its memory goes over no other one."""
    driving.pair.source.hypervisor.change(UUID, settings=GuestSettings.of({"tenant": " gold"})[0])
    spec = migration_pb2.MigrationSpec(domain="web1", destination_host="h2")
    refused = await fails(driving.migrations.start(ID, spec), Reason.INCOMPATIBLE_GUEST)
    assert "drover domain set web1 --tenant TENANT" in refused.message
    assert driving.pair.source.engine.active() == []
    await update_domain(_host(driving.pair.source), request(tenant="gold"))
    await driving.migrations.start(ID, spec)
    assert (await driving.ended(ID)).tenant == "gold"


async def test_8_4_a_tenant_that_no_guest_can_have_is_refused_for_a_migration(driving: Driving) -> None:
    spec = migration_pb2.MigrationSpec(domain="web1", destination_host="h2", tenant=" gold")
    refused = await fails(driving.migrations.start(ID, spec), Reason.INVALID_FIELD)
    assert refused.metadata["field"] == "spec.tenant"


# --- the simulator ----------------------------------------------------------------------------------------------------


async def test_8_4_settings_travel_with_a_simulated_guest(hosts: Hosts) -> None:  # noqa: F811
    a, b = await hosts(web())
    move = Move(a, b)
    assert (await a.set_settings(move.uuid, GOLD)).settings == GOLD
    await move.prepare()
    finishing = move.finish()
    await move.perform()
    await finishing
    assert (await b.get_domain(move.uuid)).settings == GOLD
    assert (await b.set_settings(move.uuid, GuestSettings())).settings is None


async def test_8_4_a_guest_in_migration_is_busy(hosts: Hosts) -> None:  # noqa: F811
    a, b = await hosts(slow())
    move = Move(a, b)
    await move.prepare()
    assert (await a.get_domain(move.uuid)).job is Job.OUTGOING
    with pytest.raises(DomainBusy):
        await a.set_settings(move.uuid, GOLD)
