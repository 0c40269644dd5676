"""What goes with a guest beside its running copy, from the hypervisor to the wire and back."""

import zlib
from typing import Final

from agent.handshake.host.phases import LocalHost
from agent.hypervisor.base import MAX_DOMAIN_XML, Domain, HypervisorError, Stored
from agent.hypervisor.features import from_hypervisor
from agent.runtime.errors import DroverError, Reason, invalid_field
from drover.agent.v1 import handshake_pb2 as pb

MAX_COMPRESSED: Final = 256 * 1024
"""The bound of the field: both definitions and a cookie fit into one message."""


def stored_to_proto(stored: Stored | None, guest: str, host: str) -> pb.StoredGuest | None:
    """Raises:
    DroverError: INCOMPATIBLE_GUEST for a definition that is too big to travel.
    """
    if stored is None:
        return None
    text = stored.definition.encode()
    definition = zlib.compress(text) if text else b""
    if len(text) > MAX_DOMAIN_XML or len(definition) > MAX_COMPRESSED:
        raise DroverError(
            Reason.INCOMPATIBLE_GUEST,
            f"the definition of guest {guest} for its next boot has {len(text)} bytes on {host} ({len(definition)} compressed); at "
            f"most {MAX_DOMAIN_XML} ({MAX_COMPRESSED}) can travel with it. Nothing was done to the guest; shorten its metadata",
            metadata={"host": host, "bytes": str(len(text))},
        )
    return pb.StoredGuest(definition_zlib=definition, autostart=stored.autostart)


def stored_from_proto(request: pb.PrepareRequest) -> Stored | None:
    """Raises:
    DroverError: INVALID_FIELD for what is no compressed text, or grows beyond `MAX_DOMAIN_XML`.
    """
    if not request.HasField("stored"):
        return None
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(request.stored.definition_zlib, MAX_DOMAIN_XML + 1) if request.stored.definition_zlib else b""
        if len(text) > MAX_DOMAIN_XML:
            raise invalid_field("stored.definition_zlib", f"unpacks to more than {MAX_DOMAIN_XML} bytes")
        if text and not unpacker.eof:
            raise invalid_field("stored.definition_zlib", "ends too early")
        return Stored(text.decode(), request.stored.autostart)
    except (zlib.error, UnicodeDecodeError) as error:
        raise invalid_field("stored.definition_zlib", f"is no compressed text: {error}") from None


def changes_of(stored: Stored | None, *, arrives: bool) -> dict[str, object]:
    """What either record must say of it. An arrival is always looked after: a definition that was here may start by itself."""
    autostart = stored is not None and stored.autostart
    return {"stored": stored, "autostart": autostart, "aftercare": autostart or arrives}


def check_documents(host: LocalHost, uuid: str, request: pb.PrepareRequest) -> Stored | None:
    """Refuse documents that are not of this guest, before the hypervisor's library sees them. What is to be stored.

    Raises:
        DroverError: INVALID_FIELD.
    """
    stored = stored_from_proto(request)
    documents = {"domain_xml": request.domain_xml, "stored.definition_zlib": stored.definition if stored is not None else ""}
    for field, document in documents.items():
        try:
            if document or field == "domain_xml":
                host.hypervisor.check_document(uuid, document)
        except HypervisorError as error:
            raise invalid_field(field, str(error)) from None
    return stored


async def read_stored(host: LocalHost, domain: Domain) -> Stored | None:
    """What goes with the guest.

    Raises:
        DroverError: INCOMPATIBLE_GUEST for what is too big to travel; of the hypervisor.
    """
    try:
        stored = await host.hypervisor.stored(domain.uuid)
    except HypervisorError as error:
        raise from_hypervisor(error, host.name) from None
    stored_to_proto(stored, domain.name, host.name)
    return stored
