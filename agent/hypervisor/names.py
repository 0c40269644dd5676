"""Rules for the names of guests, and for which guest a name or UUID means. Pure functions, the same for every driver."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

_LONGEST_FILE_NAME: Final = 255
"""NAME_MAX of Linux file systems, in bytes."""

_FILES: Final = ("{}.xml.new", "{}.pid", "{}.monitor", "{}.log.0", "{}.save", "{}_VARS.qcow2", "{}-swtpm.log", ".{}.xml.drover")
"""Patterns of the files that libvirt, its log daemon and Drover's hook name after a guest."""

MAX_NAME: Final = _LONGEST_FILE_NAME - max(len(pattern.format("").encode()) for pattern in _FILES)
"""Most bytes of a guest's name with which every one of those files can be created."""


def name_problem(name: str) -> str:
    """Return why no host accepts a guest with that name; empty where every host does.

    Check a name with this before libvirt sees it: libvirt, as root, builds paths from the name before it checks it.
    """
    size = len(name.encode(errors="replace"))
    if not name:
        return "is empty"
    if name in (".", ".."):
        return f'is "{name}"'
    if "/" in name:
        return 'contains "/"'
    for character in name:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            return f"contains the control character U+{ord(character):04X}"
    return f"has {size} bytes; at most {MAX_NAME} are allowed" if size > MAX_NAME else ""


def is_uuid(text: str) -> bool:
    """Return whether the text is a UUID as libvirt prints it, in either case. Any other form (braces, no dashes, ``urn:uuid:``) is a
    name."""
    return _UUID.fullmatch(text) is not None


def ambiguity(reference: str, guests: Iterable[tuple[str, str]]) -> str:
    """Return why a reference is ambiguous among these guests (name, UUID): it is the name of one and the UUID of another.
    Empty where it is not.
    """
    known = set(guests)
    owners = sorted(name for name, uuid in known if uuid == reference.lower())
    namesakes = sorted(uuid for name, uuid in known if name == reference and uuid != reference.lower())
    if not owners or not namesakes:
        return ""
    return (
        f'"{reference}" is the UUID of guest "{owners[0]}" and the name of guest {namesakes[0]}; '
        f'use "{owners[0]}" for the first, {namesakes[0]} for the second'
    )
