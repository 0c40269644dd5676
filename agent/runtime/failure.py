"""An error as a value: kept in a record, and sent within a message."""

import itertools
from collections.abc import Iterable
from typing import Final

import msgspec

from agent.runtime.errors import DroverError, Reason
from agent.runtime.wire import cut
from drover.agent.v1 import handshake_pb2 as pb

ECHO: Final = "echo"
"""Key in `Failure.metadata` that marks a mere consequence: this end noticed, for example by "Broken pipe", that the other end failed
or that somebody aborted. Another error holds the cause."""


class Failure(msgspec.Struct, frozen=True):
    reason: Reason
    message: str
    metadata: dict[str, str] = {}

    @classmethod
    def of(cls, error: DroverError) -> "Failure":
        return cls(error.reason, error.message, dict(error.metadata))

    def error(self) -> DroverError:
        return DroverError(self.reason, self.message, metadata=self.metadata)

    @property
    def distance(self) -> int:
        """Distance from the cause: 0 for a cause, 1 for an echo of a failure on the other host, 2 for the giving up that follows."""
        return 2 if self.reason is Reason.GIVEN_UP else int(ECHO in self.metadata)


def causes_first(failures: Iterable[Failure | None]) -> list[Failure]:
    """Return each failure once, ordered by `distance`; those of equal distance keep their order."""
    found: dict[tuple[str, str], Failure] = {}
    for failure in failures:
        if failure is not None:
            found.setdefault((failure.reason, failure.message), failure)
    return sorted(found.values(), key=lambda failure: failure.distance)


def failure_to_proto(failure: Failure) -> pb.Failure:
    metadata = {key: cut(value, 1024) for key, value in itertools.islice(failure.metadata.items(), 16)}
    return pb.Failure(reason=failure.reason, message=cut(failure.message, 4096), metadata=metadata)
