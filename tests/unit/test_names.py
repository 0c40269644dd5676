"""agent.hypervisor.names, and the requests and documents that it checks."""

import pytest

from agent.hypervisor.base import InvalidDocument
from agent.hypervisor.libvirt.options import check_document, mark
from agent.hypervisor.names import MAX_NAME, ambiguity, is_uuid, name_problem
from agent.hypervisor.sim.config import SimGuest
from agent.hypervisor.sim.definition import Definition
from agent.runtime.errors import DroverError, Reason
from agent.service.bounds import check_request
from drover.agent.v1 import handshake_pb2, host_pb2, migration_pb2

UUID = "8b2f4f7e-0d5c-4a57-9c55-3c1f5a9e0001"
GOOD = ["web1", "web 1", " ", "...", ".web", "-", "gästin", "客", "a\\b", "x" * MAX_NAME, "é" * (MAX_NAME // 2), "a\u202eb", UUID]
BAD = ["../../victim", "a/b", "/", ".", "..", "a\nb", "a\tb", "a\0b", "a\x7fb", "a\x9bb", "a\u2028b"]
TOO_LONG = ["x" * (MAX_NAME + 1), "é" * (MAX_NAME // 2 + 1)]


@pytest.mark.parametrize("name", GOOD)
def test_6_04_valid_names(name: str) -> None:
    assert name_problem(name) == ""


@pytest.mark.parametrize("name", ["", *BAD, *TOO_LONG])
def test_6_04_invalid_names(name: str) -> None:
    assert name_problem(name)


def test_6_04_every_file_named_after_a_guest_can_be_created() -> None:
    for pattern in ("{}.xml.new", "{}.monitor", "{}_VARS.qcow2", ".{}.xml.drover"):
        assert len(pattern.format("x" * MAX_NAME)) <= 255


def refusal(request: object) -> DroverError:
    with pytest.raises(DroverError) as caught:
        check_request(request)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("name", BAD + TOO_LONG)
def test_6_04_every_request_refuses_an_invalid_name(name: str) -> None:
    ref = handshake_pb2.AttemptRef(migration_id=UUID, attempt=1)
    needs = host_pb2.GuestRequirements(name="web1", uuid=UUID)
    odd = host_pb2.GuestRequirements(name=name, uuid=UUID)
    spec = migration_pb2.MigrationSpec(domain="web1", destination_host="h2", destination_name=name)
    for request, field in (
        (handshake_pb2.ReserveSlotRequest(ref=ref, requirements=needs, source_host="h1", destination_name=name), "destination_name"),
        (handshake_pb2.ReserveSlotRequest(ref=ref, requirements=odd, source_host="h1"), "requirements.name"),
        (handshake_pb2.BeginRequest(ref=ref, domain="web1", destination_host="h2", destination_name=name), "destination_name"),
        (migration_pb2.StartMigrationRequest(migration_id=UUID, spec=spec), "spec.destination_name"),
    ):
        error = refusal(request)
        assert error.reason is Reason.INVALID_FIELD
        assert error.violations[0].field == field


def test_6_04_a_guest_is_named_by_its_canonical_uuid() -> None:
    ref = handshake_pb2.AttemptRef(migration_id=UUID, attempt=1)
    for text in ("8b2f", UUID.upper(), UUID.replace("-", ""), "../../../../../../../../../../etc/pass"):
        needs = host_pb2.GuestRequirements(name="web1", uuid=text[:36])
        error = refusal(handshake_pb2.ReserveSlotRequest(ref=ref, requirements=needs, source_host="h1"))
        assert error.violations[0].field == "requirements.uuid"


def xml(name: str, uuid: str = UUID, tag: str = "domain") -> str:
    return f"<{tag} type='kvm'><name>{name}</name><uuid>{uuid}</uuid></{tag}>"


def sim(name: str, uuid: str = UUID) -> str:
    return Definition(guest=SimGuest(name=name, uuid=uuid)).text()


def test_6_04_the_document_of_a_guest() -> None:
    check_document(xml("web1"), UUID)
    check_document(mark(xml("web1"), "paused", "transient"), UUID)
    Definition.parse(sim("web1")).check(UUID)


@pytest.mark.parametrize(
    "text",
    [
        xml("../../victim"),
        xml(".."),
        xml(""),
        xml("a&#9;b"),
        xml("web1", UUID.replace("0001", "0002")),
        xml("web1", ""),
        xml("web1", tag="network"),
        "<domain>",
        "no XML",
        '<!DOCTYPE d [<!ENTITY a "aaaa">]><domain><name>&a;/</name></domain>',
    ],
)
def test_6_04_invalid_documents_are_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        check_document(text, UUID)


@pytest.mark.parametrize("text", [sim("../../victim"), sim("."), sim("web1", UUID.replace("0001", "0002")), "{}", "no JSON"])
def test_6_04_the_simulator_refuses_invalid_documents_too(text: str) -> None:
    with pytest.raises(InvalidDocument):
        Definition.parse(text).check(UUID)


@pytest.mark.parametrize("text", [UUID, UUID.upper()])
def test_6_03_a_uuid_is_what_libvirt_prints(text: str) -> None:
    assert is_uuid(text)


@pytest.mark.parametrize(
    "text", [UUID.replace("-", ""), f"{{{UUID}}}", f"urn:uuid:{UUID}", UUID + "\n", f" {UUID}", UUID[:-1], "", "web1"]
)
def test_6_03_other_forms_of_a_uuid_are_names(text: str) -> None:
    assert not is_uuid(text)


def test_6_03_the_name_of_one_and_the_uuid_of_another() -> None:
    other = UUID.replace("0001", "0002")
    both = [("web1", UUID), (UUID, other)]
    text = ambiguity(UUID, both)
    assert "web1" in text
    assert other in text
    assert ambiguity("web1", both) == ""
    assert ambiguity(other, both) == ""
    assert ambiguity(UUID, both[:1]) == ""
    assert ambiguity(UUID, both[1:]) == ""
    assert ambiguity(UUID, [(UUID, UUID)]) == "", "a guest's name may be its own UUID"
    assert ambiguity("web1", [("web1", UUID), ("web1", other)]) == "", "the same name on two hosts is not ambiguous here"
    assert ambiguity(UUID.upper(), [("web1", UUID), (UUID.upper(), other)])
