"""Enums of words that grow from version to version."""

import re
from enum import StrEnum
from typing import Final, Self

_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}\Z")


class OpenEnum(StrEnum):
    """Also takes a word that only a newer version knows: it is carried through as it is, equals itself and no member.

    Raises `ValueError` for what cannot be such a word.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not _WORD.match(value):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word
