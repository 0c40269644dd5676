"""Configuration files of both daemons: TOML, checked completely before anything starts; errors name the key and what is expected.

A configuration is a struct whose `__post_init__` calls the `check_` functions; they raise `KeyProblem`."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from agent.runtime.address import Address, TcpAddress, parse_address
from agent.runtime.config_errors import KeyProblem, explain

T = TypeVar("T", bound=msgspec.Struct)

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?\Z"
MAX_NAME: Final = 63

Name = Annotated[
    str,
    msgspec.Meta(
        pattern=NAME_PATTERN,
        max_length=MAX_NAME,
        description='a name: at most 63 of a-z, 0-9, "." and "-", beginning and ending with a letter or digit',
    ),
]
"""Name of a host, a network or a coordinator."""

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ConfigError(Exception):
    """An invalid configuration; the message names the file, the key and what is expected."""


def load(path: str | Path, kind: type[T]) -> T:
    """Read a file and check it against `kind`. Raises `ConfigError`."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: byte {error.start} is wrong") from error
    return convert(data, kind, str(path))


def convert(data: dict[str, Any], kind: type[T], where: str) -> T:
    """Check parsed tables against `kind`. `where`: the file, for the error. Raises `ConfigError`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, data, kind)}") from error


def make_state_dir(path: str) -> Path:
    """Create the directory, for its owner only. Raises `ConfigError`."""
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_dir {path} cannot be created: {error.strerror}") from error
    return Path(path)


def check_listen(listen: Sequence[str], allow_insecure_tcp: bool) -> None:
    """Raise `KeyProblem` unless the addresses to listen on are valid and distinct, and no TCP beyond loopback unless allowed."""
    for index, text in enumerate(listen):
        key = f"listen[{index}]"
        address = check_address(key, text, port_zero=True)
        if isinstance(address, TcpAddress) and not address.host.is_loopback and not allow_insecure_tcp:
            raise KeyProblem(
                key,
                f'"{text}" is open to the network, and this version has no mutual TLS; '
                'listen on "unix:/path" or loopback, or set allow_insecure_tcp = true on a network that you trust',
            )
    check_unique("listen", [text for text in listen if not text.endswith(":0")])


def check_address(key: str, text: str, *, port_zero: bool = False) -> Address:
    """Return the parsed address. Raises `KeyProblem`; without `port_zero` also for port 0 and the wildcard."""
    try:
        address = parse_address(text)
    except ValueError as error:
        raise KeyProblem(key, str(error)) from None
    if isinstance(address, TcpAddress) and not port_zero and (address.port == 0 or address.host.is_unspecified):
        raise KeyProblem(key, f'"{text}" cannot be connected to; expected an address of a host, and its port')
    return address


def check_path(key: str, path: str) -> None:
    if not Path(path).is_absolute() or "\0" in path:
        raise KeyProblem(key, f'expected an absolute path, got "{path}"')


def check_unique(key: str, values: Sequence[str], what: str = "address") -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise KeyProblem(f"{key}[{index}]", f'the {what} "{value}" is listed twice')
