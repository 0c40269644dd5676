"""Pages of every list call: `page_size`, `page_token` and `next_page_token` as in AIP-158.

A token holds the key of the last item of its page. So it survives a restart, and items that come or go shift no others."""

import base64
import binascii
import json
import zlib
from collections.abc import Iterable
from typing import Any, Final, Generic, NamedTuple, TypeVar

import structlog
from google.protobuf.message import Message

from agent.runtime.errors import DroverError, invalid_field

MAX_ITEMS: Final = 1000
"""Most items of a page."""
PAGE_BYTES: Final = 512 * 1024
"""Largest size of a page with more than one item. A message may be twice as large."""
MAX_ITEM_BYTES: Final = 256 * 1024
"""Largest size of an item; the bounds of the wire keep every listed message below it."""

Key = tuple[str | int, ...]

log = structlog.get_logger(__name__)

_M = TypeVar("_M", bound=Message)


class Page(NamedTuple, Generic[_M]):
    """Items of a list, and where the next page begins."""

    items: list[_M]
    end: Key | None
    """The next page begins after this key. None: there is none."""
    token: str
    """`next_page_token`."""


class Paging:
    """The page that a request asks for. `kinds`: types of the parts of a key. `default`: page size if the request has none.

    Raises INVALID_FIELD for a token that is not of this list."""

    def __init__(self, request: Any, *kinds: type, default: int = MAX_ITEMS) -> None:
        self._list = _digest(request)
        self.size = min(request.page_size or default, MAX_ITEMS)
        self.after: Key | None = self._read(request.page_token, kinds) if request.page_token else None
        """The page begins after this key. None: at the beginning."""

    def take(self, rows: Iterable[tuple[Key, _M]], end: Key | None = None) -> Page[_M]:
        """Return the page. `rows` are ordered by unique keys; those up to `after` are skipped. `end`: key up to which `rows` are
        complete; None: to the end of the list."""
        items: list[_M] = []
        size, last = 0, self.after
        for key, item in rows:
            if self.after is not None and key <= self.after:
                continue
            item_size = item.ByteSize()
            if item_size > MAX_ITEM_BYTES:
                log.error("an item is too large for a page and left out", item=str(key), size=item_size)
                continue
            size += item_size
            if len(items) == self.size or (items and size > PAGE_BYTES):
                return self._page(items, last)
            items.append(item)
            last = key
        return self._page(items, end)

    def _page(self, items: list[_M], end: Key | None) -> Page[_M]:
        return Page(items, end, self._token(end))

    def _token(self, key: Key | None) -> str:
        if key is None:
            return ""
        text = json.dumps([self._list, *key], ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    def _read(self, token: str, kinds: tuple[type, ...]) -> Key:
        try:
            padded = token.encode("ascii") + b"=" * (-len(token) % 4)
            parts = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        except (ValueError, binascii.Error, RecursionError):
            raise _bad_token("is not a token of this server") from None
        if not isinstance(parts, list) or [type(part) for part in parts] != [int, *kinds]:
            raise _bad_token("is not a token of this list")
        if any(isinstance(part, int) and abs(part) >= 1 << 63 for part in parts):
            raise _bad_token("is not a token of this list")
        if parts[0] != self._list:
            raise _bad_token("belongs to a list with other fields; repeat the call with the fields of the first page")
        return tuple(parts[1:])


def _digest(request: Any) -> int:
    """Return a checksum of the request without its page."""
    asked = type(request)()
    asked.CopyFrom(request)
    for field in ("page_size", "page_token"):
        asked.ClearField(field)
    return zlib.crc32(request.DESCRIPTOR.full_name.encode() + asked.SerializeToString(deterministic=True))


def _bad_token(description: str) -> DroverError:
    return invalid_field("page_token", description)
