"""Values on the command line."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from agent.hypervisor.options import Value

_UNITS: dict[str, int] = {
    "B": 8,
    **{f"{prefix}B": 8 * 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{prefix}iB": 8 * 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
    **{f"{prefix}bit": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
}
"""Bits in each unit. Case-sensitive, because "Mb" and "MB" are often mixed up."""

_RATE = re.compile(r"(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?P<unit>[A-Za-z]*)(?:/s)?", re.ASCII)
_MAX_RATE = 2**63 - 1

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]+)", re.ASCII)


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Bytes per second: ``100MiB/s``, ``1Gbit/s``, or a plain number of bytes."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _RATE.fullmatch(str(value).strip())
        if match is None or (match["unit"] or "B") not in _UNITS:
            self.fail(f'"{value}" is not a rate; expected for example 100MiB/s, 1Gbit/s or 125000000 (bytes per second)', param, ctx)
        whole, _, part = match["number"].partition(".")
        eighths = 8 * 10 ** len(part)
        rate: int = int(whole + part) * _UNITS[match["unit"] or "B"] // eighths
        if not 1 <= rate <= _MAX_RATE:
            self.fail(f'"{value}" is out of range; leave it out for no limit', param, ctx)
        return rate


class ZeroOr(click.ParamType):  # type: ignore[type-arg]
    """A value of `kind`, or 0 for a word."""

    def __init__(self, word: str, kind: Any) -> None:
        self._word, self._kind, self.name = word, kind, kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return 0 if value == self._word else self._kind.convert(value, param, ctx)


class LimitValue(click.ParamType):  # type: ignore[type-arg]
    """A limit: a number from 0, or ``default``."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "int | str":
        if value == "default":
            return "default"
        if not re.fullmatch(r"[0-9]{1,9}", str(value)):
            text = "0 closes the host, and default resets the limit to that of its configuration file"
            self.fail(f'"{value}" is not a limit; expected a number from 0 ({text})', param, ctx)
        return int(value)


def once_option(*names: str, metavar: str, text: str, kind: Any = None) -> Callable[[Any], Any]:
    """Return the decorator of an option that changes a setting: None if it is not given; refused if it is given twice, as "set" and
    "reset" both count. `kind`: its type; None: a text."""
    return click.option(*names, type=kind, multiple=True, callback=_once, metavar=metavar, help=text)


def rate_option(name: str, text: str) -> Callable[[Any], Any]:
    """Return the decorator of an option that sets a rate, or removes it by "none"."""
    return once_option(name, metavar="RATE", text=text, kind=ZeroOr("none", Rate()))


def _once(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> Any:
    if len(values) > 1:
        raise click.BadParameter("was given more than once", ctx, param)
    return values[0] if values else None


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
            most = f"{self._most / 86400:g}d" if self._most >= 86400 else f"{self._most:g}s"
            self.fail(f'"{value}" is out of range: more than 0 and at most {most}', param, ctx)
        return duration


class OptionValue(click.ParamType):  # type: ignore[type-arg]
    """One option and its value: ``live=off``. None for ``live=default``, which leaves it to the driver."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "tuple[str, Value | None]":
        from agent.hypervisor.options import OPTIONS, unknown_option  # noqa: PLC0415 - most migrations have none

        name, _, typed = (part.strip() for part in value.partition("="))
        option = OPTIONS.get(name := name.replace("-", "_"))
        if option is None:
            self.fail(unknown_option(name), param, ctx)
        try:
            return name, None if typed.lower() == "default" else option.read(typed)
        except ValueError:
            self.fail(f'"{value}": {name} takes {option.expected}, or default', param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from agent.hypervisor.options import OPTIONS  # noqa: PLC0415 - see above

        offered = [f"{name}={value}" for name, option in OPTIONS.items() for value in option.typed]
        return [CompletionItem(each) for each in offered if each.startswith(incomplete)]
