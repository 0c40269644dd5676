"""Requirements H1, H10, R3, A1: each phase by hand, idempotent, refused in the wrong state; leases expire."""

import pytest

from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import duration
from drover.agent.v1 import handshake_pb2 as pb
from drover.agent.v1 import handshake_pb2_grpc, host_pb2
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import Talk, assert_idle, new_id, record_state


async def reserve(source: Talk, destination: Talk, ref: pb.AttemptRef, domain: str) -> pb.ReserveSlotResponse:
    guest: host_pb2.GetDomainResponse = await source.call(source.hosts.GetDomain, host_pb2.GetDomainRequest(domain=domain))
    request = pb.ReserveSlotRequest(ref=ref, request_id="r1", requirements=guest.requirements, source_host="h1")
    response: pb.ReserveSlotResponse = await destination.handshake.reserve_slot(request)
    return response


async def test_every_phase_by_hand(cluster: Cluster) -> None:
    guest = cluster.start_guest("by-hand")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        source, destination = src.handshake, dst.handshake
        reserved = await reserve(src, dst, ref, guest.name)
        slot = reserved.record.slot
        begun = await source.begin(pb.BeginRequest(ref=ref, domain=guest.name, destination_host="h2", probe=reserved.probe))
        assert record_state(begun.record) == "begun"
        with pytest.raises(DroverError) as early:
            await source.confirm(pb.ConfirmRequest(ref=ref, decision=pb.DECISION_RUNNING))
        assert early.value.reason is Reason.WRONG_PHASE
        with pytest.raises(DroverError) as unprepared:
            await destination.finish(pb.FinishRequest(ref=ref))
        assert unprepared.value.reason is Reason.WRONG_PHASE
        assert "prepare" in unprepared.value.metadata["allowed"]
        with pytest.raises(DroverError) as stale:
            await destination.prepare(pb.PrepareRequest(ref=ref, slot_epoch=slot.epoch + 7, domain_xml=begun.domain_xml))
        assert stale.value.reason is Reason.STALE_LEASE
        request = pb.PrepareRequest(
            ref=ref, request_id="p1", slot_epoch=slot.epoch, domain_xml=begun.domain_xml, cookie_in=begun.cookie_out
        )
        prepared = await destination.prepare(request)
        again = await destination.prepare(request)
        assert again.uri_out == prepared.uri_out
        assert again.cookie_out == prepared.cookie_out
        request.network = "mig2"
        with pytest.raises(DroverError) as reused:
            await destination.prepare(request)
        assert reused.value.reason is Reason.REQUEST_ID_REUSED
        with pytest.raises(DroverError) as foreign:
            await source.perform(pb.PerformRequest(ref=ref, uri="unix:/tmp/x", cookie_in=prepared.cookie_out))
        assert foreign.value.reason is Reason.URI_NOT_ALLOWED
        performed = pb.PerformRequest(ref=ref, cookie_in=prepared.cookie_out, destination_record=prepared.record)
        for wrong in (prepared.uri_out[:-1] + "9", "tcp://localhost:49160"):  # 6.7: only what this attempt's destination gave
            performed.uri = wrong
            with pytest.raises(DroverError) as elsewhere:
                await source.perform(performed)
            assert elsewhere.value.reason is Reason.URI_NOT_ALLOWED
        performed.uri = prepared.uri_out
        performing = await source.perform(performed)
        assert record_state(performing.record) in ("performing", "performed")
        armed = await destination.finish(pb.FinishRequest(ref=ref, wait=duration(20)))
        assert record_state(armed.record) == "running", armed.record.failure.message
        with pytest.raises(DroverError) as late:
            await destination.abandon(pb.AbandonRequest(ref=ref, source_kept=True))
        assert late.value.reason is Reason.WRONG_PHASE
        assert late.value.metadata["state"] == "running"
        confirmed = await source.confirm(
            pb.ConfirmRequest(
                ref=ref,
                decision=pb.DECISION_RUNNING,
                cookie_in=armed.cookie_out,
                wait=duration(20),
                destination_record=armed.record,
            )
        )
        assert record_state(confirmed.record) == "removed"
        with pytest.raises(DroverError) as resumed:
            await source.confirm(pb.ConfirmRequest(ref=ref, decision=pb.DECISION_GONE))
        assert resumed.value.reason is Reason.WRONG_PHASE
    assert cluster.copies(guest.name) == {"h2": "running"}
    guest.wait_lines(5)
    assert guest.judge().problems() == []
    await assert_idle(cluster)


async def test_a_stale_attempt_is_refused(cluster: Cluster) -> None:
    cluster.guest("leased")
    migration_id = new_id()
    first, second = (pb.AttemptRef(migration_id=migration_id, attempt=attempt) for attempt in (1, 2))
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        await reserve(src, dst, first, "leased")
        with pytest.raises(DroverError) as too_early:
            await reserve(src, dst, second, "leased")
        assert too_early.value.reason is Reason.WRONG_PHASE
        await dst.handshake.abandon(pb.AbandonRequest(ref=first))
        await reserve(src, dst, second, "leased")
        with pytest.raises(DroverError) as stale:
            await dst.handshake.abandon(pb.AbandonRequest(ref=first))
        assert stale.value.reason is Reason.STALE_ATTEMPT
        assert stale.value.code.name == "ABORTED"
        await dst.handshake.abandon(pb.AbandonRequest(ref=second))
    await assert_idle(cluster)


