"""The user's word on the options of a migration."""

from collections.abc import Mapping
from typing import TypedDict, cast

from agent.runtime.errors import Reason
from coordinator.client.errors import InvalidRequest
from drover.agent.v1 import options_pb2


class OptionWords(TypedDict, total=False):
    """The user's word on options: True or False are orders, a key that is missing leaves it to the driver.

    What each means stands in ``drover/agent/v1/options.proto``.
    """

    live: bool
    persist_destination: bool
    undefine_source: bool
    paused: bool
    offline: bool
    change_protection: bool
    abort_on_error: bool
    unsafe: bool
    copy_storage: bool
    auto_converge: bool
    post_copy: bool
    compressed: bool
    parallel: bool
    tunnelled: bool
    rdma: bool
    encrypted: bool


def option_names() -> tuple[str, ...]:
    """The options that take on and off, as the wire knows them."""
    return tuple(field.name for field in options_pb2.Options.DESCRIPTOR.fields if field.type == field.TYPE_BOOL)


def options_message(words: OptionWords | None) -> options_pb2.Options | None:
    """For the wire. Raises `InvalidRequest` with a suggestion for an option that there is not."""
    if not words:
        return None
    known = option_names()
    for name, value in cast(Mapping[str, object], words).items():
        if name not in known:
            import difflib  # noqa: PLC0415 - only a mistake needs it

            close = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"
            raise InvalidRequest(f'unknown option "{name}"{hint}', reason=Reason.UNKNOWN_OPTION, metadata={"option": name})
        if not isinstance(value, bool):
            raise InvalidRequest(f'option "{name}": expected True or False', reason=Reason.INVALID_FIELD)
    return options_pb2.Options(**words)
