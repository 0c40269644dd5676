"""A guest's settings in libvirt's metadata: one element of Drover's own namespace, in the live and in the stored definition. Both
travel with a migration. Blocking functions run in threads; `domain` is libvirt's."""

import threading
from typing import Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import libvirt
import structlog

from agent.hypervisor.base import DomainBusy, HypervisorError, Job
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.libvirt import domain as domains

log = structlog.get_logger()

URI: Final = "https://drover.dev/xmlns/domain/1"
PREFIX: Final = "drover"
_TAG: Final = "settings"


def of_xml(xml: str) -> GuestSettings | None:
    """Return the settings in a domain XML; None without any."""
    found = ElementTree.fromstring(xml).find(f"metadata/{{{URI}}}{_TAG}")
    return None if found is None else _settings(found)


def read(domain: Any, flags: int = libvirt.VIR_DOMAIN_AFFECT_CURRENT) -> GuestSettings | None:
    """Return the settings of a guest, by default of its live definition if it runs; None without any. Waits for no job."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, URI, flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise
    try:
        return _settings(ElementTree.fromstring(text))
    except ElementTree.ParseError as error:
        _warn(str(error))
        return GuestSettings(unread="the metadata is not XML")


def _settings(element: ElementTree.Element) -> GuestSettings | None:
    """Return the settings of an element. Others may have written anything: what cannot be used is ignored, with a warning."""
    settings, wrong = GuestSettings.of(element.attrib)
    if wrong:
        _warn(wrong)
    return settings or None


def _warn(why: str) -> None:
    log.warning("Drover metadata of a guest is ignored, as it cannot be used; set it anew", why=why[:200], namespace=URI)


def write(domain: Any, settings: GuestSettings) -> GuestSettings | None:
    """Write the settings into each definition that the guest has, and read them back; none: remove the element.

    Raises `DomainBusy` for a guest that a migration holds or whose process does not answer: the call would wait for it."""
    if domains.silent_for(domain) or (domain.isActive() and domains.read_job(domain) is not Job.NONE):
        raise DomainBusy(f"guest {domain.name()} is held by a migration, or its process does not answer; nothing was changed")
    attributes = "".join(f" {name}={quoteattr(value)}" for name, value in settings.attributes().items())
    element = f"<{_TAG}{attributes}/>" if attributes else None
    ways = {libvirt.VIR_DOMAIN_AFFECT_LIVE: domain.isActive(), libvirt.VIR_DOMAIN_AFFECT_CONFIG: domain.isPersistent()}
    flags = [flag for flag, there in ways.items() if there]
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, PREFIX if element else None, URI, sum(flags))
    for flag in flags:
        if read(domain, flag) != (settings or None):
            raise HypervisorError(f"libvirt accepted the settings of guest {domain.name()}, but did not keep them")
    return settings or None


class Cache:
    """The settings of every guest of a host, so that a list of them needs no further call. `forget` may be called by any thread."""

    def __init__(self) -> None:
        self._known: dict[str, GuestSettings | None] = {}
        self._lock = threading.Lock()
        self._forgotten = 0

    def forget(self, uuid: str) -> None:
        """Read the settings of this guest anew; of every guest with an empty UUID. Called at each event about a guest."""
        with self._lock:
            self._forgotten += 1
            if uuid:
                self._known.pop(uuid, None)
            else:
                self._known.clear()

    def of(self, domain: Any, uuid: str) -> GuestSettings | None:
        """Return the settings. Raises libvirt's error where they cannot be read."""
        with self._lock:
            if uuid in self._known:
                return self._known[uuid]
            before = self._forgotten
        settings = read(domain)
        with self._lock:
            if self._forgotten == before:  # else an event came meanwhile: what was read may be old
                self._known[uuid] = settings
        return settings
