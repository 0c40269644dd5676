"""The options of a migration, checked before the server is asked."""

from agent.hypervisor.options import OPTIONS, Options, unknown_option
from agent.runtime.errors import Reason
from coordinator.client.errors import InvalidRequest
from drover.agent.v1 import options_pb2


def options_message(options: Options) -> options_pb2.Options:
    """Raises `InvalidRequest` for an option that does not exist, and for a value that it does not take."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidRequest(unknown_option(name), reason=Reason.UNKNOWN_OPTION, metadata={"option": name})
        if problem := OPTIONS[name].problem(value):
            raise InvalidRequest(f'option "{name}": {problem}', reason=Reason.INVALID_FIELD)
    return options_pb2.Options(**options)
