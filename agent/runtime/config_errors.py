"""Error messages for a configuration: the wrong key, what is expected, and what was found."""

import difflib
import reprlib
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

_TOML = {"`": "", " | null": "", "array": "list", "object": "table"}
"""Replacements for msgspec's terms, which are JSON's."""


class KeyProblem(ValueError):  # noqa: N818 - msgspec wraps it into its own error
    """A wrong value that the type of its key cannot exclude. Raised by a struct's `__post_init__`."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def explain(error: msgspec.ValidationError, value: Any, kind: Any, path: str = "") -> str:
    """Return one sentence that begins with the full path of the key, such as ``networks[0].address``.

    `error` is what `msgspec.convert` raised for `value` and `kind`. It has the path only as text, and without the keys of tables. So
    this searches for the first item or key that cannot be converted by itself, and goes on inside it."""
    kind, description = _plain(kind)
    fields = _fields(kind)
    if isinstance(value, dict) and fields:
        if unknown := [key for key in value if key not in fields]:
            return f"{_join(path, unknown[0])}: unknown key{_suggestion(unknown[0], list(fields))}"
        if missing := [name for name, field in fields.items() if field.required and name not in value]:
            return f"{_join(path, missing[0])}: is required and missing"
    for part_path, part, part_kind in _parts(path, value, kind):
        try:
            msgspec.convert(part, part_kind)
        except msgspec.ValidationError as part_error:
            return explain(part_error, part, part_kind, part_path)
    if isinstance(error.__cause__, KeyProblem):
        return f"{_join(path, error.__cause__.key)}: {error}"
    text = str(error)
    for words, ours in _TOML.items():
        text = text.replace(words, ours)
    expected, got, what = text.partition(", got ")
    if get_origin(kind) is Literal:
        expected, what = f"expected one of {', '.join(map(repr, get_args(kind)))}", ""
    elif description and not got:
        expected = f"expected {description}"
    return f"{path}: {expected[0].lower()}{expected[1:]}, got {what or reprlib.repr(value)}"


def _parts(path: str, value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and type of each item of a list, and of each key and each value of a table."""
    args = get_args(kind)
    if isinstance(value, list) and get_origin(kind) is tuple:
        yield from ((f"{path}[{index}]", item, args[0]) for index, item in enumerate(value))
    elif isinstance(value, dict) and get_origin(kind) is dict:
        for key, item in value.items():
            yield _join(path, key), key, args[0]
            yield _join(path, key), item, args[1]
    elif isinstance(value, dict):
        yield from ((_join(path, name), value[name], field.type) for name, field in _fields(kind).items() if name in value)


def _fields(kind: Any) -> dict[str, FieldInfo]:
    """Return the fields of a struct by name; none for another type."""
    is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return {field.name: field for field in msgspec.structs.fields(kind)} if is_struct else {}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known here: {', '.join(known)}"


def _plain(kind: Any) -> tuple[Any, str]:
    """Return the type without `Annotated` and without the None of an optional, and its description."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    metas = getattr(kind, "__metadata__", ())
    return kind.__origin__ if metas else kind, next((meta.description for meta in metas if meta.description), "")
