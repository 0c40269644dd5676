"""Text that others wrote (names, messages), made safe for a terminal."""

import json
import re
from typing import Any

_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters that show nothing although Python calls them printable: Unicode's Default_Ignorable_Code_Point."""


def _is_plain(character: str) -> bool:
    """Return whether the character shows as itself: no control character, none that changes the text's direction, none invisible."""
    return character.isprintable() and not _INVISIBLE.match(character)


def printable(text: str) -> str:
    """Return the text with a question mark for each character that could control a terminal or deceive its reader."""
    return "".join(character if _is_plain(character) else "?" for character in text)


def dump_json(document: Any, indent: int | None = None) -> str:
    """Return JSON that is safe on a terminal: characters that are not plain are escaped, so a program reads the same value."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    return "".join(character if character == "\n" or _is_plain(character) else json.dumps(character)[1:-1] for character in text)
