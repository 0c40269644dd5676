"""The options of a migration, checked before the server is asked."""

from typing import TYPE_CHECKING

from agent.runtime.errors import Reason
from coordinator.client.errors import InvalidRequest
from drover.agent.v1 import options_pb2

if TYPE_CHECKING:
    from agent.hypervisor.options import Options


def options_message(options: "Options | None") -> options_pb2.Options | None:
    """Return the options as a message. Raises `InvalidRequest` for an unknown option, and for a value that it does not take."""
    if not options:
        return None
    from agent.hypervisor.options import OPTIONS, unknown_option  # noqa: PLC0415 - most migrations need no table

    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidRequest(unknown_option(name), reason=Reason.UNKNOWN_OPTION, metadata={"option": name})
        if problem := OPTIONS[name].problem(value):
            raise InvalidRequest(f'option "{name}": {problem}', reason=Reason.INVALID_FIELD)
    return options_pb2.Options(**options)
