"""Values on the command line."""

import re
from typing import Any

import click
from click.shell_completion import CompletionItem

_UNITS: dict[str, float] = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
    **{f"{prefix}bit": 1000**power / 8 for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
}
"""Bytes in each unit. Case-sensitive, because "Mb" and "MB" are often mixed up."""

_RATE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)(?:/s)?")
_MAX_RATE = 2**63 - 1

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]+)")

_WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False, "default": None}


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Bytes per second: ``100MiB/s``, ``1Gbit/s``, or a plain number of bytes."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _RATE.fullmatch(str(value).strip())
        if match is None or (match["unit"] or "B") not in _UNITS:
            self.fail(f'"{value}" is not a rate; expected for example 100MiB/s, 1Gbit/s or 125000000 (bytes per second)', param, ctx)
        rate = round(float(match["number"]) * _UNITS[match["unit"] or "B"])
        if not 1 <= rate <= _MAX_RATE:
            self.fail(f'"{value}" is out of range; leave it out for no limit', param, ctx)
        return rate


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A duration in seconds: ``90s``, ``10min``, ``2h``. `most` is the longest one."""

    name = "duration"

    def __init__(self, most: float) -> None:
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip())
        if match is None or match["unit"] not in _SECONDS:
            self.fail(f'"{value}" is not a duration; expected for example 90s, 10min or 2h', param, ctx)
        duration = float(match["number"]) * _SECONDS[match["unit"]]
        if not 0 < duration <= self._most:
            self.fail(f'"{value}" is out of range: more than 0 and at most {self._most / 86400:g}d', param, ctx)
        return duration


class OptionWord(click.ParamType):  # type: ignore[type-arg]
    """One option and the user's word on it: ``live=off``. Three-valued: on, off, or default (the driver's choice)."""

    name = "name=on|off|default"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, bool | None]:
        name, equals, word = value.partition("=")
        name = name.strip().replace("-", "_")
        names = _option_names()
        if name not in names:
            import difflib  # noqa: PLC0415 - only a mistake needs it

            close = difflib.get_close_matches(name, names, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(names)}"
            self.fail(f'unknown option "{name}"; {hint}', param, ctx)
        if not equals or word.strip().lower() not in _WORDS:
            self.fail(f'"{value}": expected {name}=on, {name}=off or {name}=default', param, ctx)
        return name, _WORDS[word.strip().lower()]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = [f"{name}={word}" for name in _option_names() for word in ("on", "off")]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _option_names() -> tuple[str, ...]:
    from coordinator.client.options import option_names  # noqa: PLC0415 - the wire's code is slow to import

    return option_names()
