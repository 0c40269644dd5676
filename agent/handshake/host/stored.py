"""Converts what is moved along with a guest (its stored definition, its autostart) between the hypervisor and the wire."""

import zlib
from typing import Final

from agent.handshake.host.phases import LocalHost
from agent.hypervisor.base import MAX_DOMAIN_XML, Domain, HypervisorError, Stored
from agent.hypervisor.reasons import translated
from agent.runtime.errors import DroverError, Reason, invalid_field
from drover.agent.v1 import handshake_pb2 as pb

MAX_COMPRESSED: Final = 256 * 1024
"""Maximum size of the field in bytes, so that both definitions and a cookie fit into one message."""


def stored_to_proto(stored: Stored | None, guest: str, host: str) -> pb.StoredGuest | None:
    """Convert to the wire.

    Raises:
        DroverError: INCOMPATIBLE_GUEST for a definition that is too big for a message.
    """
    if stored is None:
        return None
    text = stored.definition.encode()
    definition = zlib.compress(text) if text else b""
    if len(text) > MAX_DOMAIN_XML or len(definition) > MAX_COMPRESSED:
        raise DroverError(
            Reason.INCOMPATIBLE_GUEST,
            f"the stored definition of guest {guest} on {host} has {len(text)} bytes ({len(definition)} compressed), but at most "
            f"{MAX_DOMAIN_XML} ({MAX_COMPRESSED}) can be moved with it. Nothing was done to the guest; shorten its metadata",
            metadata={"host": host, "bytes": str(len(text))},
        )
    return pb.StoredGuest(definition_zlib=definition, autostart=stored.autostart)


def stored_from_proto(request: pb.PrepareRequest) -> Stored | None:
    """Convert from the wire.

    Raises:
        DroverError: INVALID_FIELD for what is not compressed text, or is larger than `MAX_DOMAIN_XML`.
    """
    if not request.HasField("stored"):
        return None
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(request.stored.definition_zlib, MAX_DOMAIN_XML + 1) if request.stored.definition_zlib else b""
        if len(text) > MAX_DOMAIN_XML:
            raise invalid_field("stored.definition_zlib", f"unpacks to more than {MAX_DOMAIN_XML} bytes")
        if text and not unpacker.eof:
            raise invalid_field("stored.definition_zlib", "is truncated")
        return Stored(text.decode(), request.stored.autostart)
    except (zlib.error, UnicodeDecodeError) as error:
        raise invalid_field("stored.definition_zlib", f"is not compressed text: {error}") from None


def changes_of(stored: Stored | None, *, arrives: bool) -> dict[str, object]:
    """Return the changes of either record. An arrival always needs aftercare: a definition that was here before may have had
    autostart on."""
    autostart = stored is not None and stored.autostart
    return {"stored": stored, "autostart": autostart, "aftercare": autostart or arrives}


def check_documents(host: LocalHost, uuid: str, request: pb.PrepareRequest) -> Stored | None:
    """Check that the documents are of this guest, before the hypervisor's library sees them. Return what is to be stored.

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
    """Return what is moved along with the guest.

    Raises:
        DroverError: INCOMPATIBLE_GUEST for what is too big for a message; errors of the hypervisor.
    """
    with translated(host.name):
        stored = await host.hypervisor.stored(domain.uuid)
    stored_to_proto(stored, domain.name, host.name)
    return stored
