"""Rewrites msgspec's validation errors for the person who edits the configuration file."""

import difflib
import re
import types
import typing
from typing import Any

import msgspec


class KeyProblem(ValueError):  # noqa: N818 - msgspec wraps it into its own error
    """A wrong value that the type of its key cannot exclude. Raised by a struct's `__post_init__`."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


_AT = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>.*?)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`$")
_MISSING = re.compile(r"Object missing required field `(?P<key>.*)`$")
_STEP = re.compile(r"\[(?P<index>[^\]]*)\]|(?P<name>[^.\[]+)")


def explain(error: msgspec.ValidationError, data: Any, kind: type) -> str:
    """Return one sentence that begins with the full path of the key, such as ``networks[0].address``."""
    text = str(error)
    at = _AT.search(text)
    text = text[: at.start()] if at else text
    raw_path = at["path"] + ("[...]" if at["key"] else "") if at else ""
    path, at_type = _resolve(raw_path, data, kind)
    if isinstance(error.__cause__, KeyProblem):
        return f"{_join(path, error.__cause__.key)}: {text}"
    if unknown := _UNKNOWN.match(text):
        return f"{_join(path, unknown['key'])}: unknown key{_suggestion(unknown['key'], _plain(at_type))}"
    if missing := _MISSING.match(text):
        return f"{_join(path, missing['key'])}: is required and missing"
    return f"{path}: {_expectation(text, at_type)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _suggestion(key: str, struct: Any) -> str:
    names: tuple[str, ...] = getattr(struct, "__struct_fields__", ())
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known here: {', '.join(names)}"


def _expectation(text: str, at_type: Any) -> str:
    """Return what the type allows, from its description where it has one, else from msgspec's text."""
    for part in (at_type, *typing.get_args(at_type)):
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.description and "got" not in text:
                return f"expected {meta.description}"
    plain = _plain(at_type)
    if typing.get_origin(plain) is typing.Literal:
        return f"expected one of {', '.join(repr(value) for value in typing.get_args(plain))}; {text[0].lower()}{text[1:]}"
    return f"{text[0].lower()}{text[1:]}".replace("`", "").replace("array", "list")


def _resolve(path: str, data: Any, kind: Any) -> tuple[str, Any]:
    """Return the path with the keys that msgspec leaves out (it writes ``[...]``), and the type at its end."""
    found = ""
    for step in _STEP.finditer(path):
        kind = _plain(kind)
        if step["name"]:
            key: Any = step["name"]
            kind = typing.get_type_hints(kind, include_extras=True).get(key, Any)
            found = _join(found, key)
        elif step["index"].isdigit():
            key = int(step["index"])
            kind = typing.get_args(kind)[0]
            found = f"{found}[{key}]"
        else:
            key, kind = _wrong_item(data, *typing.get_args(kind))
            found = _join(found, key)
        data = data[key] if isinstance(data, list) or (isinstance(data, dict) and key in data) else None
    return found, kind


def _wrong_item(data: Any, key_type: Any, value_type: Any) -> tuple[str, Any]:
    """Return the first key of a table that is wrong or has a wrong value, and the type that was expected."""
    for key, value in data.items():
        for item, kind in ((key, key_type), (value, value_type)):
            try:
                msgspec.convert(item, kind)
            except msgspec.ValidationError:
                return key, kind
    return "...", value_type


def _plain(kind: Any) -> Any:
    """Return the type without `Annotated` and without the None of an optional."""
    if hasattr(kind, "__metadata__"):
        return _plain(kind.__origin__)
    if isinstance(kind, types.UnionType):
        return _plain(next(arg for arg in typing.get_args(kind) if arg is not type(None)))
    return kind
