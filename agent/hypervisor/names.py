"""Names of guests. Pure, and the same for every driver."""

import unicodedata
from typing import Final

_LONGEST_FILE_NAME: Final = 255
"""NAME_MAX of Linux file systems, in bytes."""

_FILES: Final = ("{}.xml.new", "{}.pid", "{}.monitor", "{}.log.0", "{}.save", "{}_VARS.qcow2", "{}-swtpm.log", ".{}.xml.drover")
"""Files that libvirt, its log daemon and Drover's hook name after a guest."""

MAX_NAME: Final = _LONGEST_FILE_NAME - max(len(pattern.format("").encode()) for pattern in _FILES)
"""Bytes of a guest's name for which every one of those files can be made."""


def name_problem(name: str) -> str:
    """Why no host takes a guest of that name; empty where every host does.

    libvirt forms paths from the name before it checks it, as root, so this is checked before libvirt sees it.
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