async def test_a_lease_that_nobody_renews_expires(cluster: Cluster) -> None:
    """The scenarios' leases live 8 s (see the conftests)."""
    cluster.guest("leased")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        await reserve(src, dst, ref, "leased")
        assert (await dst.host()).incoming_in_use == 1
        last = None
        async for response in dst.handshake.watch_record(pb.WatchRecordRequest(ref=ref)):
            last = response.record
        assert last is not None
        assert record_state(last) == "gone"
        assert last.failure.reason == Reason.LEASE_EXPIRED
    await assert_idle(cluster)


async def test_a_tombstone_refuses_what_comes_late(cluster: Cluster) -> None:
    cluster.guest("leased")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        gone = await dst.handshake.abandon(pb.AbandonRequest(ref=ref))
        assert record_state(gone.record) == "gone"
        with pytest.raises(DroverError) as late:
            await reserve(src, dst, ref, "leased")
        assert late.value.reason is Reason.WRONG_PHASE
        kept = await src.handshake.abort(pb.AbortRequest(ref=ref))
        assert record_state(kept.record) == "kept"
        with pytest.raises(DroverError) as begin:
            await src.handshake.begin(pb.BeginRequest(ref=ref, domain="leased", destination_host="h2"))
        assert begin.value.reason is Reason.WRONG_PHASE


async def test_oversized_cookie_and_xml_are_refused(cluster: Cluster) -> None:
    cluster.guest("leased")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h2"].address) as dst:
        for field, value in (("cookie_in", b"c" * 65537), ("domain_xml", "x" * 524289)):
            request = pb.PrepareRequest(ref=ref, domain_xml="<domain/>")
            setattr(request, field, value)
            with pytest.raises(DroverError) as refusal:
                await dst.handshake.prepare(request)
            assert refusal.value.reason is Reason.FIELD_TOO_LARGE
            assert field in refusal.value.message
            assert str(len(value)) in refusal.value.message
        with pytest.raises(DroverError) as unknown:
            await dst.handshake.get_record(pb.GetRecordRequest(ref=ref))
        assert unknown.value.reason is Reason.RECORD_NOT_FOUND


@pytest.mark.parametrize("name", ["../../victim", ".", "a/b"])
async def test_6_04_a_name_that_leads_out_of_libvirts_folders_is_refused_in_each_phase(cluster: Cluster, name: str) -> None:
    """At the destination first: it trusts neither the caller nor the document that comes from the source."""
    guest = cluster.guest("misnamed")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        needs = (await src.call(src.hosts.GetDomain, host_pb2.GetDomainRequest(domain=guest.name))).requirements
        request = pb.ReserveSlotRequest(ref=ref, requirements=needs, source_host="h1", destination_name=name)
        with pytest.raises(DroverError) as reserving:
            await dst.handshake.reserve_slot(request)
        with pytest.raises(DroverError) as beginning:
            await src.handshake.begin(pb.BeginRequest(ref=ref, domain=guest.name, destination_host="h2", destination_name=name))
        slot = (await reserve(src, dst, ref, guest.name)).record.slot
        begun = await src.handshake.begin(pb.BeginRequest(ref=ref, domain=guest.name, destination_host="h2"))
        document = begun.domain_xml.replace(guest.name, name)
        with pytest.raises(DroverError) as preparing:
            await dst.handshake.prepare(
                pb.PrepareRequest(ref=ref, slot_epoch=slot.epoch, domain_xml=document, cookie_in=begun.cookie_out)
            )
        assert [e.value.reason for e in (reserving, beginning, preparing)] == [Reason.INVALID_FIELD] * 3
        assert "domain_xml" in preparing.value.message
        await dst.handshake.abandon(pb.AbandonRequest(ref=ref))
        await src.handshake.abort(pb.AbortRequest(ref=ref))
    assert cluster.copies(guest.name) == {"h1": "running"}
    guest.wait_lines(2)
    await assert_idle(cluster)


@pytest.mark.parametrize("cookie", [b"banana", b"<qemu-migration>", b"<other/>\0", b"\xff\xfe\0", b"{}x"])
@pytest.mark.parametrize("document", ["good", "<domain/>", "banana"])
async def test_6_29_what_a_caller_hands_to_prepare_is_its_own_mistake(cluster: Cluster, cookie: bytes, document: str) -> None:
    guest = cluster.guest("refused")
    ref = pb.AttemptRef(migration_id=new_id(), attempt=1)
    async with Talk(cluster.agents["h1"].address) as src, Talk(cluster.agents["h2"].address) as dst:
        slot = (await reserve(src, dst, ref, guest.name)).record.slot
        begun = await src.handshake.begin(pb.BeginRequest(ref=ref, domain=guest.name, destination_host="h2"))
        with pytest.raises(DroverError) as unperformed:
            await src.call(
                handshake_pb2_grpc.HandshakeServiceStub(src.channel).SetBandwidth,
                pb.SetBandwidthRequest(ref=ref, bandwidth_bytes_per_second=1 << 20),
            )
        assert unperformed.value.reason is Reason.WRONG_PHASE
        xml = begun.domain_xml if document == "good" else document
        with pytest.raises(DroverError) as refused:
            await dst.handshake.prepare(pb.PrepareRequest(ref=ref, slot_epoch=slot.epoch, domain_xml=xml, cookie_in=cookie))
        assert refused.value.reason is Reason.INVALID_FIELD, refused.value.message
        await dst.handshake.abandon(pb.AbandonRequest(ref=ref))
        await src.handshake.abort(pb.AbortRequest(ref=ref))
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)
