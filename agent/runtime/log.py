"""Structured log lines on stderr: readable on a terminal, JSON elsewhere.

Libraries' output takes the same way: Python's `logging`, and what their C cores write to stderr. So no peer can forge a line.
Cookies and domain XML are never passed to a logger."""

import contextlib
import faulthandler
import logging
from collections.abc import Iterator
from typing import Any, Final, Literal

import structlog

from agent.runtime.stray_output import captured, real_stderr

LogLevel = Literal["debug", "info", "warning", "error"]

MAX_LIBRARY_MESSAGE: Final = 2000
"""Characters of a library's message that are logged."""

CALLER_LEFT: Final = "ExecuteBatchError"
"""Error that gRPC raises, and logs with its traceback, when the caller of an RPC is gone. Not an error of this process."""

_log = structlog.get_logger("drover.library")


@contextlib.contextmanager
def logging_to_stderr(level: LogLevel = "info") -> Iterator[None]:
    """Configure logging while the block runs. `level`: the lowest that is written."""
    number = logging.getLevelNamesMapping()[level.upper()]
    with real_stderr() as stream:
        renderer: Any = structlog.dev.ConsoleRenderer() if stream.isatty() else structlog.processors.JSONRenderer()
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                renderer,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(number),
            logger_factory=structlog.WriteLoggerFactory(stream),
            cache_logger_on_first_use=True,
        )
        # Warnings at least: libraries (grpc, asyncio) are chatty.
        logging.basicConfig(handlers=[_ToStructlog()], level=max(logging.WARNING, number), force=True)
        faulthandler.enable(stream)  # for crashes of C cores, whose own output ends in the pipe
        try:
            with captured(_log_line, _log_dropped):
                yield
        finally:
            faulthandler.disable()


def _log_line(line: str) -> None:
    _log.warning("library output", text=line)


def _log_dropped(lines: int) -> None:
    _log.warning("too much library output", lines_left_out=lines)


class _ToStructlog(logging.Handler):
    """Writes a record of Python's `logging` as a structured line."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == CALLER_LEFT:
            _log.debug("a caller left before its answer", text=record.getMessage()[:MAX_LIBRARY_MESSAGE])
            return
        try:
            message = record.getMessage()[:MAX_LIBRARY_MESSAGE]
            _log.log(record.levelno, "library message", logger=record.name, text=message, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)
