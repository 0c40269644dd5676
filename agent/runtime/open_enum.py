"""String enums to which newer versions add values."""

import re
from enum import StrEnum
from typing import Final, Self

_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}\Z")


class OpenEnum(StrEnum):
    """Enum that also accepts the values of newer versions: such a value keeps its text, and equals itself but no member.

    Raises `ValueError` for text that no version could use."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not _WORD.match(value):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word
