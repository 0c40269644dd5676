"""Requirements H2, H4, H5, H7, A1, A3, R3: what cannot work is refused with its reason, and changes nothing."""

from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import CRAWL, Talk, assert_idle, new_id, speed_up, state


@pytest.mark.parametrize(
    ("domain", "to", "spec", "reason"),
    [
        ("no-such-guest", "h2", {}, Reason.DOMAIN_NOT_FOUND),
        ("refused", "h9", {}, Reason.HOST_NOT_FOUND),
        ("refused", "h1", {}, Reason.SAME_HOST),
        ("refused", "h2", {"source_host": "h9"}, Reason.HOST_NOT_FOUND),
        ("refused", "h2", {"source_host": "h2"}, Reason.DOMAIN_NOT_FOUND),
        ("stopped", "h2", {}, Reason.DOMAIN_NOT_RUNNING),
        ("refused", "h2", {"network": "nowhere"}, Reason.NETWORK_NOT_FOUND),
        ("refused", "h2", {"uri": "tcp://192.0.2.1"}, Reason.URI_NOT_ALLOWED),
        ("refused", "h2", {"uri": "exec:touch /tmp/owned"}, Reason.URI_NOT_ALLOWED),
        ("refused", "h2", {"uri": "rdma://10.92.0.2"}, Reason.URI_NOT_ALLOWED),
        ("refused", "h2", {"options": {"tunnelled": True}}, Reason.OPTION_UNSUPPORTED),
        ("refused", "h2", {"options": {"rdma": True}}, Reason.OPTION_UNSUPPORTED),
        ("refused", "h2", {"options": {"offline": True}}, Reason.OPTION_UNSUPPORTED),
        ("x" * 254, "h2", {}, Reason.FIELD_TOO_LARGE),
        ("refused", "h2", {"destination_name": "y" * 254}, Reason.FIELD_TOO_LARGE),
        ("refused", "h2", {"bandwidth_bytes_per_second": -1}, Reason.INVALID_FIELD),
        ("", "h2", {}, Reason.INVALID_FIELD),
        ("refused", "h2", {"destination_name": "../../victim"}, Reason.INVALID_FIELD),
        ("refused", "h2", {"destination_name": ".."}, Reason.INVALID_FIELD),
        ("refused", "h2", {"destination_name": "a\tb"}, Reason.INVALID_FIELD),
        ("refused", "h2", {"destination_name": "z" * 244}, Reason.INVALID_FIELD),
    ],
)
async def test_refused(cluster: Cluster, domain: str, to: str, spec: dict[str, Any], reason: Reason) -> None:
    guest = cluster.guest("refused")
    cluster.guest("stopped")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start(domain, to, **spec)
        assert refusal.value.reason is reason, refusal.value.message
        assert len(refusal.value.message) > 20, "an error says what happened"
    assert cluster.copies(guest.name) == {"h1": "running"}
    guest.wait_lines(2)
    await assert_idle(cluster)


async def test_a_foreign_port_is_refused(cluster: Cluster) -> None:
    cluster.guest("refused")
    async with Talk(cluster.agents["h2"].address) as talk:
        address = next(n.address for n in (await talk.host()).networks if n.name == "mig1")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start("refused", "h2", uri=f"tcp://{address}:22")
    assert refusal.value.reason is Reason.URI_NOT_ALLOWED
    assert "22" in refusal.value.message


async def test_an_id_that_is_no_uuid_is_refused(cluster: Cluster) -> None:
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start("refused", "h2", "42")
    assert refusal.value.reason is Reason.INVALID_FIELD


async def test_full_destination(cluster: Cluster) -> None:
    """The limit of the scenarios' hosts is one slot (see the conftests): the second guest is refused, untouched."""
    first, second = cluster.start_guest("busy-1"), cluster.start_guest("busy-2")
    async with Talk(cluster.server) as talk:
        running = await talk.start(first.name, "h2", bandwidth_bytes_per_second=CRAWL)
        migration_id = new_id()
        with pytest.raises(DroverError) as busy:
            await talk.start(second.name, "h2", migration_id)
        assert busy.value.reason is Reason.BUSY
        assert migration_id not in [migration.migration_id for migration in (await talk.list()).migrations]
        assert busy.value.code.name == "RESOURCE_EXHAUSTED"
        assert busy.value.retry_after is not None
        assert busy.value.retry_after >= 1
        assert busy.value.metadata["limit_value"] == "1"
        assert cluster.copies(second.name) == {"h1": "running"}
        await speed_up(talk, running.migration_id)
        assert state(await talk.end(running.migration_id)) == "succeeded"
        assert state(await talk.end((await talk.start(second.name, "h2", migration_id)).migration_id)) == "succeeded"
    second.wait_lines(5)
    assert second.judge().problems() == []


async def test_6_15_a_guest_under_way_is_held_by_the_migration_that_is_named(cluster: Cluster) -> None:
    """Neither the hypervisor's job nor a destination's full slots are the cause to tell."""
    guest = cluster.start_guest("wanted-twice")
    async with Talk(cluster.server) as talk:
        running = await talk.start(guest.name, "h2", bandwidth_bytes_per_second=CRAWL)
        await talk.watch(running.migration_id, lambda m: m.phase == "perform")
        with pytest.raises(DroverError) as busy:
            await talk.start(guest.name, "h2")
        assert busy.value.reason is Reason.DOMAIN_BUSY, busy.value.message
        assert busy.value.metadata["migration_id"] == running.migration_id
        assert running.migration_id in busy.value.message
        await speed_up(talk, running.migration_id)
        assert state(await talk.end(running.migration_id)) == "succeeded"


async def test_6_32_a_guest_that_is_paused_but_not_by_its_user_stays_as_it_is(cluster: Cluster) -> None:
    guest = cluster.start_guest("halted")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start(guest.name, "h2")
    assert refusal.value.reason is Reason.DOMAIN_NOT_RUNNING, refusal.value.message
    assert refusal.value.code.name == "FAILED_PRECONDITION"
    assert "paused (unknown)" in refusal.value.message
    assert "runs on h1" not in refusal.value.message
    assert cluster.copies(guest.name) == {"h1": "paused"}
    await assert_idle(cluster)


async def test_6_2_a_memory_that_was_saved_at_the_destination_is_told_before(cluster: Cluster) -> None:
    """It would come back with the guest's next start there, over a disk that has gone on since."""
    guest = cluster.start_guest("saved", "h2")
    cluster.save(guest, "h2")
    cluster.start_guest("saved", "h1")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start(guest.name, "h2")
    assert refusal.value.reason is Reason.DOMAIN_EXISTS, refusal.value.message
    assert "h2 already has a guest saved" in refusal.value.message
    assert "`virsh managedsave-remove saved`" in refusal.value.message
    assert cluster.running_on(guest.name) == ["h1"]
    guest.wait_lines(2)
    await assert_idle(cluster)


async def test_guest_already_there(cluster: Cluster) -> None:
    guest = cluster.guest("refused")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.start(guest.uuid, "h1", migration_id=new_id())
    assert refusal.value.reason is Reason.SAME_HOST
