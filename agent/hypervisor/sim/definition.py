"""The definition of a simulated guest: the document that travels with it."""

from typing import Self

import msgspec

from agent.hypervisor.base import InvalidDocument, Requirements
from agent.hypervisor.names import name_problem
from agent.hypervisor.sim.config import Base, SimGuest, uuid_of

MAX_DOCUMENT = 512 * 1024
"""Most characters of a definition that a peer sends."""


class Definition(Base, kw_only=True, frozen=True, tag="drover-sim-domain", tag_field="type"):
    """Definition of a guest: the document that is sent as `domain_xml` (JSON; a driver's document is opaque to others)."""

    guest: SimGuest

    @classmethod
    def of(cls, guest: SimGuest) -> Self:
        """Return the complete definition of the guest, with UUID and working set filled in."""
        whole = guest.memory_bytes if guest.working_set is None else min(guest.working_set, guest.memory_bytes)
        return cls(guest=msgspec.structs.replace(guest, uuid=guest.uuid or uuid_of(guest.name), working_set=whole))

    @property
    def uuid(self) -> str:
        return self.guest.uuid or uuid_of(self.guest.name)

    @property
    def name(self) -> str:
        return self.guest.name

    def renamed(self, name: str) -> "Definition":
        """Return the definition with that name; unchanged for an empty one."""
        return self.with_(name=name) if name else self

    def described_as(self, *, persistent: bool) -> "Definition":
        """Return the definition with the current value of `persistent`."""
        return self.with_(persistent=persistent)

    def with_(self, **changes: object) -> "Definition":
        """Return the definition with these fields of the guest changed."""
        return msgspec.structs.replace(self, guest=msgspec.structs.replace(self.guest, **changes))

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> "Definition":
        """Decode a definition. Raises `InvalidDocument` for anything else."""
        if len(text) > MAX_DOCUMENT:
            raise InvalidDocument(f"the domain document has {len(text)} characters; at most {MAX_DOCUMENT} are accepted")
        try:
            return cls.of(msgspec.json.decode(text, type=Definition).guest)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidDocument(f"not a domain document of the simulator: {error}") from error

    def check(self, uuid: str) -> None:
        """See `interface.Hypervisor.check_document`."""
        if self.uuid != uuid.lower():
            raise InvalidDocument(f"the domain document describes the domain {self.uuid}, not {uuid}")
        if problem := name_problem(self.name):
            raise InvalidDocument(f"the name in the domain document {problem}; no host takes a guest of that name")


def requirements_of(definition: Definition) -> Requirements:
    it = definition.guest
    return Requirements(
        name=it.name,
        uuid=definition.uuid,
        memory_bytes=it.memory_bytes,
        vcpus=it.vcpus,
        arch=it.arch,
        machine=it.machine,
        virt_type=it.virt_type,
        cpu=it.cpu,
    )
